"""CSV files that people open in a spreadsheet: written so that no cell runs, read back to the last sign.

Owns the guard of cells and the reading of rows by column. Invariant: `unguard(guard(text)) == text` for every text, and
no guarded cell begins as a formula does.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from sumizome.errors import DataError
from sumizome.files import write_atomically

__all__ = ["check_columns", "guard", "read_csv", "unguard", "write_csv"]

_GUARDED = tuple("=+-@\t\r\n'")
"""a cell that begins so stands behind an apostrophe, which makes it text; one that begins with an apostrophe, too, so
that reading can take one off"""


def guard(text: str) -> str:
    return "'" + text if text.startswith(_GUARDED) else text


def unguard(text: str) -> str:
    return text.removeprefix("'")


def read_csv(lines: Iterable[str], path: Path) -> "csv.DictReader[str]":
    """The rows of the CSV at `path`, whose first line names the columns.

    Raises: DataError if a column is there twice; csv.Error.
    """
    rows = csv.DictReader(lines)
    check_columns(rows.fieldnames or (), path)
    return rows


def check_columns(names: Sequence[str], path: Path) -> None:
    """Raises: DataError if two columns have one name, as nobody can know which is meant. Nameless ones may be many."""
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            raise DataError(f"expected each column once in {path}, found {name!r} twice: rename one, or take it out.")
        seen.add(name)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Writes all rows or nothing; texts are guarded, numbers stand as `str` has them.

    Raises: DataError if the disk refuses.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([guard(each) if isinstance(each, str) else each for each in row] for row in rows)

    write_atomically(path, write)
