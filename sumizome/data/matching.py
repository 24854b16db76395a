"""Which record belongs to which picture: booru dumps, gallery-dl's sidecars, kohya's metadata JSON.

Owns the conventions of naming; reads records through `records`. Invariant: a name in a record only ever selects one of
the files that were listed below the source; it is compared, never opened.
"""

import json
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sumizome.data.images import ImageRejected
from sumizome.data.records import Record, Row, build_record, parse_object, read_rows, row_keys
from sumizome.data.source_config import Columns, SourceKind
from sumizome.errors import ConfigError, DataError

__all__ = ["SIDECAR_SUFFIX", "Matches", "match_records"]

SIDECAR_SUFFIX = ".json"
MAX_SIDECAR_BYTES = 4 * 2**20
MAX_METADATA_BYTES = 2**30


@dataclass
class Matches:
    """The pictures' records, and what was wrong with the others."""

    records: dict[str, Record] = field(default_factory=dict)
    """picture's path → its record"""
    rejects: list[tuple[str, ImageRejected]] = field(default_factory=list)
    """(where, why)"""
    failed: dict[str, ImageRejected] = field(default_factory=dict)
    """picture's path → why its record cannot be used"""
    unused: int = 0
    """records of pictures that are not there"""

    def add(self, paths: Sequence[str], row: Row, columns: Columns, where: str) -> None:
        """Gives the row's record to the pictures at `paths`; the first record that names a picture is the picture's."""
        self.unused += not paths
        for path in paths:
            if path in self.records or path in self.failed:
                self.reject(where, "record_twice", f"expected one record for {path}, found two: the first is used.")
                return
        try:
            record = build_record(row, columns, where) if paths else None
        except ImageRejected as error:
            self.failed |= dict.fromkeys(paths, error)
            return
        if record is not None:
            self.records |= dict.fromkeys(paths, record)

    def reject(self, where: str, reason: str, sentence: str) -> None:
        self.rejects.append((where, ImageRejected(reason, sentence)))


def match_records(
    kind: SourceKind,
    pictures: Sequence[str],
    files: set[str],
    *,
    root: Path,
    table: Path | None,
    columns: Columns,
    check: Callable[[str], None],
) -> Matches:
    """The records of `pictures` (relative paths, sorted). `check` refuses sidecars that links lead out of the source.

    Raises: ConfigError, DataError: a table that is not there or cannot be read.
    """
    if kind == "gallery-dl":
        return _match_sidecars(pictures, files, root, columns, check)
    if table is None:
        raise ConfigError(f"records: expected the file of records of the {kind} source {root}, found none given.")
    return _match_kohya(pictures, root, table, columns) if kind == "kohya" else _match_table(pictures, table, columns)


def _match_table(pictures: Sequence[str], table: Path, columns: Columns) -> Matches:
    """By path where a row has one, else by files called after the id or the md5, in whatever folder."""
    by_stem, present, matches = _by_stem(pictures), frozenset(pictures), Matches()
    for where, row in read_rows(table, columns, by_stem.keys()):
        if isinstance(row, ImageRejected):
            matches.rejects.append((where, row))
            continue
        if isinstance(row, int):
            matches.unused += row
            continue
        file, stems = row_keys(row, columns)
        path = posixpath.normpath(file.replace("\\", "/")) if file else None
        if path is not None and path in present:
            found = [path]
        else:
            found = sorted({each for stem in stems for each in by_stem.get(stem, ())})
        matches.add(found, row, columns, where)
    return matches


def _match_sidecars(
    pictures: Sequence[str], files: set[str], root: Path, columns: Columns, check: Callable[[str], None]
) -> Matches:
    matches = Matches()
    for path in pictures:
        sidecar = path + SIDECAR_SUFFIX
        if sidecar not in files:
            continue
        try:
            check(sidecar)
            row = parse_object(_read_text(root / sidecar, MAX_SIDECAR_BYTES))
            if isinstance(row, ImageRejected):
                raise row
            matches.add([path], row, columns, sidecar)
        except ImageRejected as error:
            matches.failed[path] = error
    return matches


def _match_kohya(pictures: Sequence[str], root: Path, table: Path, columns: Columns) -> Matches:
    """By path (absolute, or below the source), with or without suffix, else by the file's name alone."""
    columns = replace(columns, separator=columns.separator or ",")
    by_stem, by_path = _by_stem(pictures), defaultdict(list)
    for picture in pictures:
        for key in (picture, posixpath.splitext(picture)[0]):
            by_path[key].append(picture)
    matches = Matches()
    for name, row in _kohya_rows(table):
        path = posixpath.normpath(name.replace("\\", "/")).removeprefix(f"{root.as_posix()}/")
        base = posixpath.basename(path)
        found = by_path.get(path) or by_stem.get(base) or by_stem.get(posixpath.splitext(base)[0], [])
        where = f"{table.name}:{name}"
        if isinstance(row, dict):
            matches.add(found, row, columns, where)
        else:
            matches.reject(where, "record_invalid", "expected an object with tags or caption, found something else.")
    return matches


def _kohya_rows(table: Path) -> Iterator[tuple[str, Any]]:
    if not table.is_file():
        raise ConfigError(f"records: expected kohya's metadata JSON, found no file at {table}.")
    try:
        content = json.loads(_read_text(table, MAX_METADATA_BYTES))
    except (ImageRejected, ValueError, RecursionError) as error:
        raise DataError(f"expected kohya's metadata JSON at {table}, found: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"expected a JSON object of pictures at {table}, found {type(content).__name__}.")
    yield from content.items()


def _by_stem(pictures: Sequence[str]) -> dict[str, list[str]]:
    """File name without suffix → pictures called so. In lower case too: an md5 may be written either way."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in pictures:
        stem = posixpath.splitext(posixpath.basename(path))[0]
        for key in {stem, stem.lower()}:
            found[key].append(path)
    return found


def _read_text(path: Path, limit: int) -> str:
    try:
        if not path.is_file():
            raise ImageRejected("record_invalid", "expected a regular file, found something else.")
        if (size := path.stat().st_size) > limit:
            raise ImageRejected("record_invalid", f"expected at most {limit >> 20} MB of JSON, found {size >> 20} MB.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageRejected("record_invalid", f"expected readable JSON in UTF-8, found {error}.") from error
