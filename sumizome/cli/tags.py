"""Show a manifest's tags: how many, of which categories, how often, and what loss weighting makes of head and tail.

With --out, writes the table as a CSV that you may edit (columns category and weight) and training reads back:
[tag_weights] table = "tags.csv".
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from sumizome.data.tags import TagWeightConfig

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """Show a manifest's tags and their loss weights."""

    manifest: Positional[Path]
    """the .parquet file that `sumizome ingest` wrote"""
    out: Path | None = None
    """the CSV to write: tag, category, count, weight, effective; not written over without --replace"""
    replace: bool = False
    """write over the file at --out, which you may have edited"""
    top: int = 10
    """most frequent tags shown of each category"""
    weights: TagWeightConfig = field(default_factory=TagWeightConfig)


def run(command: Command) -> None:
    """Prints categories, frequency classes and the most frequent tags; writes the table if asked to."""
    from rich.console import Console

    from sumizome.data.stored_manifest import open_manifest
    from sumizome.data.tag_codes import code_parts
    from sumizome.data.tag_table import unused_rows, with_tag_table, write_tag_table
    from sumizome.data.tags import weigh
    from sumizome.errors import ConfigError

    if command.out is not None:
        _check_out(command)
    manifest = open_manifest(command.manifest, ["repeats"])
    for source in manifest.sources:
        if command.out is not None and command.out.resolve().is_relative_to(source):
            raise ConfigError(
                f"--out {command.out} lies inside the picture folder {source}, which is never written to."
            )
    categories, given = with_tag_table(manifest.categories, command.weights.table)
    coded = code_parts(part["tags"] for part in manifest.parts(["tags"]))
    statistics = weigh(coded, manifest.column("repeats"), command.weights, categories, given).tags
    console = Console()
    _print_categories(console, statistics, command.top)
    _print_classes(console, statistics)
    for line in unused_rows(command.weights.table, given, statistics["tag"].to_pylist()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if command.weights.strength == 0 and given is None:
        console.print("weighting is off: give --weights.strength, such as 0.5, to see its effect", highlight=False)
    if command.out is not None:
        write_tag_table(statistics, command.out)
        console.print(f"wrote {command.out}", markup=False, highlight=False, soft_wrap=True)


def _check_out(command: Command) -> None:
    from sumizome.errors import ConfigError

    assert command.out is not None
    if command.out.suffix != ".csv" or command.out.is_dir():
        raise ConfigError(f"--out: expected the path of a .csv file to write, found {command.out}.")
    if command.out.exists() and not command.replace:
        raise ConfigError(f"--out: {command.out} is there already, perhaps edited; give another name, or --replace.")


def _print_categories(console: "Console", statistics: "pa.Table", top: int) -> None:
    import pyarrow.compute as pc
    from rich.markup import escape
    from rich.table import Table

    from sumizome.data.listing import printable

    table = Table("category", "tags", "shown", "most frequent", box=None, padding=(0, 2, 0, 0))
    for category in sorted(statistics["category"].unique().to_pylist()):
        mine = statistics.filter(pc.equal(statistics["category"], category))
        common = ", ".join(f"{row['tag']} {row['count']:,}" for row in mine.slice(0, top).to_pylist())
        shown = pc.sum(mine["count"]).as_py()
        table.add_row(escape(printable(category)), f"{len(mine):,}", f"{shown:,}", escape(printable(common)))
    console.print(table, highlight=False)


def _print_classes(console: "Console", statistics: "pa.Table") -> None:
    from rich.table import Table

    from sumizome.data.tag_table import frequency_classes

    table = Table("shown an epoch", "tags", "share", "with weights", "mean weight", box=None, padding=(0, 2, 0, 0))
    for each in frequency_classes(statistics):
        span = f"{each.least:,} to {each.least * 10 - 1:,}"
        shares = f"{each.share:.2%}", f"{each.effective_share:.2%}"
        table.add_row(span, f"{each.tags:,}", *shares, f"{each.ratio:.3f}")
    console.print("\nfrequency of tags, and as training feels it:", highlight=False)
    console.print(table, highlight=False)
