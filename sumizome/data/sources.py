"""What a source holds: which files are pictures, where each one's caption or record stands, how often it repeats.

Owns the folder conventions (same-stem `.txt` / `.caption`, kohya's `N_name/` repeats, `metadata.jsonl`) and what is
refused by name or record alone; opens no picture. Records of dumps are `matching`'s, what they lead to is `rules`'.
Invariant: a scan follows from the names and the metadata files, not from the order in which the disk lists them, and
every picture in it is either a task or a reject. Names are untrusted: they never lead out of the folder, and are
printed escaped.
"""

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sumizome.data.images import ImageRejected
from sumizome.data.matching import SIDECAR_SUFFIX, Matches, match_records
from sumizome.data.records import Record, read_lines
from sumizome.data.rules import check_rating, derived_tags
from sumizome.data.source_config import MAX_REPEATS, PictureRules, SourceConfig

__all__ = ["ImageTask", "Reject", "SourceScan", "printable", "scan_source"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
OTHER_IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".tga", ".tif", ".tiff"}
)
"""pictures that are reported rather than passed over in silence"""
CAPTION_SUFFIXES = (".txt", ".caption")
"""the first that exists is read"""
METADATA_NAME = "metadata.jsonl"


class Reject(NamedTuple):
    """A file that is not in the manifest."""

    source: int
    path: str
    """posix, relative to its source, printable; a line of metadata as `metadata.jsonl:12`"""
    reason: str
    """One short word. Those of `ImageRejected`; by name `bad_path`, `link_outside`, `linked_folder`, `zero_repeats`,
    `caption_without_image`, `metadata_invalid`, `metadata_outside`, `metadata_without_image`, `metadata_twice`; by
    record `record_missing`, `record_invalid`, `record_twice`, `rating_missing`, `rating_excluded`; by content
    `caption_unreadable`, `caption_too_large`, `caption_not_utf8`, `caption_invalid`, `decoder_died`, `md5_mismatch`,
    `below_min_side`, `below_min_pixels`, `duplicate`, `near_duplicate`"""
    sentence: str


class ImageTask(NamedTuple):
    """One picture to decode and its caption: in a sidecar file, in metadata, or none. A caption file goes first."""

    source: int
    root: str
    path: str
    repeats: int
    sidecar: str | None
    text: str | None
    md5: str | None = None
    """of the file, as its record has it"""


@dataclass
class SourceScan:
    """What one source holds; tasks in the order of their paths."""

    source: int
    root: Path
    files: set[str] = field(default_factory=set)
    """relative posix paths"""
    links: set[str] = field(default_factory=set)
    """those of `files` that are symbolic links"""
    texts: dict[str, str] = field(default_factory=dict)
    """picture → caption, of metadata"""
    tasks: list[ImageTask] = field(default_factory=list)
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

    def reject(self, path: str, reason: str, sentence: str) -> None:
        self.rejects.append(Reject(self.source, printable(path), reason, printable(sentence)))


def scan_source(source: int, config: SourceConfig) -> SourceScan:
    """The pictures of a source (its folder absolute, resolved), which gets the index `source`.

    Raises: ConfigError, DataError: records that are not there or cannot be read.
    """
    scan = SourceScan(source, config.folder)
    _list_files(scan)
    if config.kind == "folder":
        _scan_folder(scan)
    else:
        _scan_records(scan, config)
    if config.repeats > 1:
        scan.tasks = [task._replace(repeats=task.repeats * config.repeats) for task in scan.tasks]
    return scan


def _scan_folder(scan: SourceScan) -> None:
    _read_metadata(scan)
    pictured = {_stem(path) for path in scan.files if _suffix(path) in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES}
    for path in sorted(scan.files):
        suffix = _suffix(path)
        if suffix in IMAGE_SUFFIXES:
            try:
                scan.tasks.append(_build_task(scan, path))
            except ImageRejected as error:
                scan.reject(path, error.reason, str(error))
        elif suffix in OTHER_IMAGE_SUFFIXES:
            scan.reject(path, "format_not_supported", f"expected PNG, JPEG or WebP, found {suffix}: convert it.")
        elif suffix in CAPTION_SUFFIXES and _stem(path) not in pictured:
            scan.reject(path, "caption_without_image", "expected a picture of the same name beside this caption.")
        elif suffix not in CAPTION_SUFFIXES and posixpath.basename(path) != METADATA_NAME:
            scan.files_ignored += 1


def _scan_records(scan: SourceScan, config: SourceConfig) -> None:
    """Every picture has a record that is wanted, or is a reject; caption files are not looked at."""
    pictures = sorted(path for path in scan.files if _suffix(path) in IMAGE_SUFFIXES)
    matches = match_records(
        config.kind,
        pictures,
        scan.files,
        root=scan.root,
        table=config.records,
        columns=config.columns,
        check=lambda path: _check_link(scan, path),
    )
    scan.records_unused = matches.unused
    for where, error in matches.rejects:
        scan.reject(where, error.reason, str(error))
    wanted: list[tuple[ImageTask, Record]] = []
    for path in pictures:
        try:
            record = _usable_record(path, matches, config.rules)
            wanted.append((_build_task(scan, path, captions=False), record))
        except ImageRejected as error:
            scan.reject(path, error.reason, str(error))
    scan.tasks = _record_tasks(scan, wanted, config.rules)
    for path in sorted(scan.files.difference(pictures)):
        if _suffix(path) in OTHER_IMAGE_SUFFIXES:
            scan.reject(path, "format_not_supported", f"expected PNG, JPEG or WebP, found {_suffix(path)}: convert it.")
        elif path.removesuffix(SIDECAR_SUFFIX) not in matches.records and scan.root / path != config.records:
            scan.files_ignored += 1


