"""A manifest of millions of made-up booru pictures, the same for a seed, written as `write_manifest` writes one.

Sizes: illustrations by kind (portrait sheets, squares, landscape, screens, photographs' 3:2 and 4:3) with a spread
about each aspect and a log-normal area. Tags: about thirty of a vocabulary of 200 000 by Zipf's law (P(rank r) ∝ 1/r),
each picture's spread over all ranks, so that it has head tags and rare ones and hardly any twice.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from sumizome.data.manifest import SCHEMA, Manifest, write_manifest

__all__ = ["VOCABULARY", "made_sizes", "made_table", "make_manifest", "vocabulary"]

VOCABULARY = 200_000
_BLOCK = 250_000


def made_sizes(count: int, seed: int = 0) -> np.ndarray:
    """[count, 2] (height, width) px."""
    draw = np.random.Generator(np.random.PCG64([seed, 1]))
    aspects = np.array([1 / np.sqrt(2), 0.75, 2 / 3, 1.0, 4 / 3, np.sqrt(2), 16 / 9, 9 / 16, 0.8, 1.25])
    share = np.array([0.27, 0.14, 0.08, 0.12, 0.08, 0.08, 0.09, 0.05, 0.05, 0.04])
    aspect = aspects[draw.choice(len(aspects), count, p=share)] * np.exp(draw.normal(0, 0.06, count))
    area = np.exp(draw.normal(np.log(1500.0**2), 0.6, count))
    width = np.sqrt(area * aspect)
    return np.clip(np.rint(np.stack([width / aspect, width], axis=1)), 64, 16_000).astype(np.int64)


def vocabulary(seed: int = 0) -> pa.Array:
    """Tags of one to three made-up words, 4 to 30 letters, none twice."""
    draw = np.random.Generator(np.random.PCG64([seed, 2]))
    parts = np.array([a + b for a in "bdfghkmnrst" for b in "aeiou"])
    words = np.char.add(
        np.char.add(parts[draw.integers(0, 55, VOCABULARY)], parts[draw.integers(0, 55, VOCABULARY)]), " "
    )
    numbered = np.array([f"{number:x}" for number in range(VOCABULARY)])
    return pa.array(np.char.add(words, numbered))


def made_table(start: int, count: int, sizes: np.ndarray, words: pa.Array, seed: int = 0) -> pa.Table:
    """Rows start … start + count − 1 of the manifest."""
    draw = np.random.Generator(np.random.PCG64([seed, 3, start]))
    lengths = np.clip(draw.gamma(5.0, 6.0, count), 3, 120).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    stratum = (within + draw.random(offsets[-1])) / np.repeat(lengths, lengths)
    ranks = np.exp(stratum * np.log(VOCABULARY)).astype(np.int32) - 1
    tags = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), words.take(pa.array(ranks)))
    # Row numbers spread over all 64 bits by an odd factor: different, and in no order.
    ids = [f"{(number * 0x9E3779B97F4A7C15) % 2**64:016x}" for number in range(start, start + count)]
    return pa.table(
        {
            "id": ids,
            "source": np.zeros(count, np.int16),
            "path": [f"{number % 1000:04d}/{number}.jpg" for number in range(start, start + count)],
            "sha256": [sample_id * 4 for sample_id in ids],
            "file_bytes": draw.integers(50_000, 5_000_000, count),
            "format": ["JPEG"] * count,
            "height": sizes[start : start + count, 0].astype(np.int32),
            "width": sizes[start : start + count, 1].astype(np.int32),
            "tags": tags,
            "kept_tags": np.zeros(count, np.int16),
            "repeats": np.ones(count, np.int32),
        },
        schema=SCHEMA,
    )


def make_manifest(path: Path, count: int, seed: int = 0) -> None:
    """Writes it, unless it is there."""
    if path.is_file():
        return
    sizes, words = made_sizes(count, seed), vocabulary(seed)
    blocks = [made_table(start, min(_BLOCK, count - start), sizes, words, seed) for start in range(0, count, _BLOCK)]
    write_manifest(Manifest(pa.concat_tables(blocks), (Path("/pictures"),)), path)
