"""Which record belongs to which picture: dumps, sidecars, kohya's JSON, JSON in tars.

Owns the conventions of naming and the records as columns; reads them through `records`. Invariant: a name in a record
only ever selects one of the pictures that were listed; it is compared, never opened.
"""

import json
import multiprocessing
import posixpath
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sumizome.data.byte_range import ByteRange
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.picture_list import NameIndex, Namesakes, PictureList, Strings, path_names, stem, stem_names
from sumizome.data.records import Record, Row, build_record, parse_object, read_rows, row_keys
from sumizome.data.rules import check_rating
from sumizome.data.source_config import Columns, PictureRules
from sumizome.errors import ConfigError, DataError
from sumizome.interrupts import ignore_interrupts, interrupts_held

__all__ = ["SIDECAR_SUFFIX", "Matches", "match_kohya", "match_objects", "match_table"]

SIDECAR_SUFFIX = ".json"
MAX_SIDECAR_BYTES = 4 * 2**20
MAX_METADATA_BYTES = 2**30

Fault: TypeAlias = tuple[str, str]
"""(reason, sentence)"""


class Matches:
    """The pictures' records as columns, and what was wrong with the others."""

    def __init__(self, count: int, rules: PictureRules) -> None:
        self._rules = rules
        self.place = np.full(count, -1, np.int64)
        """picture → row of the columns; -1 where it has no record"""
        self.failed: dict[int, Fault] = {}
        """picture → why its record cannot be used, or why it is not wanted"""
        self.rejects: list[tuple[str, str, str]] = []
        """(where, reason, sentence) of records that belong to no picture or to one that has another"""
        self.unused = 0
        """records of pictures that are not there"""
        self.categories: Counter[tuple[str, str]] = Counter()
        """(tag, category) → wanted records that say so"""
        self.texts, self.md5s, self.file_exts, self.ratings = Strings(), Strings(), Strings(), Strings()
        self.scores, self.years = array("d"), array("h")
        self.heights, self.widths = array("i"), array("i")
        self._known: dict[Fault, Fault] = {}

    def add(self, pictures: Sequence[int], row: Row, columns: Columns, where: str) -> None:
        """Gives the row's record to the pictures; the first record that names a picture is the picture's."""
        if self._is_free(pictures, where):
            try:
                self._store(pictures, build_record(row, columns, where))
            except ImageRejected as error:
                self.fail(pictures, error)

    def add_outcome(self, picture: int, outcome: Record | ImageRejected) -> None:
        """Gives the picture a record that was built elsewhere, or says why there is none."""
        try:
            if isinstance(outcome, ImageRejected):
                raise outcome
            self._store([picture], outcome)
        except ImageRejected as error:
            self.fail([picture], error)

    def _is_free(self, pictures: Sequence[int], where: str) -> bool:
        self.unused += not pictures
        if any(self.place[each] >= 0 or each in self.failed for each in pictures):
            self.reject(where, "record_twice", "expected one record for a picture, found two: the first is used.")
            return False
        return bool(pictures)

    def _store(self, pictures: Sequence[int], record: Record) -> None:
        check_rating(record, self._rules)
        self.place[pictures] = len(self.scores)
        for _ in pictures:
            self.categories.update(record.categories)
        self.texts.append(record.text)
        self.md5s.append(record.md5)
        self.file_exts.append(record.file_ext)
        self.ratings.append(record.rating or "")
        self.scores.append(np.nan if record.score is None else record.score)
        self.years.append(record.year or 0)
        self.heights.append(record.height)
        self.widths.append(record.width)

    def fail(self, pictures: Iterable[int], error: ImageRejected) -> None:
        fault = self._known.setdefault(
            (error.reason, str(error)), (error.reason, str(error))
        )  # a few, millions of times
        self.failed |= dict.fromkeys(pictures, fault)

    def reject(self, where: str, reason: str, sentence: str) -> None:
        self.rejects.append((where, reason, sentence))


def match_table(matches: Matches, pictures: PictureList, table: Path, columns: Columns) -> None:
    """By path where a row has one, else by files called after the id or the md5, in whatever folder or tar.

    Raises: ConfigError, DataError: a table that is not there or cannot be read.
    """
    stems = NameIndex(pictures, stem_names)
    paths: NameIndex | None = None
    rows = read_rows(table, columns, stems.may_hold)
    while batch := [(where, *_with_keys(row, columns)) for where, row in islice(rows, 1024)]:
        names = [_normal(file) for _, _, file, _ in batch]
        if paths is None and any(names):
            paths = NameIndex(pictures, path_names)
        by_path = paths.find(names) if paths is not None else [[] for _ in names]
        flat = [(at, name) for at, (*_, group) in enumerate(batch) for name in group if not by_path[at]]
        found: list[set[int]] = [set(places) for places in by_path]
        for (at, _), places in zip(flat, stems.find([name for _, name in flat]), strict=True):
            found[at].update(places)
        for (where, row, *_), mine in zip(batch, found, strict=True):
            if isinstance(row, ImageRejected):
                matches.reject(where, row.reason, str(row))
            elif isinstance(row, int):
                matches.unused += row
            else:
                matches.add(sorted(mine), row, columns, where)


def _with_keys(
    row: Row | ImageRejected | int, columns: Columns
) -> tuple[Row | ImageRejected | int, str | None, set[str]]:
    """A row of a table, or what is wrong with it, and the names of its picture (`row_keys`)."""
    if isinstance(row, ImageRejected | int):
        return row, None, set()
    try:
        return row, *row_keys(row, columns)
    except ImageRejected as error:
        return error, None, set()


def _normal(file: str | None) -> str | None:
    return posixpath.normpath(file.replace("\\", "/")) if file else None


