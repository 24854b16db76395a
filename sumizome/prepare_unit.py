"""The pictures of a unit on their way to latents: framed, decoded, cropped, encoded, or rejected with a reason.

Owns the order of batches and the overlap of decoding with the VAE, across units, so that the VAE does not wait where
one ends. Writes nothing. The invariant: every picture has one outcome, which depends on the picture alone, not on those
beside it, so that a unit made again, or a picture in another unit, is the same to the last bit. For that the VAE is
always given whole batches: with another batch size its arithmetic takes another order, and one latent in a few differs
by a bit.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float16, Int, UInt8

from sumizome.data.buckets import (
    BucketConfig,
    Canvases,
    Sizes,
    assign_buckets,
    cover_sizes,
    crop_offsets,
)
from sumizome.data.canvas import Frame, load_canvas
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.manifest import ManifestRows, picture_place
from sumizome.data.shards import latent_fault
from sumizome.data.tasks import Reject
from sumizome.prepare_encoder import Encoder, InFlight

__all__ = ["Geometry", "Outcome", "Unit", "UnitOutcomes", "encode_units", "frame_unit"]

_BATCHES_AHEAD = 2
_PICTURES_AHEAD = 48
"""What is decoded, or being decoded, while the VAE works: these many batches, and pictures for this many threads."""

CanvasStack: TypeAlias = UInt8[np.ndarray, "v H W 3"]
"""A picture's variants in its bucket, RGB."""

Outcome: TypeAlias = Float16[np.ndarray, "v c h w"] | Reject
"""What became of a picture: the raw latents of its variants, or why there are none."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """How each of n pictures becomes its v canvases; `original`, `corner` and `target` are its micro-conditioning."""

    original: Sizes
    """The picture as stored, after EXIF orientation."""
    resized: Sizes
    """What it is resized to: covers the canvas, and touches it in one direction."""
    offset: Int[np.ndarray, "n v 2"]
    """(top, left) of the canvas, in pixels of the resized picture."""
    mirrored: Bool[np.ndarray, " v"]
    """Whether the canvas is then mirrored, left for right."""
    target: Sizes
    """The canvas, a bucket."""

    @property
    def corner(self) -> Int[np.ndarray, "n v 2"]:
        """(top, left) as the U-Net is told: of a mirrored canvas, in the mirrored picture."""
        corner = self.offset.copy()
        overhang = (self.resized - self.target)[:, None, 1]
        corner[:, self.mirrored, 1] = overhang - self.offset[:, self.mirrored, 1]
        return corner


@dataclass(frozen=True, eq=False)
class Unit:
    """Rows of the manifest and what is to be made of each; an entry is a picture's place among them."""

    number: int
    manifest: ManifestRows
    rows: Int[np.ndarray, " n"]
    pictures: pa.Table
    """Those rows."""
    bucket: Int[np.ndarray, " n"]
    geometry: Geometry
    misfits: Mapping[int, Reject]
    """Entries whose aspect no bucket is near to."""

    def reject(self, entry: int, reason: str, sentence: str) -> Reject:
        return _reject(self.pictures, entry, reason, sentence)


def _reject(pictures: pa.Table, entry: int, reason: str, sentence: str) -> Reject:
    return Reject(pictures["source"][entry].as_py(), pictures["path"][entry].as_py(), reason, sentence)


def frame_unit(
    number: int,
    manifest: ManifestRows,
    rows: Int[np.ndarray, " n"],
    table: Canvases,
    buckets: BucketConfig,
    *,
    crops: int = 1,
    flip: bool = False,
) -> Unit:
    """Some rows of the manifest, each with its bucket and its crops."""
    pictures = manifest.take(rows)
    sizes = np.stack([pictures[side].to_numpy().astype(np.int64) for side in ("height", "width")], axis=1)
    bucket, aspect_error = assign_buckets(sizes, table)
    geometry = _geometry(sizes, table[bucket], pictures["id"].to_pylist(), buckets, crops, flip)
    misfits = {}
    for entry in np.flatnonzero(aspect_error >= buckets.max_aspect_error).tolist():
        (height, width), (canvas_height, canvas_width) = sizes[entry].tolist(), table[bucket[entry]].tolist()
        sentence = (
            f"{height}×{width} px has an aspect error of {aspect_error[entry]:.2f} to the nearest bucket, "
            f"{canvas_height}×{canvas_width}; the limit is {buckets.max_aspect_error:g}."
        )
        misfits[entry] = _reject(pictures, entry, "aspect", sentence)
    return Unit(number, manifest, rows, pictures, bucket, geometry, misfits)


def _geometry(sizes: Sizes, targets: Sizes, ids: list[str], buckets: BucketConfig, crops: int, flip: bool) -> Geometry:
    """Variant 0 is the crop of a cache with one; crop c of a picture depends on (crop_seed, id, c) alone."""
    resized = cover_sizes(sizes, targets)
    mirrored = np.array([False, True] if flip else [False])
    offsets = [
        crop_offsets(
            resized - targets,
            ids if crop == 0 else [f"{sample_id} crop {crop}" for sample_id in ids],
            crop=buckets.crop,
            crop_seed=buckets.crop_seed,
        )
        for crop in range(crops)
    ]
    offset = np.repeat(np.stack(offsets, axis=1), len(mirrored), axis=1)
    return Geometry(sizes, resized, offset, np.tile(mirrored, crops), targets)


# ── Encoding ──


class UnitOutcomes(NamedTuple):
    """Some entries' outcomes, as they come."""

    unit: Unit
    outcomes: Mapping[int, Outcome]
    is_last: bool
    """Of the unit."""


