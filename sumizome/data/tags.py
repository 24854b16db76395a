"""Tags: how a caption file is read into them, how often each occurs, and what that makes of an image's loss.

Owns the spelling of a tag (spaces, not underscores; emoticons as they are), the counts and the tag-based loss weight
of report §4.3. Pure: text and Arrow columns in, numpy out. Notation: c_t the times that an epoch shows tag t.
"""

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sumizome.errors import ConfigError, DataError

__all__ = [
    "GENERAL",
    "KEPT_MARKER",
    "MAX_TAGS",
    "MAX_TAG_LENGTH",
    "ParsedTags",
    "TagPart",
    "TagWeightConfig",
    "load_tag_categories",
    "loss_weights",
    "normalise_tag",
    "parse_tags",
    "tag_counts",
    "tag_loss_weights",
    "tag_statistics",
]

MAX_TAGS = 2000
"""an image: the longest real lists hold some hundreds"""
MAX_TAG_LENGTH = 256
"""characters"""
KEPT_MARKER = "|||"
"""stands after the tags that are never moved or dropped (kohya's keep_tokens_separator)"""

_SEPARATORS = re.compile(r"[,\n\r]")
_TWO_LETTERS = re.compile(r"[^\W_]{2}")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class ParsedTags(NamedTuple):
    """Tags in the order of the file, each once."""

    tags: tuple[str, ...]
    kept: int
    """how many of them stood before `KEPT_MARKER`; 0 without a marker"""


def parse_tags(text: str) -> ParsedTags:
    """The tags of a caption: separated by commas or line ends, spelt by `normalise_tag`, doubles left out.

    Raises: DataError: control characters, a second marker, more than `MAX_TAGS`, longer than `MAX_TAG_LENGTH`.
    """
    if found := _CONTROL.search(text):
        raise DataError(f"expected text, found the control character {found.group()!r} at {found.start()}.")
    before, marker, after = text.partition(KEPT_MARKER)
    if KEPT_MARKER in after:
        raise DataError(f"expected one {KEPT_MARKER!r} at most, found two.")
    kept = _split(before)
    tags = tuple(dict.fromkeys(kept + _split(after)))
    if len(tags) > MAX_TAGS:
        raise DataError(f"expected at most {MAX_TAGS} tags, found {len(tags)}.")
    if (longest := max(map(len, tags), default=0)) > MAX_TAG_LENGTH:
        raise DataError(f"expected tags of at most {MAX_TAG_LENGTH} characters, found one of {longest}.")
    return ParsedTags(tags, len(dict.fromkeys(kept)) if marker else 0)


def _split(text: str) -> list[str]:
    return [tag for piece in _SEPARATORS.split(text) if (tag := normalise_tag(piece))]


def normalise_tag(text: str) -> str:
    """One tag as it is stored: underscores become spaces, runs of white space one space.

    An emoticon keeps its underscores (`^_^`, `o_o`, `>_<`, `(o)_(o)`, `||_||`): a tag is taken for one when no two
    letters or digits stand side by side in it.
    """
    tag = " ".join(text.split())
    if "_" not in tag or not _TWO_LETTERS.search(tag):
        return tag
    return " ".join(tag.replace("_", " ").split())


# --- counts -----------------------------------------------------------------------------------------------------------


def tag_counts(table: pa.Table, *, weigh_repeats: bool = False) -> pa.Table:
    """Columns `tag` (string) and `count` (int64), the most frequent first, equals in alphabetical order.

    Counts images; with `weigh_repeats` the times that an epoch shows the tag (column `repeats`).
    """
    vocabulary, codes, rows = _encode(table["tags"])
    repeats = table["repeats"].to_numpy() if weigh_repeats else np.ones(len(table), np.int64)
    counts = np.bincount(codes, weights=repeats[rows], minlength=len(vocabulary)).astype(np.int64)
    counted = pa.table({"tag": vocabulary, "count": counts})
    return counted.sort_by([("count", "descending"), ("tag", "ascending")])


def _encode(tags: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int32], NDArray[np.int64]]:
    """(vocabulary, index into it of each tag, row of each tag)."""
    encoded = pc.list_flatten(tags).dictionary_encode().unify_dictionaries()
    vocabulary = encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], pa.string())
    indices = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    codes = np.concatenate([np.empty(0, np.int32), *indices]).astype(np.int32, copy=False)
    lengths = pc.list_value_length(tags).to_numpy()
    return vocabulary, codes, np.repeat(np.arange(len(tags)), lengths)


# --- categories -------------------------------------------------------------------------------------------------------

