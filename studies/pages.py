"""The pages of all studies, and their list. Owns no number: each study says what its results mean."""

from collections.abc import Sequence

from studies.harness import PAGES, SEEDS, Results, Study
from studies.page import NOTE, markdown_table, write_markdown, write_parts

__all__ = ["write_index", "write_page"]


def write_page(study: Study, results: Results) -> None:
    """Writes docs/studies/NAME.md and its plot."""
    arms = markdown_table([["arm", "what it is"], *([f"`{name}`", words] for name, words in study.arms.items())])
    made = (
        f"{arms}\n\nEvery arm is run with seeds {', '.join(map(str, SEEDS))} (weights, order, captions, noise) and "
        "the same number of pictures and steps. Where a number has a ±, that is half of a 95 % interval over the "
        f"seeds by Student's t; differences are taken seed by seed. {results.cpu_minutes:.0f} minutes of one core in "
        f"all: `python -m studies {study.name}`; numbers in [`{study.name}.json`]({study.name}.json)."
    )
    write_parts(PAGES, study.name, study.title, study.question, study.page(results), made)


def write_index(studies: Sequence[Study]) -> None:
    """Writes docs/studies/README.md: the pages that there are."""
    rows = [
        [f"[{study.title}]({study.name}.md)", study.question]
        for study in studies
        if (PAGES / f"{study.name}.md").exists()
    ]
    text = (
        "# Studies\n\nWhat the report leaves open, tried on a tiny model of SDXL's architecture (a U-Net of 1.1 M "
        "parameters on latents of 8 × 8 to 24 × 24). `make studies` runs them all and goes on where it was "
        f"stopped.\n\n{markdown_table([['study', 'question'], *rows])}\n\n*{NOTE}*"
    )
    write_markdown(PAGES / "README.md", text)
