"""What passes between listing, decoding and the tables: a picture to look at, what its record claims, a file left out.

Owns these records and nothing that is done with them.
"""

from pathlib import Path
from typing import NamedTuple

from sumizome.data.byte_range import ByteRange

__all__ = ["MAX_CAPTION_BYTES", "Claims", "Entry", "ImageTask", "Reject"]

MAX_CAPTION_BYTES = 2**20


class Reject(NamedTuple):
    """A file that is not in the manifest."""

    source: int
    path: str
    """posix, relative to its source, printable; a member of a tar as `a.tar/member`, a line of metadata as
    `metadata.jsonl:12`"""
    reason: str
    """One short word. Those of `ImageRejected`; by name `bad_path`, `link_outside`, `linked_folder`, `zero_repeats`,
    `caption_without_image`, `metadata_invalid`, `metadata_outside`, `metadata_without_image`, `metadata_twice`,
    `archive`, `tar_damaged`, `tar_member_kind`, `tar_member_outside`, `tar_member_twice`, `second_picture`; by
    record `record_missing`, `record_invalid`, `record_twice`, `record_ambiguous`, `rating_missing`, `rating_excluded`;
    by content `caption_unreadable`, `caption_too_large`, `caption_not_utf8`, `caption_invalid`, `decoder_died`,
    `md5_mismatch`, `below_min_side`, `below_min_pixels`, `record_mismatch`, `duplicate`, `near_duplicate`"""
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
    archive: str | None = None
    """the tar that it is a member of, relative to `root`; "" = `root` itself"""
    offset: int | None = None
    """of its bytes in the tar"""
    size: int = -1

    @property
    def file(self) -> Path | ByteRange:
        """Where its bytes are."""
        if self.archive is None or self.offset is None:
            return Path(self.root, self.path)
        member = self.path.removeprefix(f"{self.archive}/")
        return ByteRange(Path(self.root, self.archive), self.offset, self.size, member)


class Claims(NamedTuple):
    """What a record says of its picture; 0 and "" = nothing."""

    height: int = 0
    width: int = 0
    file_ext: str = ""
    rating: str = ""
    score: float | None = None


class Entry(NamedTuple):
    """A task, and what is needed to judge its outcome."""

    task: ImageTask
    stamp: bytes | None
    """16 bytes that stand for this state of the picture's file; None where the system told no size or time, or where it
    may change yet"""
    claims: Claims
    fault: tuple[str, str] | None = None
    """(reason, sentence) if its caption cannot be read"""
