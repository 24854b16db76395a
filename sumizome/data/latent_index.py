"""The rows of a latent cache as columns: what each sample is and where its latent lies.

Owns reading the units' indexes, joining them, and their rows as training asks for them; the latents themselves are
`latents`'. The invariant: columns are flat arrays of small numbers (strings are bytes and where they end), so that they
lie as well in a mapped file (`index_cache`) as in memory, and six million rows are no Python objects.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, UInt8, UInt64

from sumizome.data.latent_plan import Fingerprint
from sumizome.data.shards import INDEX_SCHEMA, UnitRecord, unit_paths
from sumizome.data.tag_codes import CodedTags
from sumizome.errors import ShardError

__all__ = ["LatentIndex", "Strings", "column_parts", "join_parts", "load_unit_index", "picture_hashes"]

_PART = 65_536
"""rows whose tags are looked at together"""


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings one behind the other in UTF-8."""

    text: UInt8[np.ndarray, " bytes"]
    ends: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: int) -> str:
        start = int(self.ends[place - 1]) if place else 0
        return self.text[start : int(self.ends[place])].tobytes().decode()

    def tolist(self) -> list[str]:
        text, starts = self.text.tobytes(), [0, *self.ends.tolist()]
        return [text[start:end].decode() for start, end in itertools.pairwise(starts)]


@dataclass(frozen=True, eq=False)
class LatentIndex:
    """The rows of a cache, in memory or mapped."""

    columns: Mapping[str, np.ndarray]
    """as `column_parts` makes them"""
    variants: int = 1
    """Latents of each picture: rows p·variants … (p + 1)·variants − 1 are one, cropped or mirrored otherwise."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def unit(self) -> Int[np.ndarray, " n"]:
        return self.columns["unit"]

    @property
    def row(self) -> Int[np.ndarray, " n"]:
        """Of the bucket's tensor in the unit."""
        return self.columns["row"]

    @property
    def bucket(self) -> Int[np.ndarray, " n"]:
        """Row of the bucket table."""
        return self.columns["bucket"]

    @property
    def original(self) -> Int[np.ndarray, "n 2"]:
        """(height, width) px."""
        return self.columns["original"]

    @property
    def crop(self) -> Int[np.ndarray, "n 2"]:
        """(top, left) px of the resized picture."""
        return self.columns["crop"]

    @property
    def kept_tags(self) -> Int[np.ndarray, " n"]:
        return self.columns["kept_tags"]

    @property
    def repeats(self) -> Int[np.ndarray, " n"]:
        return self.columns["repeats"]

    @property
    def crc32(self) -> Int[np.ndarray, " n"]:
        return self.columns["crc32"]

    @property
    def picture_hash(self) -> UInt64[np.ndarray, " n"]:
        """As `picture_hashes`."""
        return self.columns["picture_hash"]

    @cached_property
    def order(self) -> str:
        """SHA-256 hex of which sample stands in which row, in which bucket and how often it is shown.

        With its settings a run's order follows from these alone. A fingerprint does not decide them: a folder that grew
        over two manifests holds the same samples in another order than one that was made of the second at once.
        """
        digest = hashlib.sha256()
        for column in (self.columns["id_text"], self.columns["id_ends"], self.bucket, self.repeats):
            digest.update(np.ascontiguousarray(column, column.dtype.newbyteorder("<")).data)
        return digest.hexdigest()

    @cached_property
    def vocabulary(self) -> Strings:
        """Each tag once; `tag_codes` point into it."""
        return Strings(self.columns["vocabulary_text"], self.columns["vocabulary_ends"])

    @cached_property
    def _word(self) -> Callable[[int], str]:
        """A word of the vocabulary; most come again within a few batches."""
        return lru_cache(maxsize=1 << 14)(self.vocabulary.__getitem__)

    def pictures(self) -> Int[np.ndarray, " p"]:
        """The first row of each picture: what a plan draws from."""
        return np.arange(0, len(self), self.variants)

    def ids(self, rows: Int[np.ndarray, " b"]) -> list[str]:
        """The sample ids of some rows."""
        ids = Strings(self.columns["id_text"], self.columns["id_ends"])
        return [ids[row] for row in rows.tolist()]

    def tag_lists(self, rows: Int[np.ndarray, " b"]) -> list[list[str]]:
        """The tags of some rows, in the order of the caption file."""
        codes, ends, word = self.columns["tag_codes"], self.columns["tag_ends"], self._word
        spans = [(int(ends[row - 1]) if row else 0, int(ends[row])) for row in rows.tolist()]
        return [[word(code) for code in codes[start:end].tolist()] for start, end in spans]

    def coded_tags(self) -> CodedTags:
        """All rows' tags as `tags.loss_weights` takes them; the codes stay where they are."""
        codes, ends = self.columns["tag_codes"], self.columns["tag_ends"]
        lengths, parts = [], []
        for first in range(0, len(self), _PART):
            mine = np.asarray(ends[first : first + _PART])
            start = int(ends[first - 1]) if first else 0
            lengths.append(np.diff(mine, prepend=start).astype(np.int32))
            parts.append(codes[start : int(mine[-1])])
        return CodedTags(pa.array(self.vocabulary.tolist(), pa.string()), tuple(lengths), tuple(parts))


