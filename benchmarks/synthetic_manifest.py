"""A manifest of any size written by code: booru-like lengths of tag lists, a long-tailed vocabulary, usual sizes.

Owns the recipe; the same count gives the same bytes. Pictures of it exist nowhere.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from sumizome.data.manifest import SCHEMA, Manifest

__all__ = ["synthetic_categories", "synthetic_manifest", "synthetic_tags"]

_BATCH = 250_000
_SIDES = ((1024, 1024), (1216, 832), (1400, 1000), (1800, 1200), (900, 1600), (700, 500), (2048, 1448), (512, 512))


def synthetic_tags(count: int, mean_tags: float, vocabulary: Sequence[str], seed: int = 0) -> pa.ChunkedArray:
    """Lists of tags: lengths of a negative binomial law, tags by Zipf's law, doubles within a list left in."""
    words, chunks = pa.array(vocabulary, pa.string()), []
    share = np.cumsum(1 / np.arange(1, len(words) + 1) ** 1.02)
    for first in range(0, count, _BATCH):
        random = np.random.default_rng([seed, first])
        rows = min(_BATCH, count - first)
        lengths = np.minimum(random.negative_binomial(6, 6 / (6 + mean_tags), rows), 300)
        drawn = np.searchsorted(share, random.random(int(lengths.sum())) * share[-1]).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), words.take(pa.array(drawn))))
    return pa.chunked_array(chunks).cast(SCHEMA.field("tags").type)


def vocabulary(size: int) -> list[str]:
    """Tags of one to four short words, all different."""
    syllables = ("ka", "mi", "so", "ru", "ten", "shi", "bow", "red", "hat", "long", "eye", "sky", "(x)", "blue", "_o")
    base = len(syllables)
    return [
        " ".join(syllables[index // base**place % base] for place in range(1 + index % 4)) + f" {index}"
        for index in range(size)
    ]


def synthetic_categories(words: Sequence[str]) -> dict[str, str]:
    """A twentieth artists, a tenth characters, a fiftieth series; the rest general."""
    kinds = {3: "artist", 7: "character", 13: "character", 17: "copyright", 19: "meta"}
    return {word: kinds[index % 20] for index, word in enumerate(words) if index > 100 and index % 20 in kinds}


def synthetic_manifest(count: int, mean_tags: float = 30.0, words: int = 200_000) -> Manifest:
    """A sound manifest of `count` rows."""
    random = np.random.default_rng(1)
    names = vocabulary(words)
    sides = np.array(_SIDES)[random.integers(0, len(_SIDES), count)] * random.uniform(0.6, 1.4, (count, 1))
    height, width = np.maximum(16, sides * random.uniform(0.85, 1.18, (count, 2))).astype(np.int32).T
    digests = pa.array([f"{index:016x}" + "0" * 48 for index in range(count)])
    columns = {
        "id": pa.array([f"{index:016x}" for index in range(count)]),
        "source": np.zeros(count, np.int16),
        "path": pa.array([f"{index % 1000:03d}/{index}.png" for index in range(count)]),
        "sha256": digests,
        "file_bytes": random.integers(50_000, 3_000_000, count),
        "format": pa.array(np.array(["PNG", "JPEG", "WEBP"])[random.integers(0, 3, count)]),
        "height": height,
        "width": width,
        "tags": synthetic_tags(count, mean_tags, names),
        "kept_tags": np.zeros(count, np.int16),
        "repeats": np.ones(count, np.int32),
    }
    return Manifest(pa.table(columns, schema=SCHEMA), (Path("/nowhere"),), categories=synthetic_categories(names))
