"""Tags as numbers: a column of tag lists as one vocabulary and, batch by batch, indices into it.

Owns the encoding. Invariant: memory beyond the column itself grows with the vocabulary and with one batch, not with the
number of tags: of six million pictures with thirty tags each, no array of 180 million entries is made. Strings and
dictionary-encoded strings give the same vocabulary in the same order, that of first appearance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["CodedTags", "code_tags"]

_BATCH = 65_536
"""pictures whose tags are numbers at the same time"""


@dataclass(frozen=True, eq=False)
class CodedTags:
    """A column of tag lists, read as often as asked for."""

    vocabulary: pa.Array
    """each tag once, string, in the order of first appearance"""
    column: pa.ChunkedArray
    places: tuple[NDArray[np.int32], ...]
    """of each batch: the place in the vocabulary of each entry of the batch's own"""

    def batches(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """(number of tags of each picture, all their indices into the vocabulary), some pictures at a time."""
        for lists, place in zip(_slices(self.column), self.places, strict=True):
            lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
            yield lengths, place[_dictionary(lists).indices.to_numpy()]

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
    vocabulary, places = pa.array([], pa.string()), []
    for lists in _slices(column):
        own = _dictionary(lists).dictionary.cast(pa.string())
        place = pc.index_in(own, vocabulary)
        new = own.filter(pc.is_null(place))
        if len(new):
            vocabulary = pa.concat_arrays([vocabulary, new])
            place = pc.index_in(own, vocabulary)
        places.append(place.to_numpy().astype(np.int32))
    return CodedTags(vocabulary, column, tuple(places))


def _slices(column: pa.ChunkedArray) -> Iterator[pa.ListArray]:
    for chunk in column.chunks:
        for first in range(0, len(chunk), _BATCH):
            yield chunk.slice(first, _BATCH)


def _dictionary(lists: pa.ListArray) -> pa.DictionaryArray:
    """The tags of some lists, with a dictionary of just these, in the order of first appearance."""
    tags = lists.flatten()
    return (tags.cast(pa.string()) if pa.types.is_dictionary(tags.type) else tags).dictionary_encode()
