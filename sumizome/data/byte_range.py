"""A stretch of a larger file that stands for a file of its own: a member of a tar, read where it lies, never extracted.

Owns the reading and nothing else; what the bytes mean, and whether they are still those of ingest, is the caller's.
"""

from pathlib import Path
from typing import NamedTuple

__all__ = ["ByteRange"]


class ByteRange(NamedTuple):
    """`size` bytes of a file, from `offset`."""

    path: Path
    offset: int
    size: int
    name: str
    """what the bytes are called within the file, for messages"""

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def read(self) -> bytes:
        """The bytes; fewer where the file has become shorter.

        Raises: OSError.
        """
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            pieces = []
            left = self.size
            while left and (piece := file.read(left)):
                pieces.append(piece)
                left -= len(piece)
            return b"".join(pieces)
