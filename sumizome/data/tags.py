"""Tags: how a caption file is read into them, how often each occurs, and what that makes of an image's loss.

Owns the spelling of a tag (spaces, not underscores; emoticons as they are), the counts and the tag-based loss weight
of report §4.3. Pure: text and Arrow columns in, numpy out. Notation: c_t the times that an epoch shows tag t.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sumizome.data.csv_table import read_csv
from sumizome.data.tag_codes import CodedTags, code_tags
from sumizome.errors import ConfigError, DataError

__all__ = [
    "GENERAL",
    "KEPT_MARKER",
    "MAX_TAGS",
    "MAX_TAG_LENGTH",
    "ParsedTags",
    "TagWeightConfig",
    "Weighed",
    "load_tag_categories",
    "loss_weights",
    "normalise_tag",
    "parse_tags",
    "tag_counts",
    "tag_loss_weights",
    "tag_statistics",
    "weigh",
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
    coded = code_tags(table["tags"])
    counts = coded.sums(table["repeats"].to_numpy() if weigh_repeats else None).astype(np.int64)
    counted = pa.table({"tag": coded.vocabulary, "count": counts})
    return counted.sort_by([("count", "descending"), ("tag", "ascending")])


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
            rows = read_csv(file, path)
            if missing := {"tag", "category"} - set(rows.fieldnames or ()):
                raise DataError(f"expected columns tag and category in {path}, found no {sorted(missing)[0]!r}.")
            pairs = ((normalise_tag(row["tag"] or ""), (row["category"] or "").strip()) for row in rows)
            return {tag: _BOORU_CATEGORIES.get(category, category or GENERAL) for tag, category in pairs}
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
    if config.strength == 0 and given is None:
        return np.ones(len(table))
    return loss_weights(code_tags(table["tags"]), table["repeats"].to_numpy(), config, categories, given)


def loss_weights(
    coded: CodedTags,
    repeats: NDArray[np.integer[Any]],
    config: TagWeightConfig,
    categories: Mapping[str, str] | None = None,
    given: Mapping[str, float] | None = None,
) -> Weights:
    """`tag_loss_weights` of tags that are numbers already. Rows without repeats count for nothing, but have one."""
    if (config.strength == 0 and given is None) or not len(repeats):
        return np.ones(len(repeats))
    shown = repeats.astype(np.float64)
    names, category = _categorise(coded.vocabulary, categories or {})
    tag_weight = _weigh_tags(coded, shown, category, len(names), config, given)
    return _image_weights(coded, tag_weight, category, len(names), shown, config)


def _weigh_tags(
    coded: CodedTags,
    repeats: Weights,
    category: NDArray[np.int64],
    category_count: int,
    config: TagWeightConfig,
    given: Mapping[str, float] | None,
) -> Weights:
    """The weight of each entry of the vocabulary: computed, or as given."""
    if given is None:
        return _tag_weights(coded.sums(repeats), category, category_count, config)
    return np.array([given.get(tag, 1.0) for tag in coded.vocabulary.to_pylist()], np.float64)


def _image_weights(
    coded: CodedTags,
    tag_weight: Weights,
    category: NDArray[np.int64],
    category_count: int,
    repeats: Weights,
    config: TagWeightConfig,
) -> Weights:
    raw = _mean_by_category(coded, tag_weight, category, category_count)
    return _bounded_with_mean_one(raw, repeats, config.min_weight, config.max_weight)


def _tag_weights(counts: Weights, category: NDArray[np.int64], category_count: int, config: TagWeightConfig) -> Weights:
    """(typical count of the category / the tag's count)^strength, float64 [vocabulary]."""
    log_counts = np.log(np.maximum(counts, config.min_count))
    occurrences = np.maximum(np.bincount(category, weights=counts, minlength=category_count), 1)
    typical = np.bincount(category, weights=counts * log_counts, minlength=category_count) / occurrences
    weights: Weights = np.exp(config.strength * (typical[category] - log_counts))
    return weights


class Weighed(NamedTuple):
    """What weighting makes of a data set."""

    images: Weights
    """as of `tag_loss_weights`"""
    tags: pa.Table
    """as of `tag_statistics`"""


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
    return weigh(code_tags(table["tags"]), table["repeats"].to_numpy(), config, categories, given).tags


def weigh(
    coded: CodedTags,
    repeats: NDArray[np.integer[Any]],
    config: TagWeightConfig,
    categories: Mapping[str, str] | None = None,
    given: Mapping[str, float] | None = None,
) -> Weighed:
    """`loss_weights` and `tag_statistics` at once."""
    names, category = _categorise(coded.vocabulary, categories or {})
    shown = repeats.astype(np.float64)
    weights = _weigh_tags(coded, shown, category, len(names), config, given)
    images = np.ones(len(repeats))
    if len(repeats) and (config.strength > 0 or given is not None):
        images = _image_weights(coded, weights, category, len(names), shown, config)
    found = pa.table(
        {
            "tag": coded.vocabulary,
            "category": pa.array(names).take(pa.array(category)),
            "count": coded.sums(shown).astype(np.int64),
            "weight": weights,
            "effective": coded.sums(shown * images),
        }
    )
    return Weighed(images, found.sort_by([("count", "descending"), ("tag", "ascending")]))


def _categorise(vocabulary: pa.Array, categories: Mapping[str, str]) -> tuple[list[str], NDArray[np.int64]]:
    """(category names, index of each vocabulary entry's category)."""
    of_tag = [categories.get(tag, GENERAL) for tag in vocabulary.to_pylist()]
    names = sorted(set(of_tag)) or [GENERAL]
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([index[name] for name in of_tag], np.int64)


def _mean_by_category(
    coded: CodedTags, tag_weight: Weights, category: NDArray[np.int64], category_count: int
) -> Weights:
    """[rows]: the mean over an image's categories of the mean over its tags in each; 1 for an image without tags."""
    means = []
    for lengths, codes in coded.batches():
        cell = np.repeat(np.arange(len(lengths)) * category_count, lengths) + category[codes]
        cells = len(lengths) * category_count
        tags = np.bincount(cell, minlength=cells).reshape(-1, category_count)
        sums = np.bincount(cell, weights=tag_weight[codes], minlength=cells).reshape(-1, category_count)
        present = (tags > 0).sum(axis=1)
        total = (sums / np.maximum(tags, 1)).sum(axis=1)
        means.append(np.where(present > 0, total / np.maximum(present, 1), 1.0))
    return np.concatenate([np.empty(0), *means])


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