# --- one JSON object for each picture: sidecars, members of tars ------------------------------------------------------

_CHUNK = 256
_FEW = 4 * _CHUNK
"""objects that are read sooner than processes start"""


def match_objects(
    matches: Matches, objects: Iterable[tuple[int, Path | ByteRange, str]], columns: Columns, workers: int
) -> None:
    """The records in JSON files or members, given as (picture, where to read it, its name), by `workers` processes."""
    source = iter(objects)
    first = list(islice(source, _FEW))
    if workers < 2 or len(first) < _FEW:
        for picture, place, where in chain(first, source):
            matches.add_outcome(picture, _read_object(place, where, columns))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locked locks of Arrow's threads
    with ProcessPoolExecutor(workers, context, initializer=ignore_interrupts) as pool:
        waiting: deque[tuple[list[int], Future[list[Record | ImageRejected]]]] = deque()
        for chunk in _chunks(first, source):
            places = [(place, where) for _, place, where in chunk]
            with interrupts_held():  # it may start a worker
                coming = pool.submit(_read_objects, places, columns)
            waiting.append(([picture for picture, _, _ in chunk], coming))
            if len(waiting) > 4 * workers:  # bounded, and in order
                _take(matches, *waiting.popleft())
        while waiting:
            _take(matches, *waiting.popleft())


def _chunks(first: list[Any], rest: Iterator[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(first), _CHUNK):
        yield first[start : start + _CHUNK]
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def _take(matches: Matches, pictures: list[int], future: "Future[list[Record | ImageRejected]]") -> None:
    for picture, outcome in zip(pictures, future.result(), strict=True):
        matches.add_outcome(picture, outcome)


def _read_objects(places: Sequence[tuple[Path | ByteRange, str]], columns: Columns) -> list[Record | ImageRejected]:
    return [_read_object(place, where, columns) for place, where in places]


def _read_object(place: Path | ByteRange, where: str, columns: Columns) -> Record | ImageRejected:
    try:
        row = parse_object(_read_text(place, MAX_SIDECAR_BYTES))
        return row if isinstance(row, ImageRejected) else build_record(row, columns, where)
    except ImageRejected as error:
        return error


# --- kohya ------------------------------------------------------------------------------------------------------------


def match_kohya(matches: Matches, pictures: PictureList, root: Path, table: Path, columns: Columns) -> None:
    """By path (absolute, or below the source), with or without suffix, else by the file's name alone: of several
    pictures of that name (`001.png` in every folder) the one whose folders end as the record's do.

    Raises: ConfigError, DataError: JSON that is not there or cannot be read.
    """
    columns = replace(columns, separator=columns.separator or ",")
    paths = NameIndex(pictures, lambda path: {path, stem(path)})
    bare = _BareNames(pictures)
    rows = _kohya_rows(table)
    while batch := list(islice(rows, 1024)):
        names = [posixpath.normpath(name.replace("\\", "/")).removeprefix(f"{root.as_posix()}/") for name, _ in batch]
        with_path = paths.find(names)
        # Only of the others: a name such as 001.png may be in every folder, and all of these would be looked at.
        by_name = iter(bare.find([name for name, places in zip(names, with_path, strict=True) if not places]))
        for (name, row), by_path in zip(batch, with_path, strict=True):
            places, count = (_one_picture(pictures, by_path), len(by_path)) if by_path else next(by_name)
            where = f"{table.name}:{name}"
            if not isinstance(row, dict):
                matches.reject(
                    where, "record_invalid", "expected an object with tags or caption, found something else."
                )
            elif count and not places:
                sentence = f"expected one picture of this name, found {count}: name them with their folders."
                matches.reject(where, "record_ambiguous", sentence)
            else:
                matches.add(places, row, columns, where)


def _one_picture(pictures: PictureList, places: list[int]) -> list[int]:
    """The places if they are files of one picture, which differ in their suffix."""
    return places if len(places) < 2 or len({stem(pictures.path(place)) for place in places}) == 1 else []


class _BareNames:
    """The pictures by their file's name alone, with or without its suffix."""

    def __init__(self, pictures: PictureList) -> None:
        self._pictures, self._stems = pictures, NameIndex(pictures, stem_names)
        self._namesakes: dict[str, Namesakes] = {}

    def find(self, names: Sequence[str]) -> list[tuple[list[int], int]]:
        """Of each name as `Namesakes.nearest`."""
        bases = [posixpath.basename(name) for name in names]
        wanted = dict.fromkeys([*bases, *map(stem, bases)]).keys() - self._namesakes.keys()
        single: dict[str, list[int]] = {}
        for base, places in zip(wanted, self._stems.find(list(wanted)), strict=True):
            if len(places) > 1:
                self._namesakes[base] = Namesakes(self._pictures, places)
            elif places:
                single[base] = places
        return [self._find(name, base, single) for name, base in zip(names, bases, strict=True)]

    def _find(self, name: str, base: str, single: Mapping[str, list[int]]) -> tuple[list[int], int]:
        for each in (base, stem(base)):
            if namesakes := self._namesakes.get(each):
                return namesakes.nearest(name)
            if each in single:
                return single[each], 1
        return [], 0


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


def _read_text(place: Path | ByteRange, limit: int) -> str:
    try:
        if isinstance(place, Path) and not place.is_file():
            raise ImageRejected("record_invalid", "expected a regular file, found something else.")
        size = place.stat().st_size if isinstance(place, Path) else place.size
        if size > limit:
            raise ImageRejected("record_invalid", f"expected at most {limit >> 20} MB of JSON, found {size >> 20} MB.")
        data = place.read_bytes() if isinstance(place, Path) else place.read()
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageRejected("record_invalid", f"expected readable JSON in UTF-8, found {error}.") from error
