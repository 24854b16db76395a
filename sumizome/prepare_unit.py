"""The pictures of one unit on their way to latents: framed, decoded, cropped, encoded, or rejected with a reason.

Owns the order of batches and the overlap of decoding with the VAE. Writes nothing. The invariant: every picture of the
unit has one outcome, and the outcomes depend on the unit alone, so that a unit made again is the same to the last bit.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Float16, Int, UInt8

from sumizome.data.buckets import (
    BucketConfig,
    Canvases,
    CropGeometry,
    Sizes,
    assign_buckets,
    crop_geometry,
)
from sumizome.data.canvas import Canvas, Frame, load_canvas
from sumizome.data.images import ImageRejected
from sumizome.data.manifest import Manifest
from sumizome.data.shards import latent_fault
from sumizome.data.sources import Reject
from sumizome.errors import ConfigError
from sumizome.models.vae import encode_pixels

__all__ = ["Outcome", "Unit", "encode_unit", "frame_unit", "picture_sizes"]

_BATCHES_AHEAD = 2
"""Batches that are decoded, or being decoded, while the VAE works."""

Outcome: TypeAlias = Float16[np.ndarray, "_ _ _"] | Reject
"""What became of a picture: its raw latent [c, h, w], or why there is none."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Neighbouring rows of the manifest and what is to be made of each; an entry is a picture's place among them."""

    manifest: Manifest
    rows: range
    pictures: pa.Table
    """Those rows."""
    bucket: Int[np.ndarray, " n"]
    geometry: CropGeometry
    misfits: Mapping[int, Reject]
    """Entries whose aspect no bucket is near to."""

    def reject(self, entry: int, reason: str, sentence: str) -> Reject:
        return _reject(self.pictures, entry, reason, sentence)


def _reject(pictures: pa.Table, entry: int, reason: str, sentence: str) -> Reject:
    return Reject(pictures["source"][entry].as_py(), pictures["path"][entry].as_py(), reason, sentence)


def picture_sizes(pictures: pa.Table) -> Sizes:
    """(height, width) of each row of a manifest's table, px."""
    return np.stack([pictures[side].to_numpy().astype(np.int64) for side in ("height", "width")], axis=1)


def frame_unit(manifest: Manifest, rows: range, table: Canvases, buckets: BucketConfig) -> Unit:
    """Some rows of the manifest, each with its bucket and its crop."""
    pictures = manifest.table.slice(rows.start, len(rows))
    sizes = picture_sizes(pictures)
    bucket, aspect_error = assign_buckets(sizes, table)
    ids = pictures["id"].to_pylist()
    geometry = crop_geometry(sizes, table[bucket], ids, crop=buckets.crop, crop_seed=buckets.crop_seed)
    misfits = {}
    for entry in np.flatnonzero(aspect_error >= buckets.max_aspect_error).tolist():
        (height, width), (canvas_height, canvas_width) = sizes[entry].tolist(), table[bucket[entry]].tolist()
        sentence = (
            f"{height}×{width} px has an aspect error of {aspect_error[entry]:.2f} to the nearest bucket, "
            f"{canvas_height}×{canvas_width}; the limit is {buckets.max_aspect_error:g}."
        )
        misfits[entry] = _reject(pictures, entry, "aspect", sentence)
    return Unit(manifest, rows, pictures, bucket, geometry, misfits)


def encode_unit(
    unit: Unit, vae: AutoencoderKL, pool: ThreadPoolExecutor, batch_size: int
) -> Iterator[Mapping[int, Outcome]]:
    """The outcome of every entry, a batch of one bucket at a time; `pool` decodes ahead of the VAE.

    Raises: ConfigError if a batch is too large for the device's memory.
    """
    yield unit.misfits
    batches = list(_batches(unit, batch_size))
    ahead: deque[list[Future[Canvas | Reject]]] = deque()
    for number, batch in enumerate(batches):
        for coming in batches[number + len(ahead) : number + 1 + _BATCHES_AHEAD]:
            ahead.append([pool.submit(_fit, unit, entry) for entry in coming])
        fitted = {entry: future.result() for entry, future in zip(batch, ahead.popleft(), strict=True)}
        canvases = {entry: canvas for entry, canvas in fitted.items() if not isinstance(canvas, Reject)}
        outcomes: dict[int, Outcome] = {entry: each for entry, each in fitted.items() if isinstance(each, Reject)}
        if canvases:
            latents = _encode(vae, np.stack(list(canvases.values())))
            outcomes |= {entry: _half(unit, entry, latent) for entry, latent in zip(canvases, latents, strict=True)}
        yield outcomes


def _batches(unit: Unit, batch_size: int) -> Iterator[list[int]]:
    for bucket in np.unique(unit.bucket).tolist():
        entries = [entry for entry in np.flatnonzero(unit.bucket == bucket).tolist() if entry not in unit.misfits]
        for first in range(0, len(entries), batch_size):
            yield entries[first : first + batch_size]


def _fit(unit: Unit, entry: int) -> Canvas | Reject:
    """The canvas of one picture, or why there is none."""
    geometry = unit.geometry
    path, sha256 = unit.manifest.image_path(unit.rows[entry]), unit.pictures["sha256"][entry].as_py()
    pairs = (geometry.original, geometry.resized, geometry.offset, geometry.target)
    frame = Frame(*(_pair(each, entry) for each in pairs))
    try:
        return load_canvas(path, frame, unit.manifest.background, sha256=sha256)
    except ImageRejected as rejected:
        return unit.reject(entry, rejected.reason, str(rejected))


def _pair(pairs: Int[np.ndarray, "n 2"], entry: int) -> tuple[int, int]:
    first, second = pairs[entry].tolist()
    return first, second


def _encode(vae: AutoencoderKL, canvases: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b c h w"]:
    """Raw latents, float32."""
    pixels = torch.from_numpy(canvases).permute(0, 3, 1, 2).float() / 127.5 - 1
    try:
        return np.asarray(encode_pixels(vae, pixels).cpu())
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"out of memory encoding {len(canvases)} pictures at once; lower --batch-size") from error


def _half(unit: Unit, entry: int, latent: Float[np.ndarray, "c h w"]) -> Outcome:
    fault = latent_fault(latent)
    return unit.reject(entry, *fault) if fault else latent.astype(np.float16)