GENERAL = "general"
"""the category of a tag that no list names"""

_BOORU_CATEGORIES = {"0": GENERAL, "1": "artist", "3": "copyright", "4": "character", "5": "meta"}
"""the numbers that booru tag dumps use for them"""


def load_tag_categories(path: Path) -> dict[str, str]:
    """tag → category from a CSV whose first row names the columns, `tag` and `category` among them.

    Tags are spelt as `normalise_tag` does; the numbers of booru dumps (0, 1, 3, 4, 5) become their names.
    Raises: DataError.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if missing := {"tag", "category"} - set(rows.fieldnames or ()):
                raise DataError(f"expected columns tag and category in {path}, found no {sorted(missing)[0]!r}.")
            return {
                normalise_tag(row["tag"] or ""): _BOORU_CATEGORIES.get(
                    row["category"] or "", row["category"] or GENERAL
                )
                for row in rows
            }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"expected tag categories as a CSV in UTF-8, found {path} unreadable: {error}.") from error


# --- loss weights -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TagWeightConfig:
    """How far the loss of an image follows the rarity of its tags. Source: report §4.3; formula and bounds are ours."""

    strength: float = 0.0
    """exponent s of (typical count / tag's count)^s; 0 = off: an effect to choose, not to inherit.
    0.5: a tag four times as common as typical weighs half. 1: in inverse proportion"""
    min_weight: float = 0.5
    """the least weight of an image's loss, (0, 1]; 0.5: no image trains at less than half of its share"""
    max_weight: float = 2.0
    """the greatest weight of an image's loss, at least 1; 2: no image counts for more than two"""
    min_count: int = 10
    """tags seen less often count as this often, in images an epoch; 10: what is rarer is mostly misspelling"""
    table: Path | None = None
    """a CSV that `sumizome tags` wrote, edited or not: the weights and categories of its tags are used in place of
    computed ones (strength and min_count have no say then; tags that it lacks weigh 1); the bounds still hold"""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 4:
            raise ConfigError(f"strength: expected 0 to 4, found {self.strength}.")
        if not 0 < self.min_weight <= 1 <= self.max_weight < float("inf"):
            raise ConfigError(
                f"min_weight, max_weight: expected 0 < min ≤ 1 ≤ max, found {self.min_weight}, {self.max_weight}."
            )
        if self.min_count < 1:
            raise ConfigError(f"min_count: expected at least 1, found {self.min_count}.")


Weights: TypeAlias = NDArray[np.float64]


def tag_loss_weights(
    table: pa.Table,
    config: TagWeightConfig,
    categories: Mapping[str, str] | None = None,
    given: Mapping[str, float] | None = None,
) -> Weights:
    """One loss weight an image, float64 [rows], within [min_weight, max_weight], of mean 1 over an epoch.

    A tag weighs (m / c_t)^strength, where m is the typical count of its category: the geometric mean over the
    category's occurrences. An image takes the mean over its tags of each category, then the mean of those (no tags: 1).
    A plain product over all tags would let richly tagged images collapse, and a plain mean would let thirty
    general tags drown the one character. Then all are scaled together and clipped, so that the mean is 1 with the
    bounds kept; the mean counts an image as often as it repeats.

    `table` needs `tags` and `repeats`. `given` has the weights of tags in place of the formula; others weigh 1 then.
    Source: report §4.3.
    """
    vocabulary, codes, _ = _encode(table["tags"])
    lengths = pc.list_value_length(table["tags"]).to_numpy()
    parts = [TagPart(0, lengths, codes)]
    repeats = table["repeats"].to_numpy()
    return loss_weights(lambda: parts, vocabulary.to_pylist(), repeats, config, categories, given)


class TagPart(NamedTuple):
    """The tags of some rows, as numbers into a vocabulary."""

    first: int
    """their first row"""
    lengths: NDArray[np.integer[Any]]
    """tags of each"""
    codes: NDArray[np.int32]


def loss_weights(
    parts: Callable[[], Iterable[TagPart]],
    vocabulary: Sequence[str],
    repeats: NDArray[np.integer[Any]],
    config: TagWeightConfig,
    categories: Mapping[str, str] | None = None,
    given: Mapping[str, float] | None = None,
) -> Weights:
    """`tag_loss_weights` of rows whose tags come in parts, twice over, so that millions are never held at once.

    Rows without repeats count for nothing and have a weight all the same.
    """
    if (config.strength == 0 and given is None) or not len(repeats):
        return np.ones(len(repeats))
    names, category = _categorise(vocabulary, categories or {})
    if given is None:
        counts = np.zeros(len(vocabulary))
        for part in parts():
            shown = np.repeat(repeats[part.first : part.first + len(part.lengths)], part.lengths)
            counts += np.bincount(part.codes, weights=shown, minlength=len(vocabulary))
        tag_weight = _tag_weights(counts, category, len(names), config)
    else:
        tag_weight = np.array([given.get(tag, 1.0) for tag in vocabulary], np.float64)
    raw = np.ones(len(repeats))
    for first, lengths, codes in parts():
        rows = np.repeat(np.arange(len(lengths)), lengths)
        mean = _mean_by_category(len(lengths), rows, tag_weight[codes], category[codes], len(names))
        raw[first : first + len(lengths)] = mean
    return _bounded_with_mean_one(raw, repeats.astype(np.float64), config.min_weight, config.max_weight)


def _tag_weights(counts: Weights, category: NDArray[np.int64], category_count: int, config: TagWeightConfig) -> Weights:
    """(typical count of the category / the tag's count)^strength, float64 [vocabulary]."""
    log_counts = np.log(np.maximum(counts, config.min_count))
    occurrences = np.maximum(np.bincount(category, weights=counts, minlength=category_count), 1)
    typical = np.bincount(category, weights=counts * log_counts, minlength=category_count) / occurrences
    weights: Weights = np.exp(config.strength * (typical[category] - log_counts))
    return weights


def tag_statistics(
    table: pa.Table,
    config: TagWeightConfig,
    categories: Mapping[str, str] | None = None,
    given: Mapping[str, float] | None = None,
) -> pa.Table:
    """What weighting does to each tag, the most frequent first.

    Columns: `tag`, `category`, `count` (times that an epoch shows it), `weight` (the tag's own) and `effective` (the
    sum of the loss weights of these showings: the count as training feels it). Arguments as of `tag_loss_weights`.
    """
    vocabulary, codes, rows = _encode(table["tags"])
    names, category = _categorise(vocabulary.to_pylist(), categories or {})
    shown = table["repeats"].to_numpy().astype(np.float64)
    felt = shown * tag_loss_weights(table, config, categories, given)
    counts, effective = (
        np.bincount(codes, weights=each[rows], minlength=len(vocabulary)).astype(np.float64) for each in (shown, felt)
    )
    if given is None:
        weights = _tag_weights(counts, category, len(names), config)
    else:
        weights = np.array([given.get(tag, 1.0) for tag in vocabulary.to_pylist()], np.float64)
    found = pa.table(
        {
            "tag": vocabulary,
            "category": pa.array(names).take(pa.array(category)),
            "count": counts.astype(np.int64),
            "weight": weights,
            "effective": effective,
        }
    )
    return found.sort_by([("count", "descending"), ("tag", "ascending")])


def _categorise(vocabulary: Sequence[str], categories: Mapping[str, str]) -> tuple[list[str], NDArray[np.int64]]:
    """(category names, index of each vocabulary entry's category)."""
    of_tag = [categories.get(tag, GENERAL) for tag in vocabulary]
    names = sorted(set(of_tag)) or [GENERAL]
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[name] for name in of_tag], np.int64)


