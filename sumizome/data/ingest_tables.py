"""The tables that ingest writes beside a manifest, and where each lies.

Owns their names and columns; the rejects' own format is `reject_table`'s. Invariant: a path in them is text for people,
guarded against spreadsheets that would take it for a formula.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sumizome.data.csv_table import write_csv
from sumizome.data.listing import printable

__all__ = [
    "COPY_COLUMNS",
    "CopyLine",
    "MismatchLine",
    "copies_path",
    "journal_path",
    "mismatches_path",
    "rejects_path",
    "write_copies",
    "write_mismatches",
]


def rejects_path(manifest_path: Path) -> Path:
    """Where the rejects of a manifest are written: `a/manifest.parquet` → `a/manifest.rejects.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.rejects.csv")


def copies_path(manifest_path: Path) -> Path:
    """Where its duplicates are listed: `a/manifest.parquet` → `a/manifest.duplicates.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.duplicates.csv")


def mismatches_path(manifest_path: Path) -> Path:
    """Where pictures are listed that are not what their records say: `a/manifest.mismatches.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.mismatches.csv")


def journal_path(manifest_path: Path) -> Path:
    """Where a manifest's journal of decoding is kept: `a/manifest.parquet` → `a/manifest.decoded`."""
    return manifest_path.with_name(f"{manifest_path.stem}.decoded")


class MismatchLine(NamedTuple):
    """A picture that is not what its record says, as .mismatches.csv has it."""

    source: int
    path: str
    told: str
    found: str


class CopyLine(NamedTuple):
    """A picture that is there more than once, as .duplicates.csv has it."""

    source: int
    path: str
    kind: str
    """exact or near"""
    distance: int
    """bits in which the perceptual hashes differ"""
    kept_source: int
    kept_path: str
    dropped: bool


COPY_COLUMNS = ("source", "path", "kind", "distance", "kept_source", "kept_path", "dropped")
"""of .duplicates.csv"""


def write_copies(path: Path, copies: Iterable[CopyLine], sources: Sequence[Path]) -> None:
    """Raises: DataError if the disk refuses."""
    roots = [printable(str(root)) for root in sources]
    lines = ((roots[source], *middle, roots[kept], path, dropped) for source, *middle, kept, path, dropped in copies)
    write_csv(path, COPY_COLUMNS, lines)


def write_mismatches(path: Path, mismatches: Iterable[MismatchLine], sources: Sequence[Path]) -> None:
    """Raises: DataError if the disk refuses."""
    roots = [str(root) for root in sources]
    write_csv(path, ["source", "path", "record", "file"], ((roots[source], *texts) for source, *texts in mismatches))