def _usable_record(path: str, matches: Matches, rules: PictureRules) -> Record:
    if path in matches.failed:
        raise matches.failed[path]
    if path not in matches.records:
        raise ImageRejected("record_missing", "expected a record of this picture, found none.")
    check_rating(matches.records[path], rules)
    return matches.records[path]


def _record_tasks(scan: SourceScan, wanted: Sequence[tuple[ImageTask, Record]], rules: PictureRules) -> list[ImageTask]:
    """The tasks with their records' tags and those that rules add; counts the categories."""
    tasks = []
    added = derived_tags([record for _, record in wanted], rules)
    for (task, record), more in zip(wanted, added, strict=True):
        scan.categories.update((*record.categories, *more))
        text = ", ".join(filter(None, [record.text, *(tag for tag, _ in more)]))
        tasks.append(task._replace(text=text, md5=record.md5))
    return tasks


def _list_files(scan: SourceScan) -> None:
    """Folders behind links are reported, not entered: what lies there is not this source's, or is in it already."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(scan.root / folder))
        except OSError as error:
            scan.reject(folder or ".", "unreadable", f"cannot list this folder: {error.strerror}.")
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() and os.path.isdir(entry):  # noqa: PTH112 — False, not an error, for a link in circles
                scan.reject(path, "linked_folder", "folders behind symbolic links are not entered.")
            else:
                scan.files.add(path)
                if entry.is_symlink():
                    scan.links.add(path)


def _build_task(scan: SourceScan, path: str, *, captions: bool = True) -> ImageTask:
    if path != printable(path) or "\\" in path:
        raise ImageRejected(
            "bad_path", "expected a name in UTF-8 without control characters or backslashes: rename it."
        )
    suffixes = CAPTION_SUFFIXES if captions else ()
    sidecars = [caption for suffix in suffixes if (caption := _stem(path) + suffix) in scan.files]
    for used in (path, *sidecars[:1]):
        _check_link(scan, used)
    repeats = _repeats(path, scan.repeats)
    if repeats == 0:
        raise ImageRejected("zero_repeats", "the folder's name asks for 0 repeats.")
    text = scan.texts.get(path)
    scan.captions_doubled += len(sidecars) + (text is not None) > 1
    return ImageTask(scan.source, str(scan.root), path, repeats, sidecars[0] if sidecars else None, text)


def _check_link(scan: SourceScan, path: str) -> None:
    """A link may lead to a file within its source only: captions end up in models and reports."""
    if path not in scan.links:
        return
    target = os.path.realpath(scan.root / path)  # Path.resolve() raises for a link in circles
    if not Path(target).is_relative_to(scan.root):
        raise ImageRejected("link_outside", f"expected a file of this folder, found a link out of it: {path}.")


_REPEATS = re.compile(r"(\d{1,4})_.+")


def _repeats(path: str, seen: dict[str, int]) -> int:
    """The repeats that the nearest `N_name` folder below the source asks for; without one, 1."""
    folder = posixpath.dirname(path)
    while folder:
        match = _REPEATS.fullmatch(posixpath.basename(folder))
        if match and int(match[1]) <= MAX_REPEATS:
            return seen.setdefault(folder, int(match[1]))
        folder = posixpath.dirname(folder)
    return 1


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def printable(text: str) -> str:
    """The text with control characters, marks of direction and undecodable bytes escaped, for reports and terminals."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# --- metadata.jsonl: one JSON object a line, `file_name` relative to the folder that the file is in, and `text` -------


def _read_metadata(scan: SourceScan) -> None:
    for metadata in sorted(path for path in scan.files if posixpath.basename(path) == METADATA_NAME):
        try:
            _check_link(scan, metadata)
            if not (scan.root / metadata).is_file():
                raise ImageRejected("metadata_invalid", "expected a regular file, found something else.")
            for number, line in read_lines(scan.root / metadata):
                _read_line(scan, metadata, number, line)
        except ImageRejected as error:
            scan.reject(metadata, error.reason, str(error))
        except (OSError, UnicodeDecodeError) as error:
            scan.reject(metadata, "metadata_invalid", f"expected a readable file in UTF-8: {error}.")


def _read_line(scan: SourceScan, metadata: str, number: int, line: str) -> None:
    try:
        name, text = _parse_line(line)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(metadata), name))
        if path.startswith(("/", "../")):
            raise ImageRejected("metadata_outside", f"expected a file_name in its folder, found {name[:200]!r}.")
        if path not in scan.files or _suffix(path) not in IMAGE_SUFFIXES:
            raise ImageRejected("metadata_without_image", f"expected a picture at {name[:200]!r}, found none.")
        if path in scan.texts:
            raise ImageRejected("metadata_twice", f"expected one line for {path}, found a second: the first is used.")
        scan.texts[path] = text
    except ImageRejected as error:
        scan.reject(f"{metadata}:{number}", error.reason, str(error))


def _parse_line(line: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
        name, text = record["file_name"], record["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageRejected("metadata_invalid", "expected JSON with file_name and text, found another line.") from error
    if not isinstance(name, str) or not isinstance(text, str):
        raise ImageRejected("metadata_invalid", "expected file_name and text as strings.")
    return name, text
