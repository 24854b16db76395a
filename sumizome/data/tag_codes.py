"""Tags as numbers: a column of tag lists as one vocabulary and an index into it for each tag.

Owns the encoding. Invariant: four bytes a tag are kept, and what is computed of them is computed some pictures at a
time, so that nothing else grows with the number of tags: six million pictures with thirty tags each have 180 million.
Plain and dictionary-encoded strings give the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["CodedTags", "code_parts", "code_tags"]

_BATCH = 65_536
"""pictures whose tags are numbers at the same time"""


@dataclass(frozen=True, eq=False)
class CodedTags:
    """A column of tag lists, to be read as often as needed."""

    vocabulary: pa.Array
    """each tag once, string, in the order of first appearance"""
    lengths: tuple[NDArray[np.integer[Any]], ...]
    """number of tags of each picture, batch by batch"""
    codes: tuple[NDArray[np.integer[Any]], ...]
    """indices into the vocabulary of all tags of a batch, one picture after another"""

    def batches(self) -> Iterator[tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]]:
        """(number of tags of each picture, all their indices into the vocabulary), some pictures at a time."""
        return zip(self.lengths, self.codes, strict=True)

    def sums(self, weights: NDArray[np.generic] | None = None) -> NDArray[np.float64]:
        """[vocabulary]: the sum of the weights [pictures] of those that bear a tag; without weights, their count."""
        total = np.zeros(len(self.vocabulary))
        first = 0
        for lengths, codes in self.batches():
            each = None if weights is None else np.repeat(weights[first : first + len(lengths)], lengths)
            total += np.bincount(codes, weights=each, minlength=len(total))
            first += len(lengths)
        return total


def code_tags(column: pa.ChunkedArray) -> CodedTags:
    """The vocabulary of a column of lists of strings (plain or dictionary-encoded), and the column as numbers."""
    return code_parts([column])


def code_parts(columns: Iterable[pa.ChunkedArray]) -> CodedTags:
    """The same of a column that comes in parts, of which one is held at a time."""
    vocabulary, lengths, codes = pa.array([], pa.string()), [], []
    for lists in (lists for column in columns for lists in _slices(column)):
        own, indices = _encode(lists.flatten())
        place = pc.index_in(own, vocabulary)
        new = own.filter(pc.is_null(place))
        if len(new):
            vocabulary = pa.concat_arrays([vocabulary, new])
            place = pc.index_in(own, vocabulary)
        lengths.append(pc.list_value_length(lists).to_numpy().astype(np.int64))
        codes.append(place.to_numpy().astype(np.int32)[indices])
    return CodedTags(vocabulary, tuple(lengths), tuple(codes))


def _slices(column: pa.ChunkedArray) -> Iterator[pa.ListArray]:
    for chunk in column.chunks:
        for first in range(0, len(chunk), _BATCH):
            yield chunk.slice(first, _BATCH)


def _encode(tags: pa.Array) -> tuple[pa.Array, NDArray[np.int32]]:
    """(the different tags in the order of first appearance, index into these of each tag)."""
    if not pa.types.is_dictionary(tags.type):
        encoded = tags.dictionary_encode()
        return encoded.dictionary, encoded.indices.to_numpy()
    encoded = tags.indices.dictionary_encode()  # numbers instead of texts; and entries that nothing uses fall away
    return tags.dictionary.take(encoded.dictionary).cast(pa.string()), encoded.indices.to_numpy()
