"""The members of an uncompressed tar: their names and where their bytes lie, in a whole archive or not at all.

Owns the format (v7, ustar, GNU long names, pax) and refuses what it cannot vouch for: a damaged header, a file that
ends before its end mark, data behind it, sparse members. Invariant: the members that it yields tile the file from its
first byte to its end mark, so none is missing in silence. Nothing is extracted; names are data and never opened.
Source: POSIX.1-2017 pax; GNU tar manual, "Basic Tar Format".
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from sumizome.errors import DataError

__all__ = ["MAX_MEMBERS", "Member", "MemberKind", "TarDamage", "read_members"]

MAX_MEMBERS = 4_000_000
"""an archive; shards hold thousands"""
MAX_EXTENSION_BYTES = 2**20
"""of one long name or pax header"""
_BLOCK = 512
_ZEROS = bytes(_BLOCK)

MemberKind: TypeAlias = Literal["file", "folder", "link", "device", "unknown"]

_KINDS: dict[bytes, MemberKind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",  # contiguous: a file everywhere but on systems of the eighties
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "device",  # a pipe
}


class TarDamage(DataError):
    """An archive that is not whole: its message names the file, the byte, and how many members stand before it."""


class Member(NamedTuple):
    """One entry of an archive; its name is as the archive has it, untrusted."""

    name: str
    kind: MemberKind
    offset: int
    """byte at which its contents begin"""
    size: int


def read_members(path: Path) -> Iterator[Member]:
    """The members in their order, each after its contents are known to lie within the file.

    Only when the iterator ends is the archive known to be whole.
    Raises: TarDamage. OSError: what the system said.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise TarDamage(f"expected a tar archive, found something that is no regular file at {path}.")
    with path.open("rb", buffering=0) as file:
        yield from _Archive(path, file.fileno(), os.fstat(file.fileno()).st_size).members()


@dataclass
class _Archive:
    path: Path
    descriptor: int
    size: int
    at: int = 0
    """byte of the header that is read next"""
    count: int = 0

    def members(self) -> Iterator[Member]:
        told: dict[str, bytes] = {}  # what extension headers say of the member after them
        while (header := self._header()) is not None:
            kind, data = header[156:157], self.at + _BLOCK
            size = self._number(header[124:136], "size")
            if kind in b"LKxXg":
                self._extend(told, kind, data, size)
                self._step(size)
                continue
            size = self._told_size(told, size)
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in told):
                raise self._damage("expected whole members, found a sparse one: pack it without --sparse")
            member = self._member(header, kind, told, data, size)
            self._step(size)
            self.count += 1
            if self.count > MAX_MEMBERS:
                raise self._damage(f"expected at most {MAX_MEMBERS} members, found more")
            told = {}
            yield member
        if told:
            raise self._damage("expected a member after its long name, found the end mark")

    def _member(self, header: bytes, kind: bytes, told: dict[str, bytes], data: int, size: int) -> Member:
        raw = told.get("path") or _name(header)
        named = _KINDS.get(kind, "unknown")
        if named == "file" and kind != b"7" and raw.endswith(b"/"):  # v7 had no type for folders
            named = "folder"
        if named in ("folder", "link", "device") and size:
            # Readers disagree on whether these are skipped: what one takes for data is a header to another.
            raise self._damage(f"expected no contents in a member of type {kind!r}, found {size} bytes")
        return Member(raw.decode("utf-8", "surrogateescape"), named, data, size)

    def _header(self) -> bytes | None:
        """The next header; None at the end mark, once all that follows is known to be zeros."""
        block = self._read(self.at, _BLOCK)
        if len(block) < _BLOCK:
            raise self._damage("expected the end mark, found the file's end: it is truncated")
        if block == _ZEROS:
            if self._read(self.at + _BLOCK, _BLOCK) != _ZEROS:
                raise self._damage("expected an end mark of two blocks, found one: it is truncated or damaged")
            self._check_rest(self.at + 2 * _BLOCK)
            return None
        stored = self._number(block[148:156], "checksum")
        rest = block[:148] + b" " * 8 + block[156:]
        total = sum(rest)
        if stored not in (total, total - 256 * sum(byte > 127 for byte in rest)):  # once summed as signed bytes
            raise self._damage("expected a header, found its checksum wrong")
        return block

    def _check_rest(self, at: int) -> None:
        while block := self._read(at, 2**20):
            if block.strip(b"\0"):
                raise self._damage(
                    "expected nothing after the end mark, found more data: joined archives are read only to the first "
                    "mark elsewhere; unpack and pack them again, or keep them apart"
                )
            at += len(block)

    def _step(self, size: int) -> None:
        """Past the contents of the member at `self.at`, which must lie within the file."""
        end = self.at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if end > self.size:
            raise self._damage(f"expected {size} bytes of contents, found the file's end: it is truncated")
        self.at = end

    def _extend(self, told: dict[str, bytes], kind: bytes, data: int, size: int) -> None:
        """Takes in what a long name or a pax header says."""
        if size > MAX_EXTENSION_BYTES:
            raise self._damage(f"expected at most {MAX_EXTENSION_BYTES} bytes of names, found {size}")
        content = self._read(data, size)
        if len(content) < size:
            raise self._damage("expected a long name, found the file's end: it is truncated")
        if kind == b"K":
            return
        found = {"path": content.partition(b"\0")[0]} if kind == b"L" else self._pax(content)
        if kind != b"g":
            if found.keys() & told.keys():
                raise self._damage("expected one long name for a member, found two")
            told.update(found)
        elif any(key in ("path", "size") or key.startswith("GNU.sparse") for key in found):
            raise self._damage("expected no name or size for all members at once, found one")

    def _pax(self, content: bytes) -> dict[str, bytes]:
        """key → value of records `length key=value\\n`."""
        found: dict[str, bytes] = {}
        at = 0
        while at < len(content):
            match = re.compile(rb"(\d{1,7}) ([^=]+)=").match(content, at)
            end = at + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
                raise self._damage("expected a pax header, found it damaged")
            found[match[2].decode("utf-8", "replace")] = content[match.end() : end - 1]
            at = end
        return found

    def _told_size(self, told: dict[str, bytes], size: int) -> int:
        if "size" not in told:
            return size
        if not re.fullmatch(rb"\d{1,18}", told["size"]):
            raise self._damage("expected a size in the pax header, found none")
        return int(told["size"])

    def _number(self, field: bytes, what: str) -> int:
        if field[0] == 0x80:  # GNU: base 256
            return int.from_bytes(field[1:], "big")
        text = field.strip(b"\0 ")
        if not re.fullmatch(rb"[0-7]*", text):
            raise self._damage(f"expected a {what} in octal digits, found {text!r}")
        return int(text or b"0", 8)

    def _read(self, at: int, size: int) -> bytes:
        pieces = []
        while size and (piece := os.pread(self.descriptor, size, at)):
            pieces.append(piece)
            size, at = size - len(piece), at + len(piece)
        return b"".join(pieces)

    def _damage(self, sentence: str) -> TarDamage:
        return TarDamage(f"{self.path}: {sentence}, at byte {self.at}, after {self.count} whole members.")


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    is_posix = header[257:263] == b"ustar\0"  # GNU keeps other things where ustar has the prefix
    return prefix + b"/" + name if is_posix and prefix else name
