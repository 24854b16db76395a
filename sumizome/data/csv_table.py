"""CSV files that people open in a spreadsheet: written so that no cell runs, read back to the last sign.

Owns the guard of cells. Invariant: `unguard(guard(text)) == text` for every text, and no guarded cell begins as a
formula does.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from sumizome.files import write_atomically

__all__ = ["guard", "unguard", "write_csv"]

_GUARDED = tuple("=+-@\t\r\n'")
"""a cell that begins so stands behind an apostrophe, which makes it text; one that begins with an apostrophe, too, so
that reading can take one off"""


def guard(text: str) -> str:
    return "'" + text if text.startswith(_GUARDED) else text


def unguard(text: str) -> str:
    return text.removeprefix("'")


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
