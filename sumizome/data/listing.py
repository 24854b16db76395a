"""What lies in a source's folder: its pictures with their captions' places, its tars, its metadata files, the rest.

Owns the walk and what names alone decide; opens no file. Invariants: folders behind links are not entered, a link that
leads out of the source is a reject, and names are untrusted: those that could not be printed are rejects, too.
"""

import os
import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.picture_list import Picture, PictureList, stem

__all__ = [
    "CAPTION_SUFFIXES",
    "IMAGE_SUFFIXES",
    "METADATA_NAMES",
    "OTHER_IMAGE_SUFFIXES",
    "Listing",
    "RejectCall",
    "check_link",
    "check_name",
    "list_folder",
    "printable",
    "suffix",
    "suffix_spellings",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
OTHER_IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".tga", ".tif", ".tiff"}
)
"""pictures that are reported rather than passed over in silence"""
CAPTION_SUFFIXES = (".txt", ".caption")
"""the first that exists is read"""
METADATA_NAMES = frozenset({"metadata.jsonl", "metadata.csv", "metadata.parquet"})
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")

RejectCall = Callable[[str, str, str], None]
"""(path, reason, sentence)"""


@dataclass
class Listing:
    """What a walk found."""

    pictures: PictureList = field(default_factory=PictureList)
    metadata: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    """archives whose members cannot be read where they lie"""
    doubled: list[str] = field(default_factory=list)
    """pictures with two caption files"""
    others: int = 0
    """files that are none of these, nor a caption"""


def list_folder(
    root: Path,
    reject: RejectCall,
    sidecars: tuple[str, ...],
    *,
    appended: bool = False,
    told: Callable[[int], object] = lambda _: None,
) -> Listing:
    """The files below `root`; `told` hears after each folder how many pictures there are so far.

    Captions are files whose suffix is one of `sidecars`, in place of the picture's or, if `appended`, after it. The
    pictures are in the order of the disk, not yet closed.
    """
    listing = Listing()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            reject(folder or ".", "unreadable", f"cannot list this folder: {error.strerror}.")
            continue
        files: dict[str, os.DirEntry[str]] = {}
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() and os.path.isdir(entry):  # noqa: PTH112 — False, not an error, for a link in circles
                reject(path, "linked_folder", "folders behind symbolic links are not entered.")
            else:
                files[path] = entry
        _Folder(root, files, reject, sidecars, appended).sort_into(listing)
        told(listing.pictures.added)
    return listing


@dataclass
class _Folder:
    """The files of one folder."""

    root: Path
    files: dict[str, os.DirEntry[str]]
    reject: RejectCall
    sidecars: tuple[str, ...]
    appended: bool

    def sort_into(self, listing: Listing) -> None:
        kinds = IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES
        spelt = suffix_spellings(path for path in self.files if suffix(path) in self.sidecars)
        pictured = {path if self.appended else stem(path) for path in self.files if suffix(path) in kinds}
        for path in self.files:
            kind = suffix(path)
            if kind in IMAGE_SUFFIXES:
                self._add(listing, path, spelt)
            elif kind in OTHER_IMAGE_SUFFIXES:
                self.reject(path, "format_not_supported", f"expected PNG, JPEG or WebP, found {kind}: convert it.")
            elif posixpath.basename(path) in METADATA_NAMES:
                listing.metadata.append(path)
            elif kind == ".tar":
                listing.tars.append(path)
            elif path.lower().endswith(PACKED_SUFFIXES):
                listing.packed.append(path)
            elif kind not in self.sidecars:
                listing.others += 1
            elif stem(path) not in pictured:
                if self.appended:
                    listing.others += 1
                else:
                    self.reject(
                        path, "caption_without_image", "expected a picture of the same name beside this caption."
                    )

    def _add(self, listing: Listing, path: str, spelt: Mapping[str, str]) -> None:
        try:
            check_name(path)
            base = path if self.appended else stem(path)
            found = [spelt[base + kind].removeprefix(base) for kind in self.sidecars if base + kind in spelt]
            for used in (path, *(base + kind for kind in found[:1])):
                if self.files[used].is_symlink():
                    check_link(self.root, used)
        except ImageRejected as error:
            self.reject(path, error.reason, str(error))
            return
        if len(found) > 1:
            listing.doubled.append(path)
        size, mtime = _stamp(self.files[path])
        listing.pictures.add(Picture(path, size, mtime, found[0] if found else ""))


def _stamp(entry: os.DirEntry[str]) -> tuple[int, int]:
    """(bytes, mtime in ns) of what the entry leads to."""
    try:
        status = entry.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


_SPACES = (0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)
_JOINERS = (0x200C, 0x200D)
_IN_NAMES = dict.fromkeys((*_SPACES, *_JOINERS))
"""Not printable to Python, and harmless: Japanese titles have the wide space, emoji are joined."""


def check_name(path: str) -> None:
    """Raises: ImageRejected for a name that is no text or that another system would take for a path."""
    if not path.translate(_IN_NAMES).isprintable() or "\\" in path:
        raise ImageRejected(
            "bad_path",
            "expected a name in UTF-8 without control characters, marks of direction or backslashes: rename it.",
        )


def check_link(root: Path, path: str) -> None:
    """A link may lead to a file within its source only: captions end up in models and reports.

    Raises: ImageRejected.
    """
    target = os.path.realpath(root / path)  # Path.resolve() raises for a link in circles
    if not Path(target).is_relative_to(root):
        raise ImageRejected("link_outside", f"expected a file of this folder, found a link out of it: {path}.")


def suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def suffix_spellings(names: Iterable[str]) -> dict[str, str]:
    """Each name by itself with its suffix in lower case: `a.TXT` is the caption of `a.png`, unless `a.txt` is there."""
    found: dict[str, str] = {}
    for name in sorted(names):  # upper case sorts first, so lower case takes its place
        found[stem(name) + suffix(name)] = name
    return found


def printable(text: str) -> str:
    """The text with control characters, marks of direction and undecodable bytes escaped, for reports and terminals."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