def _mean_by_category(
    row_count: int, rows: NDArray[np.int64], weights: Weights, category: NDArray[np.int64], category_count: int
) -> Weights:
    """[rows]: the mean over an image's categories of the mean over its tags in each; 1 for an image without tags."""
    total, present = np.zeros(row_count), np.zeros(row_count, np.int64)
    for index in range(category_count):  # one category at a time: a table of rows × categories would be large
        mine = category == index
        tags = np.bincount(rows[mine], minlength=row_count)
        sums = np.bincount(rows[mine], weights=weights[mine], minlength=row_count)
        total += sums / np.maximum(tags, 1)
        present += tags > 0
    mean: Weights = np.where(present > 0, total / np.maximum(present, 1), 1.0)
    return mean


def _bounded_with_mean_one(raw: Weights, repeats: Weights, low: float, high: float) -> Weights:
    """clip(scale·raw, low, high) with the one scale that makes the mean 1.

    The mean grows with the scale, from `low` ≤ 1 to `high` ≥ 1, so bisection finds it.
    """
    share = repeats / repeats.sum()
    below, above = low / raw.max(), high / raw.min()
    for _ in range(64):
        scale = (below + above) / 2
        if float(np.clip(scale * raw, low, high) @ share) < 1:
            below = scale
        else:
            above = scale
    weights: Weights = np.clip(above * raw, low, high)
    return weights
