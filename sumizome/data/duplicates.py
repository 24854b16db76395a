"""Pictures that are there more than once: the same bytes, or the same picture at another size or quality.

Owns the perceptual hash, the search for hashes that nearly agree, and the choice of which copy stays. Pure: pictures
and columns in, pairs out. Invariant: a near copy names a picture that stays and is within the distance (no chains, in
which each resembles the next and the last not the first); an exact copy names the first picture of its bytes.
"""

import hashlib
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
    sha256: Sequence[str] | pa.ChunkedArray, hashes: Hashes, pixels: NDArray[np.int64], config: DuplicateConfig
) -> list[Copy]:
    """The copies among the rows, by row: of equal bytes the first row stays, of near copies the one of most pixels."""
    first = _first_rows(sha256)
    rows = np.arange(len(first))
    copies = [Copy(row, int(first[row]), "exact", 0) for row in np.flatnonzero(first != rows).tolist()]
    if config.near != "off":
        alone = rows[(first == rows) & (hashes != FLAT)]
        copies += _near_copies(alone, hashes, pixels, config.max_distance)
    return sorted(copies)


def _first_rows(values: Sequence[str] | pa.ChunkedArray) -> NDArray[np.int64]:
    """[rows]: the first row of the same value."""
    column = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([pa.array(values, pa.string())])
    encoded = pc.dictionary_encode(column).unify_dictionaries()
    codes = [chunk.indices.to_numpy() for chunk in encoded.chunks]
    code = np.concatenate([np.empty(0, np.int64), *codes]).astype(np.int64)
    _, first = np.unique(code, return_index=True)
    return first[code] if len(code) else code


def _near_copies(rows: NDArray[np.int64], hashes: Hashes, pixels: NDArray[np.int64], max_distance: int) -> list[Copy]:
    """Best picture first: each stays unless it is near to one that stays already."""
    order = rows[np.lexsort((rows, -pixels[rows]))]
    distinct, best, node = np.unique(hashes[order], return_index=True, return_inverse=True)  # best: first in `order`
    rank = np.argsort(best)  # distinct hashes, best first: from here on a hash is its rank
    leader = _leaders(distinct[rank], max_distance)
    place = np.empty(len(rank), np.int64)
    place[rank] = np.arange(len(rank))
    led = rank[leader[place[node]]]
    kept = order[best[led]]
    distance = _distance(distinct[node], distinct[led])
    is_copy = kept != order
    columns = (each[is_copy].tolist() for each in (order, kept, distance))
    return [Copy(row, of, "near", bits) for row, of, bits in zip(*columns, strict=True)]


_LONG_RUN = 64
"""hashes of equal bands that are compared all with all; of more, only leaders are compared with the rest"""


def _leaders(hashes: Hashes, max_distance: int) -> NDArray[np.int64]:
    """[n]: of each hash, taken in turn, the first leader that is near; itself, a leader then, if there is none.

    Drawings of one layout (a figure on white) share bands by the thousand, and all pairs of them would be billions.
    So of long runs of equal bands no pairs are made: a hash that turns out to lead is compared with those of its runs
    that follow no one yet, and these become fewer as more are led.
    """
    pairs, runs = _candidates(hashes, max_distance)
    leader = np.full(len(hashes), -1, np.int64)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(hashes) + 1))
    members = np.concatenate([np.empty(0, np.int64), *runs])
    numbers = np.repeat(np.arange(len(runs)), [len(run) for run in runs])[np.argsort(members, kind="stable")]
    begins = np.searchsorted(np.sort(members), np.arange(len(hashes) + 1))
    # What has neither a pair nor a long run leads itself alone; only the others are gone through.
    for each in np.union1d(pairs[:, 0], members).tolist():
        if leader[each] >= 0:
            continue
        leader[each] = each
        near = pairs[starts[each] : starts[each + 1], 1]
        leader[near[leader[near] < 0]] = each
        for number in numbers[begins[each] : begins[each + 1]].tolist():
            run = runs[number]
            run = runs[number] = run[leader[run] < 0]
            leader[run[_distance(hashes[run], hashes[each : each + 1]) <= max_distance]] = each
    alone = leader < 0
    leader[alone] = np.flatnonzero(alone)
    return leader


def near_pairs(hashes: Hashes, max_distance: int) -> Pairs:
    """Index pairs [p, 2], first < second, of the distinct 63-bit hashes that differ in at most `max_distance` bits."""
    return _candidates(hashes, max_distance, len(hashes))[0]


def _candidates(hashes: Hashes, max_distance: int, long_run: int = _LONG_RUN) -> tuple[Pairs, list[NDArray[np.int64]]]:
    """(the near pairs within short runs of equal bands, sorted; the long runs, indices rising).

    Cut into max_distance + 2 bands, two such hashes agree in two bands at least, whatever bits they differ in. So for
    each two bands, hashes are sorted by these and only neighbours of equal bands are compared: all pairs are found, and
    of unrelated ones hardly any is looked at (of six million hashes at distance 4 some 200 million, of 18 trillion).
    """
    edges = np.linspace(0, 63, max_distance + 3).astype(int).tolist()
    bands = [((1 << high) - 1) ^ ((1 << low) - 1) for low, high in pairwise(edges)]
    found = [np.empty((0, 2), np.int64)]
    runs: dict[bytes, NDArray[np.int64]] = {}  # bands that are equal in all hashes make the same run again and again
    for one, other in combinations(bands, 2):
        key = hashes & np.uint64(one | other)
        order = np.argsort(key, kind="stable")
        key = key[order]
        edge = np.flatnonzero(np.r_[True, key[1:] != key[:-1], True][: len(key) + 1])
        length = np.diff(edge)
        for at in np.flatnonzero(length > long_run).tolist():
            run = order[edge[at] : edge[at + 1]]
            runs[hashlib.blake2b(run.tobytes(), digest_size=16).digest()] = run
        short = np.repeat(length <= long_run, length)
        start, step = np.flatnonzero(short), 0
        while len(start):  # each with the one that stands 1, 2, … places after it, as long as their bands agree
            step += 1
            start = start[start + step < len(key)]
            start = start[key[start] == key[start + step]]
            first, second = order[start], order[start + step]
            near = _distance(hashes[first], hashes[second]) <= max_distance
            found.append(np.stack([first[near], second[near]], axis=1))
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs, axis=0), list(runs.values())


def _distance(one: Hashes, other: Hashes) -> NDArray[np.int64]:
    """Bits in which they differ."""
    differing = one ^ other
    if hasattr(np, "bitwise_count"):  # numpy 2
        distance: NDArray[np.int64] = np.bitwise_count(differing).astype(np.int64)
    else:
        words = np.ascontiguousarray(differing).view(np.uint16).reshape(-1, 4)
        distance = _BITS[words].sum(axis=1, dtype=np.int64)
    return distance


_BITS = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)
