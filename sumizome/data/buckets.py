"""Aspect-ratio buckets: the canvas at which a picture is trained, and the part of it that is seen there.

Owns the bucket table, the assignment of picture sizes to it, and the crop geometry, which is also SDXL's crop
conditioning. Knows no files and no latents. The invariant: a picture resized to `cover_sizes` holds its canvas at
`crop_offsets`, so the numbers that the network is told are the crop that was made.
Notation: sizes are (height, width) in pixels, int64 [n, 2]. Source: report §4.1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from sumizome.errors import ConfigError
from sumizome.seeds import derive_seed

__all__ = [
    "BucketAssignment",
    "BucketConfig",
    "BucketReport",
    "Canvases",
    "CropGeometry",
    "CropPosition",
    "Sizes",
    "assign_buckets",
    "bucket_classes",
    "bucket_report",
    "bucket_table",
    "cover_sizes",
    "crop_geometry",
    "crop_offsets",
    "crop_share",
]

Sizes: TypeAlias = Int[np.ndarray, "n 2"]
"""One (height, width) a picture."""

Canvases: TypeAlias = Int[np.ndarray, "k 2"]
"""A bucket table: one (height, width) a bucket, by rising width / height."""

CropPosition = Literal["random", "center"]

_BLOCK = 262_144
"""Pictures assigned at a time."""


@dataclass(frozen=True)
class BucketConfig:
    """Which canvases there are, and how a picture is fitted into one."""

    area: int | tuple[int, int] = 1024
    """Most pixels of a canvas: the side of a square, or height and width. SDXL was trained at 1024²."""
    step: int = 64
    """Sides are multiples of this, in pixels: 64 as in the report; a tiny model takes 16."""
    areas: tuple[int, ...] = ()
    """Area classes in place of one area, as sides of squares, such as 512 768 1024: nothing is enlarged.
    A picture goes to the largest class that it fills; a step trains on one class. What does not even fill the smallest
    goes there enlarged and is counted; `ingest --rules.min-side` leaves it out"""
    min_side: int = 0
    """Shortest side in pixels; 0 = half of √area (512 at 1024²)."""
    max_side: int = 0
    """Longest side in pixels; 0 = twice √area (2048 at 1024²)."""
    max_aspect_error: float = 4.0
    """A picture is rejected when its aspect (long / short side) is this far from its bucket's, as in the report."""
    crop: CropPosition = "random"
    """Where the overhang is cut off: "random", seeded by picture, as in the report, or half on each side, "center"."""
    crop_seed: int = 0
    """Seed of the random crops; another one gives every picture another crop."""


# ── The table ──


def bucket_table(config: BucketConfig) -> Canvases:
    """The canvases, tallest first: for each width the largest height within the area, their mirror images, a square.

    Of two canvases with one aspect the larger stays. `area=(512, 768), min_side=256, max_side=1024` gives the 19 of the
    report; `area=1024` gives SDXL's 832×1216 and its kin. With `areas` the tables of the classes, smallest first, stand
    one behind the other (`bucket_classes` tells them apart), each canvas in the smallest class that has it.
    Raises: ConfigError if no canvas fits.
    """
    if not config.areas:
        return _class_table(config)
    if sorted(set(config.areas)) != list(config.areas):
        raise ConfigError(
            f"areas: expected rising sides such as 512 768 1024, found {' '.join(map(str, config.areas))}"
        )
    tables: list[Canvases] = []
    for side in config.areas:
        table = _class_table(replace(config, area=side))
        smaller = {canvas for known in tables for canvas in map(tuple, known.tolist())}
        new = [canvas for canvas in map(tuple, table.tolist()) if canvas not in smaller]
        if not new:
            raise ConfigError(f"areas: the class {side} has no canvas that a smaller class lacks; raise max_side")
        tables.append(np.array(new, np.int64))
    return np.concatenate(tables)


def bucket_classes(table: Canvases) -> Int[np.ndarray, " k"]:
    """The area class of each bucket, from 0, the smallest: a new one begins where the aspects begin anew.

    Within a class aspects rise; every class has with each canvas its mirror image, so the next begins no higher than
    this one ends.
    """
    return np.cumsum(np.diff(_elongation(table), prepend=-np.inf) <= 0)


