"""What the pictures of a manifest are: where from, how large, and what bucketing does to them.

Owns the figures of the page's first sections, all from whole columns: no Python object a picture.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sumizome.data.buckets import BucketReport, Canvases, assign_buckets, bucket_report, cover_sizes, crop_share
from sumizome.data.manifest import RECORD_VERSION, ManifestRows, picture_sizes
from sumizome.report.charts import Chart, density, histogram

__all__ = ["BucketRow", "Buckets", "Pictures", "SourceRow", "count_values", "describe_buckets", "describe_pictures"]

ENLARGED = 1.5
"""times: beyond it a picture is mentioned, as its training pixels are mostly interpolated"""
CROPPED = 0.25
"""share cut off: beyond it a picture is mentioned"""

_NARROW = 430.0
"""width of a drawing that stands beside two others"""

_RATINGS = 12
"""most frequent ones shown"""

_SIDES = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class SourceRow:
    """One folder."""

    folder: str
    pictures: int
    showings: int
    bytes: int


@dataclass(frozen=True)
class Pictures:
    """Counts of the whole manifest."""

    count: int
    showings: int
    bytes: int
    sources: list[SourceRow]
    formats: list[tuple[Any, int]]
    repeats: list[tuple[Any, int]]
    """(repeats, pictures), rising"""
    untagged: int
    kept: int
    """pictures whose caption has tags that are never moved"""
    doubled: int
    """pictures whose bytes another row has, too"""
    sizes: Chart
    megapixels: Chart
    smallest: tuple[int, int]
    """(height, width) of the picture of fewest pixels, px"""
    largest: tuple[int, int]
    tags_each: Chart
    ratings: list[tuple[str, int]]
    """(rating, pictures), the most frequent first; "none" for those whose record told none. Empty where none did"""
    scored: int
    """pictures whose record told a score"""
    scores: Chart | None


def describe_pictures(manifest: ManifestRows) -> Pictures:
    """Counts and the chart of resolutions; the manifest must have rows."""
    source, repeats, size = (manifest.column(name) for name in ("source", "repeats", "file_bytes"))
    height, width = manifest.column("height"), manifest.column("width")
    pixels = height.astype(np.int64) * width
    by_source = [
        np.bincount(source, weights=weights, minlength=len(manifest.sources)) for weights in (None, repeats, size)
    ]
    ends = (int(pixels.argmin()), int(pixels.argmax()))
    smallest, largest = ((int(height[row]), int(width[row])) for row in ends)
    texts, scores = _texts(manifest), _scores(manifest)
    return Pictures(
        count=len(manifest),
        showings=int(repeats.sum()),
        bytes=int(size.sum()),
        sources=[
            SourceRow(str(folder), *(int(column[index]) for column in by_source))
            for index, folder in enumerate(manifest.sources)
        ],
        formats=sorted(texts.formats.items(), key=lambda pair: (-pair[1], pair[0])),
        repeats=sorted(count_values(pa.array(repeats))),
        untagged=int((texts.tags == 0).sum()),
        kept=int((manifest.column("kept_tags") > 0).sum()),
        doubled=texts.doubled,
        sizes=density(
            "Width and height of the pictures", width, height, "width, px (logarithmic)", "height, px", ticks=_SIDES
        ),
        megapixels=_megapixels(pixels),
        smallest=smallest,
        largest=largest,
        tags_each=_tags_each(texts.tags),
        ratings=_ratings(manifest),
        scored=len(scores),
        scores=_score_chart(scores) if len(scores) else None,
    )


class _Texts(NamedTuple):
    """What is told of the columns that hold no numbers."""

    formats: Counter[str]
    tags: NDArray[np.integer]
    """of each picture"""
    doubled: int


def _texts(manifest: ManifestRows) -> _Texts:
    formats: Counter[str] = Counter()
    tags, doubled = [np.empty(0, np.int32)], 0
    for part in manifest.parts(["id", "format", "tags"]):
        for row in pc.value_counts(part["format"]).to_pylist():
            formats[row["values"]] += row["counts"]
        tags.append(pc.list_value_length(part["tags"]).to_numpy())
        doubled += pc.sum(pc.match_substring(part["id"], "-")).as_py() or 0
    return _Texts(formats, np.concatenate(tags), doubled)


def _ratings(manifest: ManifestRows) -> list[tuple[str, int]]:
    if manifest.version < RECORD_VERSION:
        return []
    counts: Counter[str] = Counter()
    for part in manifest.parts(["rating"]):
        for row in pc.value_counts(part["rating"]).to_pylist():
            counts[row["values"] or "none"] += row["counts"]
    return counts.most_common(_RATINGS) if set(counts) != {"none"} else []


def _scores(manifest: ManifestRows) -> NDArray[np.float64]:
    """Of the pictures that have one."""
    if manifest.version < RECORD_VERSION:
        return np.empty(0)
    parts = (pc.drop_null(part["score"]).to_numpy() for part in manifest.parts(["score"]))
    return np.concatenate([np.empty(0), *parts])


def _score_chart(scores: NDArray[np.float64]) -> Chart:
    """Between the 1st and 99th percentile; what lies beyond is counted in the bars at the ends."""
    low, high = np.percentile(scores, [1, 99])
    if (scores == np.rint(scores)).all():
        step = max(1.0, np.ceil((high - low) / 24))
        edges = np.floor(low) + step * np.arange(2 + (high - np.floor(low)) // step)
    else:
        edges = np.linspace(low, high if high > low else low + 1, 25)
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), bins=edges)
    return histogram("Pictures by score", counts.tolist(), edges.tolist(), "score, as the records tell it")


def count_values(column: pa.Array) -> list[tuple[Any, int]]:
    """(value, rows), the most frequent first."""
    counted = [(row["values"], row["counts"]) for row in pc.value_counts(column).to_pylist()]
    return sorted(counted, key=lambda pair: (-pair[1], pair[0]))


def _megapixels(pixels: NDArray[np.int64]) -> Chart:
    """By doublings of the number of pixels."""
    low, high = int(np.floor(np.log2(pixels.min()))), int(np.floor(np.log2(pixels.max()))) + 1
    counts = np.bincount(np.floor(np.log2(pixels)).astype(np.int64) - low, minlength=high - low)
    edges = [2.0**power / 1e6 for power in range(low, high + 1)]
    return histogram(
        "Pictures by megapixels", counts.tolist(), edges, "megapixels, each bar twice the one before", label=_short_mp
    )


def _short_mp(value: float | int) -> str:
    return f"{value:.2g}"


def _tags_each(tags: NDArray[np.integer]) -> Chart:
    step = max(1, -(-int(tags.max(initial=1)) // 30))
    counts = np.bincount(tags // step, minlength=2)
    edges = [step * index for index in range(len(counts) + 1)]
    return histogram("Pictures by number of tags", counts.tolist(), edges, "tags of a picture")


# --- buckets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BucketRow:
    """One canvas that has pictures."""

    canvas: tuple[int, int]
    """(height, width) px"""
    pictures: int
    share: float
    """of the most frequent bucket, for the bar"""
    crop_share: float
    aspect_error: float
    enlarged: int


@dataclass(frozen=True)
class Buckets:
    """What bucketing does."""

    rows: list[BucketRow]
    empty: int
    """canvases without a picture"""
    rejected: int
    """pictures too far from every canvas"""
    crop_share: float
    """mean over the pictures, 0…1"""
    aspect_error: float
    enlarged: int
    """pictures that are enlarged at all"""
    much_enlarged: int
    """by more than `ENLARGED`"""
    much_cropped: int
    """by more than `CROPPED`"""
    crops: Chart
    errors: Chart
    scales: Chart
    most_cropped: list[tuple[int, float]]
    """(row of the manifest, share cut off), the worst first"""


def describe_buckets(manifest: ManifestRows, table: Canvases, max_aspect_error: float) -> Buckets:
    """The pictures in the canvases of a bucket table; those beyond `max_aspect_error` are counted apart."""
    sizes = picture_sizes(manifest)
    report = bucket_report(sizes, table, max_aspect_error)
    bucket, error = assign_buckets(sizes, table)
    kept = np.flatnonzero(error < max_aspect_error)
    targets = table[bucket[kept]]
    resized = cover_sizes(sizes[kept], targets)
    crop = crop_share(resized, targets)
    scale = (resized / sizes[kept]).max(axis=1, initial=0.0)
    worst = np.argsort(-crop, kind="stable")[:6]
    return Buckets(
        rows=_bucket_rows(report),
        empty=int((report.count == 0).sum()),
        rejected=report.rejected,
        crop_share=report.mean(report.crop_share),
        aspect_error=report.mean(report.aspect_error),
        enlarged=int(report.upscaled.sum()),
        much_enlarged=int((scale > ENLARGED).sum()),
        much_cropped=int((crop > CROPPED).sum()),
        crops=_steps("Pictures by share cut off", 100 * crop, [0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 35, 50, 100], "%"),
        errors=_steps(
            "Pictures by aspect error",
            error[kept],
            [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, np.inf],
            "|long/short of picture − of canvas|",
        ),
        scales=_steps(
            "Pictures by scale to cover their canvas",
            scale,
            [0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2, 4, np.inf],
            "times; above 1 a picture is enlarged",
        ),
        most_cropped=list(zip(kept[worst].tolist(), crop[worst].tolist(), strict=True)),
    )


def _bucket_rows(report: BucketReport) -> list[BucketRow]:
    most = max(1, int(report.count.max(initial=0)))
    return [
        BucketRow(
            (int(report.table[index, 0]), int(report.table[index, 1])),
            int(report.count[index]),
            float(report.count[index] / most),
            float(report.crop_share[index]),
            float(report.aspect_error[index]),
            int(report.upscaled[index]),
        )
        for index in np.flatnonzero(report.count).tolist()
    ]


def _steps(title: str, values: NDArray[np.float64], edges: list[float | int], x_title: str) -> Chart:
    counts, _ = np.histogram(values, bins=np.array(edges, np.float64))

    def label(edge: float | int) -> str:
        return "∞" if np.isinf(edge) else f"{edge:g}"

    return histogram(title, counts.tolist(), edges, x_title, label=label, width=_NARROW)
