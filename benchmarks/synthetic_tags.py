"""Lists of made-up tags: booru-like lengths, a long-tailed vocabulary with categories; the same for a seed."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from sumizome.data.manifest import SCHEMA

__all__ = ["synthetic_categories", "synthetic_tags", "vocabulary"]

_BATCH = 250_000


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
