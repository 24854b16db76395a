"""What a source holds: which files are pictures, where each one's caption or record stands, how often it repeats.

Owns the kinds of source and what is refused by name or record alone; opens no picture. What lies in a folder is
`listing`'s, in a tar `tar_source`'s; records are `matching`'s, what they lead to is `rules`'. Invariant: a scan follows
from the names and the metadata, not from the order in which the disk lists them; every picture in it is either a task
or a reject; and it holds columns, of which a window at a time becomes `ImageTask`s.
"""

import hashlib
import posixpath
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sumizome.data.byte_range import ByteRange
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.listing import CAPTION_SUFFIXES, Listing, check_link, list_folder, printable
from sumizome.data.matching import SIDECAR_SUFFIX, Matches, match_kohya, match_objects, match_table
from sumizome.data.metadata_files import match_metadata
from sumizome.data.picture_list import BLOCK, Picture, PictureList, stem
from sumizome.data.rules import DerivedTags, derive_tags
from sumizome.data.source_config import MAX_REPEATS, SourceConfig
from sumizome.data.tar_source import list_tars
from sumizome.data.tasks import MAX_CAPTION_BYTES, Claims, Entry, ImageTask, Reject

__all__ = ["SourceScan", "scan_source"]

WINDOW = 16_384
"""pictures that are objects at a time, of some 5 KB each; some minutes of decoding"""


@dataclass
class SourceScan:
    """What one source holds; pictures in the order of their paths."""

    source: int
    root: Path
    pictures: PictureList = field(default_factory=PictureList)
    places: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """the pictures that are to be decoded"""
    rejects: list[Reject] = field(default_factory=list)
    captions_doubled: int = 0
    """pictures with more than one caption"""
    files_ignored: int = 0
    """files that are neither picture nor caption"""
    repeats: dict[str, int] = field(default_factory=dict)
    """kohya folder → its repeats"""
    records_unused: int = 0
    """records of pictures that are not there"""
    categories: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(tag, category) → records that say so"""
    appended: bool = False
    factor: int = 1
    """of every picture's repeats"""
    records: "_Records | None" = None

    def reject(self, path: str, reason: str, sentence: str) -> None:
        self.rejects.append(Reject(self.source, printable(path), reason, printable(sentence)))

    def __len__(self) -> int:
        return len(self.places)

    def entries(self) -> Iterator[list[Entry]]:
        """The pictures to decode, `WINDOW` at a time."""
        for start in range(0, len(self.places), WINDOW):
            places = self.places[start : start + WINDOW]
            records = self.records.rows(places) if self.records else None
            pictures = self.pictures.rows(places)
            yield [self._entry(picture, records[at] if records else _NO_RECORD) for at, picture in enumerate(pictures)]

    def _entry(self, picture: Picture, record: "_RecordRow") -> Entry:
        repeats, text = picture.repeats * self.factor, _joined(record.text, record.derived)
        task = ImageTask(self.source, str(self.root), picture.path, repeats, None, text, record.md5)
        if picture.archive >= 0:
            archive = self.pictures.archives[picture.archive]
            task = task._replace(archive=archive, offset=picture.offset, size=picture.size)
        elif picture.sidecar and not self.appended:
            task = task._replace(sidecar=stem(picture.path) + picture.sidecar)
        stamp = _stamp(self.root, picture)
        if picture.text[0] < 0:
            return Entry(task, stamp, record.claims)
        try:
            caption = self._read_text(task, picture)  # goes before a text in the record, as elsewhere
        except ImageRejected as error:
            return Entry(task, stamp, record.claims, (error.reason, str(error)))
        return Entry(task._replace(text=_joined(caption, record.derived)), stamp, record.claims)

    def _read_text(self, task: ImageTask, picture: Picture) -> str:
        """The caption of a member of a tar."""
        offset, size = picture.text
        if size > MAX_CAPTION_BYTES:
            raise ImageRejected("caption_too_large", f"expected at most 1 MB of caption, found {size} bytes.")
        try:
            return ByteRange(self.root / (task.archive or ""), offset, size, "caption").read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ImageRejected("caption_not_utf8", f"expected a caption in UTF-8, found {error}.") from error
        except OSError as error:
            raise ImageRejected("caption_unreadable", f"cannot read the caption: {error.strerror}.") from error


_SETTLED_NS = 2 * 10**9
"""a file changed just now may change again within one tick of its file system's clock"""


def _joined(text: str | None, derived: str) -> str | None:
    return ", ".join(filter(None, [text, derived])) if text is not None or derived else None


def _stamp(root: Path, picture: Picture) -> bytes | None:
    if min(picture.size, picture.mtime_ns) < 0 or picture.mtime_ns > time.time_ns() - _SETTLED_NS:
        return None
    told = f"{root}\0{picture.path}\0{picture.size}\0{picture.mtime_ns}\0{picture.offset}"
    return hashlib.blake2b(told.encode(), digest_size=16).digest()