def picture_hashes(ids: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    """A number for each sample id, uniform over 64 bits; byte-identical copies ("…-2") have the first one's."""
    names = (f"validation {sample_id.partition('-')[0]}".encode() for sample_id in ids)
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(digests, np.uint64)


def load_unit_index(root: Path, record: UnitRecord) -> pa.Table:
    _, path, _ = unit_paths(root, record.unit, record.overlay)
    # Tags as numbers into a vocabulary: a third of the memory, and they read back as the same strings.
    with pq.ParquetFile(path, read_dictionary=["tags.list.element"]) as file:
        names = file.schema_arrow.names
        table = file.read([name for name in names if name != "sha256"])
    if names != INDEX_SCHEMA.names:
        raise ShardError(f"{path} has columns {names}; this version reads {INDEX_SCHEMA.names}")
    return table


def join_parts(parts: Iterable[dict[str, np.ndarray]]) -> LatentIndex:
    """The units' columns (`column_parts`) as one index, in memory."""
    found: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for name, array in part.items():
            found.setdefault(name, []).append(array)
    return LatentIndex({name: np.concatenate(arrays) for name, arrays in found.items()})


def column_parts(tables: Iterable[pa.Table], fingerprint: Fingerprint) -> Iterator[dict[str, np.ndarray]]:
    """A unit's columns at a time, each to be put behind the ones before; the vocabulary comes last."""
    vocabulary: dict[str, int] = {}
    id_bytes = tag_count = 0
    canvases = np.array(fingerprint.buckets, np.int32).reshape(-1, 2)
    for unit, table in enumerate(tables):
        if not np.array_equal(table["variant"].to_numpy(), np.arange(len(table)) % fingerprint.variants):
            raise ShardError(
                f"an index does not have {fingerprint.variants} variants of each picture; run `sumizome prepare` again"
            )
        ids = table["id"].to_pylist()
        encoded = [sample_id.encode() for sample_id in ids]
        codes, lengths = _tag_codes(table["tags"], vocabulary)
        yield {
            "unit": np.full(len(table), unit, np.int32),
            "row": table["row"].to_numpy(),
            "bucket": _bucket_of(_pair(table, "bucket_h", "bucket_w"), canvases),
            "original": _pair(table, "original_h", "original_w"),
            "crop": _pair(table, "crop_top", "crop_left"),
            "kept_tags": table["kept_tags"].to_numpy(),
            "repeats": table["repeats"].to_numpy(),
            "crc32": table["crc32"].to_numpy().astype(np.int64),
            "picture_hash": picture_hashes(ids),
            "id_text": np.frombuffer(b"".join(encoded), np.uint8),
            "id_ends": id_bytes + np.cumsum([len(each) for each in encoded], dtype=np.int64),
            "tag_codes": codes,
            "tag_ends": tag_count + np.cumsum(lengths, dtype=np.int64),
        }
        id_bytes += sum(map(len, encoded))
        tag_count += len(codes)
    words = [word.encode() for word in vocabulary]
    yield {
        "vocabulary_text": np.frombuffer(b"".join(words), np.uint8),
        "vocabulary_ends": np.cumsum([len(word) for word in words], dtype=np.int64),
    }


def _pair(table: pa.Table, first: str, second: str) -> Int[np.ndarray, "n 2"]:
    return np.stack([table[first].to_numpy(), table[second].to_numpy()], axis=1)


def _bucket_of(sides: Int[np.ndarray, "n 2"], canvases: Int[np.ndarray, "k 2"]) -> Int[np.ndarray, " n"]:
    bucket = np.full(len(sides), -1, np.int16)
    for number, canvas in enumerate(canvases):
        bucket[(sides == canvas).all(axis=1)] = number
    return bucket


def _tag_codes(
    tags: pa.ChunkedArray, vocabulary: dict[str, int]
) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"]]:
    """(codes into `vocabulary`, which grows by what is new, number of tags of each row)."""
    codes, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for chunk in tags.chunks:
        values = chunk.flatten()
        known = [vocabulary.setdefault(tag, len(vocabulary)) for tag in values.dictionary.to_pylist()]
        codes.append(np.array(known, np.int32)[values.indices.to_numpy()] if known else codes[0])
        lengths.append(chunk.value_lengths().to_numpy())
    return np.concatenate(codes), np.concatenate(lengths)
