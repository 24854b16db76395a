"""What is not in the manifest, or is in it twice: rejects by reason, groups of copies, each with a few examples.

Owns the reading of the two tables beside a manifest, line by line: they may be as long as the manifest. Which file a
line names is text here; `gallery` decides what may be opened.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sumizome.data.csv_table import unguard
from sumizome.data.ingest_tables import COPY_COLUMNS, copies_path, rejects_path
from sumizome.data.reject_table import RejectLine, read_rejects
from sumizome.errors import DataError
from sumizome.report.gallery import Place

__all__ = ["Copies", "CopyGroup", "Reason", "by_reason", "describe_copies", "describe_rejects"]

_EXAMPLES = 8
"""of each reason"""
_GROUPS = 12
_MEMBERS = 4
"""copies shown of a group"""


@dataclass
class Reason:
    """Rejects of one reason."""

    name: str
    count: int = 0
    examples: list[RejectLine] = field(default_factory=list)
    """the first of them"""


def describe_rejects(manifest_path: Path) -> list[Reason] | None:
    """The rejects of ingest, the most frequent reason first; None without a table.

    Raises: DataError: a table that is none.
    """
    path = rejects_path(manifest_path)
    return by_reason(read_rejects(path)) if path.is_file() else None


def by_reason(lines: Iterable[RejectLine]) -> list[Reason]:
    """Counts and the first examples, the most frequent reason first."""
    found: dict[str, Reason] = {}
    for line in lines:
        reason = found.setdefault(line.reason, Reason(line.reason))
        reason.count += 1
        if len(reason.examples) < _EXAMPLES:
            reason.examples.append(line)
    return sorted(found.values(), key=lambda reason: (-reason.count, reason.name))


@dataclass
class CopyGroup:
    """A picture and its copies."""

    kept: Place
    members: list[tuple[Place, str, int, bool]] = field(default_factory=list)
    """(where, exact or near, bits of distance, dropped) of the first of them"""
    count: int = 0


@dataclass
class Copies:
    """What .duplicates.csv lists."""

    groups: int = 0
    exact: int = 0
    near: int = 0
    dropped: int = 0
    examples: list[CopyGroup] = field(default_factory=list)
    """the largest of the first groups"""

    @property
    def left(self) -> int:
        """copies that are in the manifest"""
        return self.exact + self.near - self.dropped


def describe_copies(manifest_path: Path) -> Copies | None:
    """Groups of pictures that are there more than once; None without a table.

    Raises: DataError: a table that is none.
    """
    path = copies_path(manifest_path)
    if not path.is_file():
        return None
    copies, groups = Copies(), dict[Place, CopyGroup]()
    for source, picture, kind, distance, kept_source, kept_path, dropped in _read(path):
        group = groups.setdefault((kept_source, kept_path), CopyGroup((kept_source, kept_path)))
        group.count += 1
        copies.exact += kind == "exact"
        copies.near += kind == "near"
        copies.dropped += dropped == "True"
        if len(group.members) < _MEMBERS and len(groups) <= 50 * _GROUPS:  # memory for those that may be shown
            group.members.append(((source, picture), kind, int(distance), dropped == "True"))
    copies.groups = len(groups)
    shown = [group for group in groups.values() if group.members]
    copies.examples = sorted(shown, key=lambda group: -group.count)[:_GROUPS]
    return copies


def _read(path: Path) -> Iterable[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            if (header := tuple(next(rows, ()))) != COPY_COLUMNS:
                raise DataError(f"expected the columns {', '.join(COPY_COLUMNS)} in {path}, found {', '.join(header)}.")
            for row in rows:
                if len(row) != len(COPY_COLUMNS) or not row[3].isdecimal():
                    raise DataError(f"{path}, line {rows.line_num}: expected a duplicate, found another line.")
                yield [unguard(cell) for cell in row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"expected a table of duplicates as a CSV, found {path} unreadable: {error}.") from error
