"""What the tags of a manifest are: categories, the long tail, what loss weighting makes of both, tokens of captions.

Owns the figures of the page's middle sections. Counts are of the whole manifest; tokens are those of a random sample
where the manifest is large, and say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sumizome.data.captions import CaptionConfig, plain_caption, unknown_groups
from sumizome.data.manifest import ManifestRows
from sumizome.data.tag_table import FrequencyClass, frequency_classes
from sumizome.data.tags import TagWeightConfig
from sumizome.models.text_encoding import count_chunks
from sumizome.report.charts import Chart, histogram, rank_frequency

__all__ = ["CategoryRow", "Tags", "Tokens", "Weights", "describe_tags", "describe_tokens", "describe_weights"]

_SHOWN = 24
"""most frequent tags shown of each category"""
_DERIVED = ("rating", "quality", "year")
"""categories whose tags are shown as a distribution"""
_WINDOW = 25_000
"""captions that are text at the same time"""


@dataclass(frozen=True)
class CategoryRow:
    name: str
    tags: int
    showings: int
    once: int
    """tags that an epoch shows once"""
    common: list[tuple[str, int]]
    """(tag, showings), the most frequent first"""


@dataclass(frozen=True)
class Tags:
    """The vocabulary."""

    count: int
    showings: int
    """of all tags in an epoch"""
    rare: int
    """tags seen less often than `TagWeightConfig.min_count`"""
    min_count: int
    categories: list[CategoryRow]
    derived: list[tuple[str, list[tuple[str, int]]]]
    """(category, its tags and showings in alphabetical order) of rating, quality and year"""
    classes: list[FrequencyClass]
    head: list[tuple[str, str, int, float, float]]
    """(tag, category, showings, tag's weight, effective showings) of the most frequent"""
    tail: list[tuple[str, str, int, float, float]]
    """the same of the rarest"""
    curve: Chart
    most: tuple[str, float]
    """the most frequent tag and the share of showings that bear it"""
    unknown_groups: list[str]
    """as of `captions.unknown_groups`"""


def describe_tags(found: pa.Table, showings: int, min_count: int, captions: CaptionConfig) -> Tags:
    """The vocabulary as `tags.tag_statistics` found it, of so many showings of pictures."""
    counts, effective = found["count"].to_numpy(), found["effective"].to_numpy()
    names = [row["values"] for row in pc.value_counts(found["category"]).to_pylist()]
    rows = [_category(found, name) for name in names]
    curve = rank_frequency(
        "Frequency of tags by rank",
        [("showings an epoch", counts.astype(np.float64)), ("with loss weights", np.sort(effective)[::-1])],
    )
    return Tags(
        count=len(found),
        showings=int(counts.sum()),
        rare=int((counts < min_count).sum()),
        min_count=min_count,
        categories=sorted(rows, key=lambda row: -row.showings),
        derived=[(name, _all_of(found, name)) for name in _DERIVED if name in names],
        classes=frequency_classes(found),
        head=_rows(found.slice(0, 10)),
        tail=_rows(found.slice(max(10, len(found) - 10))),
        curve=curve,
        most=(found["tag"][0].as_py(), float(counts[0]) / showings) if len(found) else ("", 0.0),
        unknown_groups=unknown_groups(captions, names),
    )


def _of(found: pa.Table, category: str) -> pa.Table:
    return found.filter(pc.equal(found["category"], category))


def _category(found: pa.Table, name: str) -> CategoryRow:
    mine = _of(found, name)
    counts = mine["count"].to_numpy()
    common = [(row["tag"], row["count"]) for row in mine.slice(0, _SHOWN).to_pylist()]
    return CategoryRow(name, len(mine), int(counts.sum()), int((counts == 1).sum()), common)


def _all_of(found: pa.Table, name: str) -> list[tuple[str, int]]:
    return sorted((row["tag"], row["count"]) for row in _of(found, name).slice(0, 60).to_pylist())


def _rows(found: pa.Table) -> list[tuple[str, str, int, float, float]]:
    return [(r["tag"], r["category"], r["count"], r["weight"], r["effective"]) for r in found.to_pylist()]


# --- loss weights -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The loss weights of the pictures."""

    strength: float
    from_table: bool
    bounds: tuple[float, float]
    at_least: int
    """pictures at the lower bound"""
    at_most: int
    deciles: list[float]
    """of the pictures: 0, 10, …, 100 %"""
    chart: Chart
    lightest: list[int]
    """rows of the manifest"""
    heaviest: list[int]
    unused: list[str]
    """as of `tag_table.unused_rows`"""


def describe_weights(weights: NDArray[np.float64], config: TagWeightConfig, unused: list[str]) -> Weights:
    """The distribution and the extremes of the weights of all pictures."""
    low, high = config.min_weight, config.max_weight
    edges = np.geomspace(low, high, 25)
    counts, _ = np.histogram(np.clip(weights, low, high), bins=np.r_[edges[:-1], high * (1 + 1e-9)])
    return Weights(
        strength=config.strength,
        from_table=config.table is not None,
        bounds=(low, high),
        at_least=int((weights <= low * (1 + 1e-9)).sum()),
        at_most=int((weights >= high * (1 - 1e-9)).sum()),
        deciles=np.quantile(weights, np.linspace(0, 1, 11)).tolist(),
        chart=histogram(
            "Pictures by loss weight",
            counts.tolist(),
            edges.tolist(),
            "loss weight (logarithmic; 1 is the mean)",
            label=lambda edge: f"{edge:.2f}",
        ),
        lightest=_extremes(weights, 4),
        heaviest=_extremes(-weights, 4),
        unused=unused,
    )


def _extremes(weights: NDArray[np.float64], count: int) -> list[int]:
    """The rows of the least weights; of equal ones the first."""
    some = np.argpartition(weights, min(count, len(weights) - 1))[:count]
    return [int(row) for row in some[np.lexsort((some, weights[some]))]]


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """What the captions need of the text encoders' 75-token chunks."""

    looked_at: int
    sampled: bool
    max_chunks: int
    chunks: list[tuple[int, int]]
    """(chunks needed, captions)"""
    cut: int
    """captions that need more than `max_chunks`; an estimate where sampled"""
    mean: float
    """tokens"""
    longest: int
    chart: Chart
    examples: list[tuple[int, int, int]]
    """(row of the manifest, tokens, chunks) of the longest captions"""


def describe_tokens(
    manifest: ManifestRows, config: CaptionConfig, categories: Mapping[str, str], max_chunks: int, sample: int
) -> Tokens:
    """The chunks that plain captions need (all tags, nothing dropped by chance), of a random `sample` of them."""
    total = len(manifest)
    rows = np.arange(total)
    if total > sample:
        rows = np.sort(np.random.default_rng(0).choice(total, sample, replace=False))
    counted = np.concatenate(
        [
            count_chunks(_captions(manifest, rows[first : first + _WINDOW], config, categories))
            for first in range(0, len(rows), _WINDOW)
        ]
    )
    tokens, chunks = counted[:, 0], counted[:, 1]
    cut = float((chunks > max_chunks).mean()) * total
    step = 25
    counts = np.bincount(np.minimum(tokens // step, 24), minlength=2)
    order = np.argsort(-tokens, kind="stable")[:5]
    return Tokens(
        looked_at=len(rows),
        sampled=total > sample,
        max_chunks=max_chunks,
        chunks=[(need, int((chunks == need).sum())) for need in np.unique(chunks).tolist()],
        cut=round(cut),
        mean=float(tokens.mean()),
        longest=int(tokens.max()),
        chart=histogram(
            "Captions by tokens",
            counts.tolist(),
            [step * index for index in range(len(counts) + 1)],
            "tokens (CLIP's, without begin and end); a chunk holds 75",
            y_title="captions",
        ),
        examples=[(int(rows[at]), int(tokens[at]), int(chunks[at])) for at in order.tolist()],
    )


def _captions(
    manifest: ManifestRows, rows: NDArray[np.int64], config: CaptionConfig, categories: Mapping[str, str]
) -> Sequence[str]:
    some = manifest.take(rows, ["tags", "kept_tags"]).to_pydict()
    pairs = zip(some["tags"], some["kept_tags"], strict=True)
    return [plain_caption(tags, kept, config, categories=categories) for tags, kept in pairs]