def scan_source(
    source: int, config: SourceConfig, workers: int = 1, told: Callable[[int], object] = lambda _: None
) -> SourceScan:
    """The pictures of a source (its folder absolute, resolved), which gets the index `source`. `told` is called now and
    then with the number of pictures found so far.

    Raises: ConfigError, DataError: records or tars that are not there, or cannot be read whole.
    """
    scan = SourceScan(source, config.folder, factor=config.repeats, appended=config.kind == "gallery-dl")
    listing = _list(scan, config, told)
    scan.pictures = listing.pictures
    scan.pictures.close()
    scan.places = np.arange(len(scan.pictures))
    _set_repeats(scan)
    if config.kind == "folder":
        _take_metadata(scan, listing, config)
    else:
        _take_records(scan, listing, config, workers)
    return scan


def _list(scan: SourceScan, config: SourceConfig, told: Callable[[int], object]) -> Listing:
    if scan.root.is_file():  # one tar
        listing = Listing(tars=[""])
    else:
        suffixes = {"folder": CAPTION_SUFFIXES, "gallery-dl": (SIDECAR_SUFFIX,)}.get(config.kind, ())
        listing = list_folder(scan.root, scan.reject, suffixes, appended=scan.appended, told=told)
    scan.captions_doubled = len(listing.doubled)
    scan.files_ignored = listing.others
    reads_metadata = config.kind in ("folder", "imagefolder")
    if not reads_metadata:
        scan.files_ignored += len(listing.metadata)
    if config.records is not None and config.records.is_relative_to(scan.root) and config.records.is_file():
        scan.files_ignored -= 1
    if config.kind == "webdataset":
        _list_tars(scan, listing, config, told)
    else:
        for tar in (*listing.tars, *listing.packed):
            scan.reject(tar, "archive", "expected pictures, found an archive; tars are read with --kind webdataset.")
    return listing


def _list_tars(scan: SourceScan, listing: Listing, config: SourceConfig, told: Callable[[int], object]) -> None:
    for packed in listing.packed:
        scan.reject(packed, "archive", "expected an uncompressed tar, found another archive: unpack it to a .tar.")
    loose, listing.pictures = listing.pictures, PictureList()
    loose.close()
    for path in loose.paths.to_pylist():
        scan.reject(path, "not_in_tar", "expected pictures in tars; give its folder as a source of its own.")
    others = list_tars(scan.root, listing.tars, listing.pictures, scan.reject, config.damaged_tars, told)
    scan.files_ignored += others


def _take_metadata(scan: SourceScan, listing: Listing, config: SourceConfig) -> None:
    """Captions of metadata files, for pictures of a folder."""
    matches = Matches(len(scan.pictures), config.rules)
    metadata = _sound_links(scan, listing.metadata)
    match_metadata(matches, scan.pictures, scan.root, metadata, config.columns, texts=True)
    for where, reason, sentence in matches.rejects:
        scan.reject(where, reason, sentence)
    both = (matches.place >= 0) & (scan.pictures.columns["sidecar"] > 0)
    doubled = set(listing.doubled)
    also = [path for path in scan.pictures.paths.take(pa.array(np.flatnonzero(both))).to_pylist() if path in doubled]
    scan.captions_doubled += int(both.sum()) - len(also)
    if metadata:
        scan.categories = matches.categories
        scan.records = _Records(matches, None)


def _take_records(scan: SourceScan, listing: Listing, config: SourceConfig, workers: int) -> None:
    """Every picture has a record that is wanted, or is a reject; caption files are not looked at."""
    matches = Matches(len(scan.pictures), config.rules)
    required = True
    if config.kind == "gallery-dl":
        match_objects(matches, _sidecar_objects(scan), config.columns, workers)
    elif config.kind == "kohya":
        match_kohya(matches, scan.pictures, scan.root, _records_of(config), config.columns)
    elif config.kind == "imagefolder":
        metadata = _sound_links(scan, listing.metadata)
        match_metadata(matches, scan.pictures, scan.root, metadata, config.columns, texts=False)
    elif config.records is not None:
        match_table(matches, scan.pictures, config.records, config.columns)
    else:
        match_objects(matches, _member_objects(scan), config.columns, workers)
        required = config.rules.needs_records
    if config.records is not None and config.kind == "webdataset":  # captions of a table go instead of those in tars
        scan.pictures.columns["text_at"][:] = -1
    scan.records_unused = matches.unused
    for where, reason, sentence in matches.rejects:
        scan.reject(where, reason, sentence)
    _reject_unmatched(scan, matches, required)
    chosen = scan.places[matches.place[scan.places] >= 0]
    derived = derive_tags(
        np.array(matches.scores, np.float64)[matches.place[chosen]],
        np.array(matches.years, np.int16)[matches.place[chosen]],
        config.rules,
    )
    scan.categories = matches.categories + derived.counts
    scan.records = _Records(matches, derived.spread(chosen, len(scan.pictures)))


def _records_of(config: SourceConfig) -> Path:
    assert config.records is not None  # SourceConfig has seen to it
    return config.records