@dataclass(frozen=True, eq=False)
class _Batch:
    unit: Unit
    entries: list[int]
    fitted: list[Future[CanvasStack | Reject]]
    is_last: bool


class _Encoding(NamedTuple):
    """A batch that the VAE has: the entries it was given, and the outcomes that are known already."""

    batch: _Batch
    entries: list[int]
    rejects: dict[int, Outcome]
    in_flight: InFlight | None


def encode_units(
    units: Iterable[Unit], encoder: Encoder, pool: ThreadPoolExecutor, batch_size: int
) -> Iterator[UnitOutcomes]:
    """The outcome of every entry of every unit, in batches of one bucket; `pool` decodes ahead of the VAE.

    A unit is asked for when the pictures of the one before have been handed to the pool.
    Raises: ConfigError if a batch is too large for the device's memory.
    """
    batches = _batches(units, pool, batch_size)
    decoding: deque[_Batch] = deque()
    encoding: deque[_Encoding] = deque()
    ended = False
    while decoding or encoding or not ended:
        while not ended and (
            len(decoding) <= _BATCHES_AHEAD or sum(len(batch.entries) for batch in decoding) < _PICTURES_AHEAD
        ):
            if (coming := next(batches, None)) is None:
                ended = True
            else:
                decoding.append(coming)
        if decoding:
            encoding.append(_begin(decoding.popleft(), encoder, batch_size))
        while encoding and (len(encoding) >= encoder.depth or not decoding):
            yield _finish(encoding.popleft(), encoder)


def _batches(units: Iterable[Unit], pool: ThreadPoolExecutor, batch_size: int) -> Iterator[_Batch]:
    for unit in units:
        lists = list(_entry_lists(unit, _pictures(unit, batch_size)))
        for number, entries in enumerate(lists):
            fitted = [pool.submit(_fit, unit, entry) for entry in entries]
            yield _Batch(unit, entries, fitted, is_last=number == len(lists) - 1)


def _pictures(unit: Unit, batch_size: int) -> int:
    """Pictures in a batch of canvases."""
    return max(1, batch_size // len(unit.geometry.mirrored))


def _entry_lists(unit: Unit, size: int) -> Iterator[list[int]]:
    """The batches of a unit; the first holds the misfits, which need no VAE."""
    yield list(unit.misfits)
    for bucket in np.unique(unit.bucket).tolist():
        entries = [entry for entry in np.flatnonzero(unit.bucket == bucket).tolist() if entry not in unit.misfits]
        for first in range(0, len(entries), size):
            yield entries[first : first + size]


def _begin(batch: _Batch, encoder: Encoder, batch_size: int) -> _Encoding:
    fitted = {entry: future.result() for entry, future in zip(batch.entries, batch.fitted, strict=True)}
    rejects: dict[int, Outcome] = {entry: each for entry, each in fitted.items() if isinstance(each, Reject)}
    stacks = {entry: each for entry, each in fitted.items() if not isinstance(each, Reject)}
    missing = _pictures(batch.unit, batch_size) - len(stacks)
    padding = [np.zeros_like(next(iter(stacks.values())))] * missing if stacks else []
    in_flight = encoder.begin(np.concatenate([*stacks.values(), *padding])) if stacks else None
    return _Encoding(batch, list(stacks), rejects, in_flight)


def _finish(encoding: _Encoding, encoder: Encoder) -> UnitOutcomes:
    unit, outcomes = encoding.batch.unit, dict(encoding.rejects)
    if encoding.in_flight is not None:
        latents = encoder.finish(encoding.in_flight)
        stacks = latents.reshape(-1, len(unit.geometry.mirrored), *latents.shape[1:])[: len(encoding.entries)]
        outcomes |= {entry: _half(unit, entry, stack) for entry, stack in zip(encoding.entries, stacks, strict=True)}
    return UnitOutcomes(unit, outcomes, encoding.batch.is_last)


def _fit(unit: Unit, entry: int) -> CanvasStack | Reject:
    """The canvases of one picture, or why there are none."""
    if entry in unit.misfits:
        return unit.misfits[entry]
    geometry = unit.geometry
    original, resized, target = (_pair(each[entry]) for each in (geometry.original, geometry.resized, geometry.target))
    # Of several crops the whole picture is resized once; of one, no more of it than is needed.
    one = len(geometry.mirrored) == 1
    frame = Frame(original, resized, *((_pair(geometry.offset[entry, 0]), target) if one else ((0, 0), resized)))
    try:
        place = picture_place(unit.pictures, entry, unit.manifest.sources)
        fitted = load_canvas(place, frame, unit.manifest.background, sha256=unit.pictures["sha256"][entry].as_py())
    except ImageRejected as rejected:
        return unit.reject(entry, rejected.reason, str(rejected))
    if one:
        return fitted[None]
    height, width = target
    canvases = [fitted[top : top + height, left : left + width] for top, left in geometry.offset[entry].tolist()]
    return np.stack(
        [each[:, ::-1] if mirror else each for each, mirror in zip(canvases, geometry.mirrored, strict=True)]
    )


def _pair(pair: Int[np.ndarray, " 2"]) -> tuple[int, int]:
    first, second = pair.tolist()
    return first, second


def _half(unit: Unit, entry: int, latents: Float[np.ndarray, "v c h w"]) -> Outcome:
    for latent in latents:
        if fault := latent_fault(latent):
            return unit.reject(entry, *fault)
    return latents.astype(np.float16)
