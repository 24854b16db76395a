"""Pictures that are there more than once: the same bytes, or the same picture at another size or quality.

Owns the perceptual hash, the search for hashes that nearly agree, and the choice of which copy stays. Pure: pictures
and columns in, pairs out. Invariant: a near copy names a picture that stays and is within the distance (no chains, in
which each resembles the next and the last not the first); an exact copy names the first picture of its bytes.
"""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sumizome.data.source_config import DuplicateConfig

__all__ = ["FLAT", "Copy", "find_copies", "near_pairs", "perceptual_hash"]

Hashes: TypeAlias = NDArray[np.uint64]
Pairs: TypeAlias = NDArray[np.int64]

FLAT = 0
"""the hash of a picture without structure, which resembles nothing"""
_SIDE = 32
_FLAT_LEVELS = 2.0
"""standard deviation, in levels of 255, below which the signs of the coefficients are noise"""


def perceptual_hash(picture: Image.Image) -> int:
    """63 bits: which of the 63 lowest cosine coefficients of the picture, at 32×32 grey, exceed their median."""
    grey = np.asarray(picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    if grey.std() < _FLAT_LEVELS:
        return FLAT
    coefficients = (_COSINES @ grey @ _COSINES.T).reshape(-1)[1:]
    bits = coefficients > np.median(coefficients)
    return int(bits @ (np.uint64(1) << np.arange(63, dtype=np.uint64)))


_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(8), np.arange(_SIDE) + 0.5))
"""the eight lowest rows of the DCT-II, [8, 32]"""


class Copy(NamedTuple):
    """A row that shows what another shows."""

    row: int
    kept: int
    """the row that stays"""
    kind: Literal["exact", "near"]
    distance: int
    """bits; 0 for exact copies"""


def find_copies(
    sha256: Sequence[str], hashes: Hashes, pixels: NDArray[np.int64], config: DuplicateConfig
) -> list[Copy]:
    """The copies among the rows, by row: of equal bytes the first row stays, of near copies the one of most pixels."""
    first: dict[str, int] = {}
    copies = []
    for row, digest in enumerate(sha256):
        if (kept := first.setdefault(digest, row)) != row:
            copies.append(Copy(row, kept, "exact", 0))
    if config.near != "off":
        rows = np.fromiter(first.values(), np.int64, len(first))
        copies += _near_copies(rows[hashes[rows] != FLAT], hashes, pixels, config.max_distance)
    return sorted(copies)


def _near_copies(rows: NDArray[np.int64], hashes: Hashes, pixels: NDArray[np.int64], max_distance: int) -> list[Copy]:
    """Best picture first: each stays unless it is near to one that stays already."""
    order = rows[np.lexsort((rows, -pixels[rows]))]
    distinct, best, node = np.unique(hashes[order], return_index=True, return_inverse=True)  # best: first in `order`
    neighbours: dict[int, list[int]] = {}
    for one, other in near_pairs(distinct, max_distance).tolist():
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
    leader = np.arange(len(distinct))
    dropped: set[int] = set()
    for each in sorted(neighbours, key=lambda each: int(best[each])):
        nearer = [other for other in neighbours[each] if best[other] < best[each] and other not in dropped]
        if nearer:
            dropped.add(each)
            leader[each] = min(nearer, key=lambda other: int(best[other]))
    kept = order[best[leader[node]]]
    distance = _distance(distinct[node], distinct[leader[node]])
    is_copy = kept != order
    columns = (each[is_copy].tolist() for each in (order, kept, distance))
    return [Copy(row, of, "near", bits) for row, of, bits in zip(*columns, strict=True)]


def near_pairs(hashes: Hashes, max_distance: int) -> Pairs:
    """Index pairs [p, 2], first < second, of the distinct 63-bit hashes that differ in at most `max_distance` bits.

    Cut into max_distance + 2 bands, two such hashes agree in two bands at least, whatever bits they differ in. So for
    each two bands, hashes are sorted by these and only neighbours of equal bands are compared: all pairs are found, and
    of unrelated ones hardly any is looked at (of six million hashes at distance 4 some 200 million, of 18 trillion).
    """
    edges = np.linspace(0, 63, max_distance + 3).astype(int).tolist()
    bands = [((1 << high) - 1) ^ ((1 << low) - 1) for low, high in pairwise(edges)]
    found = [np.empty((0, 2), np.int64)]
    for one, other in combinations(bands, 2):
        key = hashes & np.uint64(one | other)
        order = np.argsort(key, kind="stable")
        key = key[order]
        start, step = np.arange(len(key)), 0
        while len(start):  # each with the one that stands 1, 2, … places after it, as long as their bands agree
            step += 1
            start = start[start + step < len(key)]
            start = start[key[start] == key[start + step]]
            first, second = order[start], order[start + step]
            near = _distance(hashes[first], hashes[second]) <= max_distance
            found.append(np.stack([first[near], second[near]], axis=1))
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs, axis=0)


_BITS = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)


def _distance(one: Hashes, other: Hashes) -> NDArray[np.int64]:
    """Bits in which they differ."""
    words = np.ascontiguousarray(one ^ other).view(np.uint16).reshape(-1, 4)
    distance: NDArray[np.int64] = _BITS[words].sum(axis=1, dtype=np.int64)
    return distance
