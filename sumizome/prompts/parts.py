"""What every syntax is parsed into: text with a weight, in groups that BREAK separates."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

__all__ = ["Part", "Prompt", "joined"]


@dataclass(frozen=True)
class Part:
    """Consecutive text of one weight."""

    text: str
    weight: float
    """1 = as written."""


Prompt: TypeAlias = tuple[tuple[Part, ...], ...]
"""Groups of parts; each group begins a new chunk of the text encoders."""


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbours of one weight made one, empty text left out; at least one part comes back."""
    kept = [part for part in parts if part.text]
    merged = [
        Part("".join(part.text for part in alike), weight) for weight, alike in groupby(kept, key=lambda p: p.weight)
    ]
    return tuple(merged) or (Part("", 1.0),)
