"""The pictures in webdataset's tars, each with the members that belong to it: caption, record.

Owns the conventions of names in a tar; the format is `tar_reader`'s. Opens archives and no member. Invariant: an
archive is taken whole or not at all, and each of its pictures is listed or is a reject. Member names are untrusted:
they are compared with each other and printed, and nothing is opened by them.
"""

import posixpath
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.listing import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    RejectCall,
    check_link,
    check_name,
    suffix,
    suffix_spellings,
)
from sumizome.data.picture_bytes import MAX_FILE_BYTES
from sumizome.data.picture_list import Picture, PictureList, stem
from sumizome.data.tar_reader import Member, TarDamage, read_members
from sumizome.errors import DataError

__all__ = ["TEXT_SUFFIXES", "list_tars"]

TEXT_SUFFIXES = (".txt", ".caption", ".tags")
"""captions; the first that exists is read"""
RECORD_SUFFIX = ".json"

_SHOWN = 5


def list_tars(
    root: Path,
    tars: Iterable[str],
    pictures: PictureList,
    reject: RejectCall,
    damaged: Literal["stop", "reject"],
    told: Callable[[int], object] = lambda _: None,
) -> int:
    """Adds the pictures of the tars (relative paths; "" = `root` itself is one); how many members are none of use.
    `told` hears after each tar how many pictures there are so far.

    Raises: DataError: tars that are not whole, all of them named, unless `damaged` ones are rejects.
    """
    faults: list[str] = []
    others = 0
    for tar in sorted(tars):
        try:
            others += _Tar(root, tar, pictures, reject).list_members()
            told(pictures.added)
        except ImageRejected as error:
            reject(tar or root.name, error.reason, str(error))
        except (TarDamage, OSError) as error:
            sentence = f"{root / tar}: {error.strerror}." if isinstance(error, OSError) else str(error)
            reject(tar or root.name, "tar_damaged", f"none of its pictures is used. {sentence}")
            faults.append(sentence)
    if faults and damaged == "stop":
        more = f" (and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
        count = "1 tar" if len(faults) == 1 else f"{len(faults)} tars"
        raise DataError(
            f"{count} cannot be used whole: {' '.join(faults[:_SHOWN])}{more} Fetch again what is damaged, or leave "
            "out all of its pictures with --damaged-tars reject (damaged_tars in a file of sources)."
        )
    return others


class _Tar:
    """One archive on its way into the list."""

    def __init__(self, root: Path, tar: str, pictures: PictureList, reject: RejectCall) -> None:
        self.root, self.tar, self.pictures, self.reject = root, tar, pictures, reject

    def list_members(self) -> int:
        """Adds its pictures; how many members are neither picture, caption nor record."""
        if self.tar:
            check_name(self.tar)
            if (self.root / self.tar).is_symlink():
                check_link(self.root, self.tar)
        mtime = (self.root / self.tar).stat().st_mtime_ns
        members: dict[str, Member] = {}
        faults: list[tuple[str, str, str]] = []
        for member in read_members(self.root / self.tar):
            fault = _fault(member, members)
            if fault:
                faults.append((member.name, *fault))
            elif member.kind == "file":
                members[_normal(member.name)] = member
        for name, reason, sentence in faults:  # only now: of a damaged archive nothing but the damage is said
            self.reject(self._path(name), reason, sentence)
        archive = len(self.pictures.archives)
        self.pictures.archives.append(self.tar)
        keys = {_key(name) + suffix(name) for name in members if name == _key(name) + posixpath.splitext(name)[1]}
        spelt = suffix_spellings(name for name in members if suffix(name) in (*TEXT_SUFFIXES, RECORD_SUFFIX))
        used: set[str] = set()
        for name in members:
            if suffix(name) in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES:
                used.add(name)
                self._add(name, members, spelt, archive, mtime, keys, used)
        return len(members.keys() - used)

    def _path(self, name: str) -> str:
        return f"{self.tar}/{name}" if self.tar else name

    def _add(
        self,
        name: str,
        members: Mapping[str, Member],
        spelt: Mapping[str, str],
        archive: int,
        mtime: int,
        keys: set[str],
        used: set[str],
    ) -> None:
        path, kind, member = self._path(name), suffix(name), members[name]
        texts = _companions(name, spelt, TEXT_SUFFIXES)
        records = _companions(name, spelt, (RECORD_SUFFIX,))
        used.update(texts, records)
        if kind in OTHER_IMAGE_SUFFIXES:
            self.reject(path, "format_not_supported", f"expected PNG, JPEG or WebP, found {kind}: convert it.")
        elif _key(name) != stem(name) and any(_key(name) + each in keys for each in IMAGE_SUFFIXES):
            # `x.seg.png` beside `x.jpg`: a mask or a depth map of it, not a picture that its tags describe.
            self.reject(
                path, "second_picture", "its sample has a picture whose name has no second dot; that one is used."
            )
        elif member.size > MAX_FILE_BYTES:
            self.reject(
                path,
                "file_too_large",
                f"expected at most {MAX_FILE_BYTES >> 20} MB, found {member.size >> 20} MB.",
            )
        else:
            text, record = (_range(members, names) for names in (texts, records))
            self.pictures.add(
                Picture(path, member.size, mtime, archive=archive, offset=member.offset, text=text, record=record)
            )


def _range(members: Mapping[str, Member], names: list[str]) -> tuple[int, int]:
    return (members[names[0]].offset, members[names[0]].size) if names else (-1, 0)


def _companions(name: str, spelt: Mapping[str, str], suffixes: tuple[str, ...]) -> list[str]:
    """The members of the picture's sample with one of the suffixes: of its own stem, else of its key."""
    stems = dict.fromkeys((stem(name), _key(name)))
    return [spelt[each + kind] for kind in suffixes for each in stems if each + kind in spelt]


def _key(name: str) -> str:
    """webdataset's key: the path up to the first dot of the file's name."""
    folder, file = posixpath.split(name)
    return posixpath.join(folder, file.partition(".")[0] or file)


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def _fault(member: Member, members: Mapping[str, Member]) -> tuple[str, str] | None:
    """(reason, sentence) of a member that is not used."""
    name = member.name
    if member.kind in ("link", "device", "unknown"):
        return "tar_member_kind", f"expected a file or a folder in the tar, found a {member.kind}."
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name or (not name.strip("/.") and member.kind == "file"):
        return "tar_member_outside", "expected a name below the archive's root."
    try:
        check_name(name)
    except ImageRejected as error:
        return error.reason, str(error)
    if _normal(name) in members and member.kind == "file":
        return "tar_member_twice", "expected each name once in the tar, found it again: the first is used."
    return None
