"""The pictures that a source lists, as columns: six million of them are a few arrays, not six million objects.

Owns the columns, their order by path, and the search for pictures by name. Opens nothing. Invariant: after `close`,
place k is the k-th path in the order of code points, whatever order the disk gave. A name that is looked up is compared
with names that were listed; it is never a path.
"""

import posixpath
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["BLOCK", "NameIndex", "Namesakes", "Picture", "PictureList", "Strings", "path_names", "stem", "stem_names"]

BLOCK = 65_536
"""rows that become Python objects at a time"""


class Strings:
    """Text by text into Arrow, without keeping them as objects."""

    def __init__(self) -> None:
        self._waiting: list[str | None] = []
        self._chunks: list[pa.Array] = []

    def append(self, text: str | None) -> None:
        self._waiting.append(text)
        if len(self._waiting) == BLOCK:
            self._flush()

    def _flush(self) -> None:
        self._chunks.append(pa.array(self._waiting, pa.large_string()))  # large: six million captions exceed 2 GB
        self._waiting.clear()

    def close(self) -> pa.ChunkedArray:
        self._flush()
        return pa.chunked_array(self._chunks, pa.large_string())


class Picture(NamedTuple):
    """One row of the list."""

    path: str
    """posix, below the source; of a member of a tar `archive/member`"""
    size: int
    """bytes; -1 where the system would not say"""
    mtime_ns: int
    """of the file, or of the tar that it is in"""
    sidecar: str = ""
    """suffix that takes the place of the picture's own, or follows it (`.json`), in the name of its caption file"""
    archive: int = -1
    """place of its tar in `PictureList.archives`"""
    offset: int = -1
    """of its bytes in the tar"""
    text: tuple[int, int] = (-1, 0)
    """(offset, size) of its caption in the tar"""
    record: tuple[int, int] = (-1, 0)
    """(offset, size) of its JSON in the tar"""
    repeats: int = 1


_NUMBERS = ("size", "mtime_ns", "sidecar", "archive", "offset", "text_at", "text_size", "record_at", "record_size")


class PictureList:
    """Filled by `add`, read after `close`."""

    def __init__(self) -> None:
        self.archives: list[str] = []
        """tars, relative to the source; "" where the source itself is one"""
        self._suffixes: list[str] = [""]
        self._paths = Strings()
        self._columns = {name: array("q") for name in (*_NUMBERS, "repeats")}
        self.paths: pa.ChunkedArray = pa.chunked_array([], pa.large_string())
        self.columns: dict[str, NDArray[np.int64]] = {}
        self.added = 0

    def add(self, picture: Picture) -> None:
        if picture.sidecar not in self._suffixes:
            self._suffixes.append(picture.sidecar)
        self.added += 1
        self._paths.append(picture.path)
        values = (
            picture.size,
            picture.mtime_ns,
            self._suffixes.index(picture.sidecar),
            picture.archive,
            picture.offset,
            *picture.text,
            *picture.record,
            picture.repeats,
        )
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def close(self) -> None:
        paths = self._paths.close()
        order = pc.sort_indices(paths)  # by UTF-8 bytes, which is by code points
        self.paths = paths.take(order).combine_chunks()
        if isinstance(self.paths, pa.Array):
            self.paths = pa.chunked_array([self.paths])
        places = order.to_numpy()
        for name in list(self._columns):  # one at a time, so that none is held twice for long
            self.columns[name] = np.frombuffer(self._columns.pop(name), np.int64)[places]

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, places: NDArray[np.int64]) -> Iterator[Picture]:
        """The pictures at some places, in that order."""
        paths = self.paths.take(pa.array(places)).to_pylist()
        lists = [self.columns[name][places].tolist() for name in (*_NUMBERS, "repeats")]
        for path, size, mtime, sidecar, archive, offset, *ranges, repeats in zip(paths, *lists, strict=True):
            text, record = (ranges[0], ranges[1]), (ranges[2], ranges[3])
            yield Picture(path, size, mtime, self._suffixes[sidecar], archive, offset, text, record, repeats)

    def path(self, place: int) -> str:
        return str(self.paths[place].as_py())


