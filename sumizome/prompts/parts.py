"""What every syntax is parsed into: text with a weight, in groups that BREAK separates."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

__all__ = ["Part", "Prompt", "finite_weight", "joined"]

_LARGEST = (2 - 2**-23) * 2.0**127
"""Of float32, in which embeddings are weighted."""


@dataclass(frozen=True)
class Part:
    """Consecutive text of one weight."""

    text: str
    weight: float
    """1 = as written."""


Prompt: TypeAlias = tuple[tuple[Part, ...], ...]
"""Groups of parts; each group begins a new chunk of the text encoders."""


def finite_weight(number: str) -> float | None:
    """The weight that `number` is; None where it is none, so text: no number, nan, or more than embeddings can bear.

    nan and infinity would be in every pixel of the picture.
    """
    try:
        weight = float(number)
    except ValueError:
        return None
    return weight if abs(weight) <= _LARGEST else None


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbours of one weight made one, empty text left out; at least one part comes back."""
    kept = [part for part in parts if part.text]
    merged = [
        Part("".join(part.text for part in alike), weight) for weight, alike in groupby(kept, key=lambda p: p.weight)
    ]
    return tuple(merged) or (Part("", 1.0),)
