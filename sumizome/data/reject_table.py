"""The table of rejects: every file that was left out, with one reason, as a CSV beside what was made of the others.

Owns the file, which `ingest` and `prepare` write and people and the report read. Invariant: what is read back is what
was written; paths in it are text for people, and whoever opens one checks first that it stays below its source.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sumizome.data.csv_table import unguard, write_csv
from sumizome.data.listing import printable
from sumizome.data.tasks import Reject
from sumizome.errors import DataError

__all__ = ["RejectLine", "read_rejects", "write_rejects"]

_COLUMNS = ("source", "path", "reason", "sentence")


class RejectLine(NamedTuple):
    """A line of the file."""

    source: str
    """the folder, absolute"""
    path: str
    """posix, relative to its source, printable"""
    reason: str
    sentence: str


def write_rejects(path: Path, rejects: Iterable[Reject], sources: Sequence[Path]) -> None:
    """Writes the rejects in their order; `sources` are the folders that they point into.

    Raises: DataError if the disk refuses.
    """
    write_csv(
        path,
        _COLUMNS,
        ([printable(text) for text in (str(sources[source]), *texts)] for source, *texts in rejects),
    )


def read_rejects(path: Path) -> Iterator[RejectLine]:
    """The lines of a table of rejects, one at a time: it may be as long as the manifest.

    Raises: DataError: missing, of other columns, damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            if (header := tuple(next(rows, ()))) != _COLUMNS:
                raise DataError(f"expected the columns {', '.join(_COLUMNS)} in {path}, found {', '.join(header)}.")
            for row in rows:
                if len(row) != len(_COLUMNS):
                    raise DataError(f"{path}, line {rows.line_num}: expected {len(_COLUMNS)} cells, found {len(row)}.")
                yield RejectLine(*map(unguard, row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"expected a table of rejects as a CSV, found {path} unreadable: {error}.") from error