# --- by name ----------------------------------------------------------------------------------------------------------


class NameIndex:
    """Names of the listed pictures → their places. Sixteen bytes a name: sorted hashes; a hit is compared in full."""

    def __init__(self, pictures: PictureList, names: Callable[[str], Iterable[str]]) -> None:
        self._pictures, self._names = pictures, names
        hashes, places = array("q"), array("q")
        for start in range(0, len(pictures), BLOCK):
            for place, path in enumerate(pictures.paths.slice(start, BLOCK).to_pylist(), start):
                for name in names(path):
                    hashes.append(hash(name))
                    places.append(place)
        unsorted = np.frombuffer(hashes, np.int64) if hashes else np.empty(0, np.int64)
        order = np.argsort(unsorted, kind="stable")
        self._hashes = unsorted[order]
        self._places = (np.frombuffer(places, np.int64) if places else np.empty(0, np.int64))[order]

    def may_hold(self, names: Sequence[str | None]) -> NDArray[np.bool_]:
        """bool [names]: False where no picture is called so. (True for another name in one of 10¹⁹ cases.)"""
        first, last = self._bounds(names)
        found: NDArray[np.bool_] = (last > first) & np.array([name is not None for name in names], bool)
        return found

    def find(self, names: Sequence[str | None]) -> list[list[int]]:
        """The places of the pictures of each name, rising."""
        first, last = self._bounds(names)
        found: list[list[int]] = [[] for _ in names]
        for at in np.flatnonzero(last > first).tolist():
            name, places = names[at], self._places[first[at] : last[at]].tolist()
            if name is not None:
                found[at] = [place for place in places if name in self._names(self._pictures.path(place))]
        return found

    def _bounds(self, names: Sequence[str | None]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        hashes = np.fromiter((hash(name) for name in names), np.int64, len(names))
        return np.searchsorted(self._hashes, hashes, "left"), np.searchsorted(self._hashes, hashes, "right")


class Namesakes:
    """Pictures of one name in many folders, sorted by their folders from the file upwards: `001.png` of all series.

    A search takes the logarithm of their number, where comparing with each would be quadratic over all records.
    """

    def __init__(self, pictures: PictureList, places: Iterable[int]) -> None:
        rows = sorted((_upwards(stem(pictures.path(place))), place) for place in places)
        self._keys, self._places = [key for key, _ in rows], [place for _, place in rows]

    def nearest(self, path: str) -> tuple[list[int], int]:
        """(places, rising, of the picture with the most folders in common with `path`, how many files have as many).

        A picture may have several files, which differ in their suffix; of several pictures no place is told.
        """
        folders = _upwards(path).rpartition("/")[0] + "/" if "/" in path else ""
        at = bisect_left(self._keys, folders)
        # Of sorted texts the neighbours have the most in common with it.
        shared = max((_shared(folders, key) for key in self._keys[max(0, at - 1) : at + 1]), key=len)
        first, last = bisect_left(self._keys, shared), bisect_left(self._keys, shared + _LAST)
        is_one = self._keys[first] == self._keys[last - 1]
        return sorted(self._places[first:last]) if is_one else [], last - first


_LAST = "\U0010ffff"
"""sorts behind all that a name may hold"""


def _upwards(path: str) -> str:
    """`a/b/c` as `b/a/c`: the folders from the file upwards, then the file's name."""
    *folders, name = path.split("/")
    return "/".join([*reversed(folders), name])


def _shared(folders: str, key: str) -> str:
    """The folders, each with its slash, that both begin with."""
    pairs = zip(folders.split("/")[:-1], key.split("/")[:-1], strict=False)
    return "".join(f"{one}/" for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def path_names(path: str) -> tuple[str, ...]:
    return (path,)


def stem_names(path: str) -> set[str]:
    """The file's name without its suffix; in lower case too: an md5 may be written either way."""
    name = stem(posixpath.basename(path))
    return {name, name.lower()}