def _reject_unmatched(scan: SourceScan, matches: Matches, required: bool) -> None:
    stays = []
    for place in scan.places.tolist():
        if place in matches.failed:
            scan.reject(scan.pictures.path(place), *matches.failed[place])
        elif required and matches.place[place] < 0:
            scan.reject(scan.pictures.path(place), "record_missing", "expected a record of this picture, found none.")
        else:
            stays.append(place)
    scan.places = np.array(stays, np.int64)


def _sidecar_objects(scan: SourceScan) -> Iterator[tuple[int, Path | ByteRange, str]]:
    places = np.flatnonzero(scan.pictures.columns["sidecar"] > 0)
    for start in range(0, len(places), BLOCK):
        window = places[start : start + BLOCK]
        for place, picture in zip(window.tolist(), scan.pictures.rows(window), strict=True):
            sidecar = picture.path + picture.sidecar
            yield place, scan.root / sidecar, sidecar


def _member_objects(scan: SourceScan) -> Iterator[tuple[int, Path | ByteRange, str]]:
    places = np.flatnonzero(scan.pictures.columns["record_at"] >= 0)
    for start in range(0, len(places), BLOCK):
        window = places[start : start + BLOCK]
        for place, picture in zip(window.tolist(), scan.pictures.rows(window), strict=True):
            tar = scan.root / scan.pictures.archives[picture.archive]
            yield place, ByteRange(tar, *picture.record, "record"), f"{picture.path}: its .json"


def _sound_links(scan: SourceScan, metadata: list[str]) -> list[str]:
    """Those of the metadata files that are files of this source."""
    found = []
    for path in sorted(metadata):
        try:
            if (scan.root / path).is_symlink():
                check_link(scan.root, path)
            if not (scan.root / path).is_file():
                raise ImageRejected("metadata_invalid", "expected a regular file, found something else.")
            found.append(path)
        except ImageRejected as error:
            scan.reject(path, error.reason, str(error))
    return found


# --- records of a window ----------------------------------------------------------------------------------------------


class _RecordRow(NamedTuple):
    text: str | None = None
    derived: str = ""
    """tags that rules add"""
    md5: str | None = None
    claims: Claims = Claims()


_NO_RECORD = _RecordRow()


class _Records:
    """The columns of `Matches`, read a window at a time."""

    def __init__(self, matches: Matches, derived: DerivedTags | None) -> None:
        self._place, self._derived = matches.place, derived
        self._texts, self._md5s, self._exts, self._ratings = (
            each.close() for each in (matches.texts, matches.md5s, matches.file_exts, matches.ratings)
        )
        self._scores = np.array(matches.scores, np.float64)
        self._heights, self._widths = (np.array(each, np.int32) for each in (matches.heights, matches.widths))

    def rows(self, pictures: NDArray[np.int64]) -> list[_RecordRow]:
        found = [_NO_RECORD] * len(pictures)
        mine = np.flatnonzero(self._place[pictures] >= 0)
        rows = self._place[pictures[mine]]
        texts, md5s, exts, ratings = (
            each.take(pa.array(rows)).to_pylist() for each in (self._texts, self._md5s, self._exts, self._ratings)
        )
        scores = (None if np.isnan(score) else score for score in self._scores[rows].tolist())
        claims = zip(self._heights[rows].tolist(), self._widths[rows].tolist(), exts, ratings, scores, strict=True)
        derived = self._derived.texts(pictures[mine]) if self._derived else [""] * len(mine)
        for at, text, more, md5, claim in zip(mine.tolist(), texts, derived, md5s, claims, strict=True):
            found[at] = _RecordRow(text, more, md5, Claims(*claim))
        return found


# --- repeats ----------------------------------------------------------------------------------------------------------

_REPEATS = re.compile(r"(\d{1,4})_.+")


def _set_repeats(scan: SourceScan) -> None:
    """The repeats that the nearest `N_name` folder below the source asks for; without one, 1. With 0, a reject.

    A tar is no folder: `0002_train.tar` is the third of its kind.
    """
    tars = frozenset(scan.pictures.archives)
    column = scan.pictures.columns["repeats"]
    folders: dict[str, tuple[str, int]] = {}
    for start in range(0, len(scan.pictures), BLOCK):
        for place, path in enumerate(scan.pictures.paths.slice(start, BLOCK).to_pylist(), start):
            folder = posixpath.dirname(path)
            if folder not in folders:
                folders[folder] = _repeats(folder, tars)
            named, repeats = folders[folder]
            if named:
                scan.repeats[named] = column[place] = repeats
    stays = column > 0
    for place in np.flatnonzero(~stays).tolist():
        scan.reject(scan.pictures.path(place), "zero_repeats", "the folder's name asks for 0 repeats.")
    scan.places = scan.places[stays]


def _repeats(folder: str, tars: Collection[str]) -> tuple[str, int]:
    """(the folder that asks, its repeats)."""
    while folder:
        match = None if folder in tars else _REPEATS.fullmatch(posixpath.basename(folder))
        if match and int(match[1]) <= MAX_REPEATS:
            return folder, int(match[1])
        folder = posixpath.dirname(folder)
    return "", 1
