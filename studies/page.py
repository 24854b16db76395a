"""A study's page: question, table, plot, conclusion, what would differ at full size. Owns its layout alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from studies.plots import Panel, write_plot
from sumizome.files import write_atomically

__all__ = ["PageParts", "markdown_table", "write_markdown", "write_parts"]

NOTE = "Written by `python -m studies`; edit nothing here, but `studies/`."


@dataclass(frozen=True)
class PageParts:
    """What a study says; texts are Markdown."""

    method: str
    table: Sequence[Sequence[str]]
    """The first row is the head."""
    table_note: str
    """What the columns are, and their units."""
    panels: Sequence[Panel]
    plot_says: str
    """For who cannot see the plot."""
    conclusion: str
    at_full_size: str


def write_parts(folder: Path, name: str, title: str, question: str, parts: PageParts, made: str) -> None:
    """Writes NAME.md and NAME.png. `made`: what it cost, and the command."""
    write_plot(parts.panels, folder / f"{name}.png")
    text = "\n\n".join(
        [
            f"# {title}",
            question,
            f"## What was done\n\n{parts.method}\n\n{made}",
            f"## Found\n\n{markdown_table(parts.table)}\n\n{parts.table_note}",
            f"![{parts.plot_says}]({name}.png)",
            f"## Conclusion\n\n{parts.conclusion}",
            f"## What would change at full size\n\n{parts.at_full_size}",
            f"*{NOTE}*",
        ]
    )
    write_markdown(folder / f"{name}.md", text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table; the first is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def write_markdown(path: Path, text: str) -> None:
    """Writes the text with one newline at its end."""
    write_atomically(path, lambda temporary: temporary.write_text(text.strip() + "\n", encoding="utf-8"))