def _class_table(config: BucketConfig) -> Canvases:
    """The table of one area."""
    height, width = (config.area, config.area) if isinstance(config.area, int) else config.area
    area, step = height * width, config.step
    if step < 1 or min(height, width) < step:
        raise ConfigError(
            f"buckets of {height}×{width} px in steps of {step}: the area must hold at least one step a side"
        )
    lowest = _step_down(config.min_side or max(step, math.isqrt(area) // 2), step, up=bool(config.min_side))
    highest = _step_down(config.max_side or 2 * math.isqrt(area), step)
    widths = np.arange(lowest, highest + 1, step, dtype=np.int64)
    heights = np.minimum(highest, area // widths) // step * step
    wide_and_tall = np.stack([heights, widths], axis=1)[heights >= lowest]
    square = _step_down(min(height, width), step)
    squares = np.full((1, 2), square, np.int64)[: int(lowest <= square <= highest)]
    table = np.concatenate([wide_and_tall, wide_and_tall[:, ::-1], squares])
    if len(table) == 0:
        raise ConfigError(
            f"no canvas of at most {height}×{width} px has sides from {lowest} to {highest} in steps of {step}; "
            "lower min_side or raise max_side"
        )
    order = np.lexsort((-table.prod(axis=1), _elongation(table)))
    table = table[order]
    return table[np.diff(_elongation(table), prepend=-np.inf) > 0]


def _step_down(side: int, step: int, *, up: bool = False) -> int:
    """The multiple of `step` next below `side` (above, with `up`), and at least one step."""
    return max(step, (side + (step - 1 if up else 0)) // step * step)


def _elongation(sizes: Sizes) -> Float[np.ndarray, " n"]:
    """width/height − 1 of wide pictures, 1 − height/width of tall ones: 0 for a square, mirrored sizes differ in sign.

    Differences of it are the report's differences of aspect. Differs from width/height: because there every tall
    picture lies between 0 and 1, so that no strip, however long, reaches the limit that rejects a wide one.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    return np.where(width >= height, width / height - 1, 1 - height / width)


# ── Assignment ──


class BucketAssignment(NamedTuple):
    """The nearest bucket of each picture."""

    bucket: Int[np.ndarray, " n"]
    """Row of the bucket table."""
    aspect_error: Float[np.ndarray, " n"]
    """|aspect of the picture − aspect of the bucket|, aspect = long side / short side (signed across the square)."""


def assign_buckets(sizes: Sizes, table: Canvases) -> BucketAssignment:
    """Each picture's bucket of smallest aspect difference; a picture half-way between two takes the taller one.

    Where the table has area classes, it is the bucket of the largest class that the picture fills without being
    enlarged, and of the smallest where it fills none. One search in a sorted table a picture and class, no Python
    object a picture: 6 million take a second or two.
    """
    bucket, error = np.empty(len(sizes), np.int16), np.empty(len(sizes))
    for start in range(0, len(sizes), _BLOCK):  # bounds what is held for a moment
        block = slice(start, start + _BLOCK)
        bucket[block], error[block] = _assign_block(sizes[block].astype(np.int64), table)
    return BucketAssignment(bucket, error)


def _assign_block(sizes: Sizes, table: Canvases) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    aspects, pictures, classes = _elongation(table), _elongation(sizes), bucket_classes(table)
    bucket = np.zeros(len(sizes), np.int64)
    for area_class in range(int(classes[-1]) + 1):  # a larger class overrules those before it
        members = np.flatnonzero(classes == area_class)
        middles = (aspects[members][1:] + aspects[members][:-1]) / 2
        nearest = members[np.searchsorted(middles, pictures, side="left")]
        fills = (area_class == 0) | (cover_sizes(sizes, table[nearest]) <= sizes).all(axis=1)
        bucket[fills] = nearest[fills]
    return bucket, np.abs(pictures - aspects[bucket])


# ── Crop geometry ──


@dataclass(frozen=True, eq=False)
class CropGeometry:
    """How each of n pictures becomes its canvas; with `original` and `target` this is SDXL's micro-conditioning."""

    original: Sizes
    """The picture as stored, after EXIF orientation."""
    resized: Sizes
    """What it is resized to: covers the canvas, and touches it in one direction."""
    offset: Int[np.ndarray, "n 2"]
    """(top, left) of the canvas, in pixels of the resized picture: SDXL's `crop_top_left`."""
    target: Sizes
    """The canvas, a bucket."""


def crop_geometry(
    sizes: Sizes, targets: Sizes, ids: Sequence[str], *, crop: CropPosition = "random", crop_seed: int = 0
) -> CropGeometry:
    """Resize to cover, then cut the overhang off: the geometry of each picture in its own target canvas."""
    resized = cover_sizes(sizes, targets)
    return CropGeometry(sizes, resized, crop_offsets(resized - targets, ids, crop=crop, crop_seed=crop_seed), targets)


def cover_sizes(sizes: Sizes, targets: Sizes) -> Sizes:
    """The smallest size of the picture's own aspect that covers the target; the free side is rounded to a pixel.

    Integer arithmetic, so that every machine agrees.
    """
    height, width = sizes.T
    target_height, target_width = targets.T
    fits_height = target_height * width >= target_width * height  # the picture is wider than its canvas
    free_width = (2 * target_height * width + height) // (2 * height)
    free_height = (2 * target_width * height + width) // (2 * width)
    return np.stack(
        [np.where(fits_height, target_height, free_height), np.where(fits_height, free_width, target_width)], axis=1
    )


def crop_offsets(
    overhang: Int[np.ndarray, "n 2"], ids: Sequence[str], *, crop: CropPosition = "random", crop_seed: int = 0
) -> Int[np.ndarray, "n 2"]:
    """(top, left) of the canvas for overhangs (height, width) ≥ 0, in pixels of the resized picture.

    A random offset is uniform on 0…overhang and depends on (crop_seed, id) alone.
    """
    if crop == "center":
        return overhang // 2
    # Only one side overhangs, so one number a picture is enough.
    draws = np.array([derive_seed(crop_seed, "crop", sample_id) for sample_id in ids], dtype=np.int64)
    return np.asarray(draws[:, None] % (overhang + 1))


def crop_share(resized: Sizes, targets: Sizes) -> Float[np.ndarray, " n"]:
    """The share of each resized picture that is cut off, 0…1."""
    return np.asarray(1 - targets.prod(axis=1) / resized.prod(axis=1))


# ── Report ──


@dataclass(frozen=True, eq=False)
class BucketReport:
    """What bucketing does to a set of pictures; one entry a bucket, means are over the pictures in it (0 if none)."""

    table: Canvases
    count: Int[np.ndarray, " k"]
    aspect_error: Float[np.ndarray, " k"]
    crop_share: Float[np.ndarray, " k"]
    upscaled: Int[np.ndarray, " k"]
    """Pictures smaller than their canvas, which are enlarged to cover it."""
    rejected: int
    """Pictures whose aspect is too far from every bucket's."""

    def mean(self, values: Float[np.ndarray, " k"]) -> float:
        """A per-bucket mean as the mean over all pictures that are kept."""
        return float((values * self.count).sum() / max(1, self.count.sum()))


def bucket_report(sizes: Sizes, table: Canvases, max_aspect_error: float = math.inf) -> BucketReport:
    """Counts, aspect error and crop share of the pictures by bucket, those beyond `max_aspect_error` left out."""
    assignment = assign_buckets(sizes, table)
    kept = assignment.aspect_error < max_aspect_error
    bucket, error, sizes = assignment.bucket[kept], assignment.aspect_error[kept], sizes[kept]
    resized = cover_sizes(sizes, table[bucket])
    count = np.bincount(bucket, minlength=len(table))

    def per_bucket(values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " k"]:
        return np.bincount(bucket, values, minlength=len(table)) / np.maximum(1, count)

    upscaled = np.bincount(bucket, (resized > sizes).any(axis=1), minlength=len(table)).astype(np.int64)
    return BucketReport(
        table, count, per_bucket(error), per_bucket(crop_share(resized, table[bucket])), upscaled, int((~kept).sum())
    )
