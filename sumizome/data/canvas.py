"""One picture in its bucket: from a file to the pixels that the VAE sees.

Owns the resampling of pictures, and with it the version by which cached latents name it; the geometry comes from
`buckets`, the rules of what a picture is from `images`. Invariant: the canvas is a function of the file's bytes, the
frame and the background alone, to the last bit, on any number of threads or processes. Sizes are (height, width), px.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

# Read once, when pyvips is imported: one picture a thread, and as many threads as the caller has.
os.environ.setdefault("VIPS_CONCURRENCY", "1")

import numpy as np
import pyvips
from jaxtyping import UInt8
from PIL import Image

from sumizome.data.byte_range import ByteRange
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import WHITE, Colour, PlainHeader, decode_image, plain_header
from sumizome.data.picture_bytes import read_bytes

__all__ = ["RESIZE_VERSION", "Canvas", "Frame", "load_canvas"]

RESIZE_VERSION = "vips-lanczos-1"
"""Names what `load_canvas` does to pixels. Cached latents carry it: change it whenever the output changes."""

Canvas: TypeAlias = UInt8[np.ndarray, "_ _ 3"]
"""[H, W, 3], sRGB"""

pyvips.cache_set_max(0)  # the same picture is hardly ever asked for twice, and its memory is wanted
pyvips.block_untrusted_set(True)

_LOADERS: dict[str, Callable[..., Any]] = {
    "JPEG": pyvips.Image.jpegload_buffer,
    "PNG": pyvips.Image.pngload_buffer,
    "WEBP": pyvips.Image.webpload_buffer,
}

_REDUCTION_MARGIN = 2
"""A JPEG is decoded at a fraction of its size only while this many of its pixels are left for one of the canvas: the
decoder's own reduction averages as a box does, and Lanczos has to see what the box would blur."""


class Frame(NamedTuple):
    """How one picture becomes its canvas: an entry of `buckets.CropGeometry`."""

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    """(top, left)"""
    target: tuple[int, int]


def load_canvas(
    path: Path | ByteRange, frame: Frame, background: Colour = WHITE, *, sha256: str | None = None
) -> Canvas:
    """The canvas of the picture in a file, by Lanczos.

    Nearly every picture is decoded, reduced and cropped in strips, which is fast and needs little memory; those with a
    colour profile, a palette, 16 bits, …, those that the fast decoder refuses, and those that have to be enlarged, go
    through `decode_image`.
    Raises: ImageRejected: also for a file that is not the one that was ingested.
    """
    data, _ = read_bytes(path, sha256=sha256)
    header = None if _enlarges(frame) else plain_header(data)
    if header is not None:
        _check_original(header.size, frame)
        try:
            return _fitted(_open_strips(data, header, frame, background), frame)
        except pyvips.Error:
            pass  # `decode_image` says what is wrong, or is less strict
    image = decode_image(data, background).image
    _check_original((image.height, image.width), frame)
    if _enlarges(frame):  # libvips would by cubic interpolation
        image = image.resize(frame.resized[::-1], Image.Resampling.LANCZOS)
    return _fitted(pyvips.Image.new_from_array(np.asarray(image)), frame)


def _enlarges(frame: Frame) -> bool:
    return any(to > side for side, to in zip(frame.original, frame.resized, strict=True))


def _check_original(found: tuple[int, int], frame: Frame) -> None:
    if found != frame.original:
        raise ImageRejected("changed", f"expected {frame.original} px, as in the manifest, found {found}.")


def _open_strips(data: bytes, header: PlainHeader, frame: Frame, background: Colour) -> pyvips.Image:
    """The opaque picture, not yet decoded; a JPEG at 1/2, 1/4 or 1/8 where that is exact and large enough."""
    options: dict[str, object] = {"access": "sequential", "fail_on": "truncated"}
    if header.format == "JPEG":
        options["shrink"] = _reduction(frame)
    image = _LOADERS[header.format](data, **options)
    return image.flatten(background=list(background)) if header.has_alpha else image


def _reduction(frame: Frame) -> int:
    sides = list(zip(frame.original, frame.resized, strict=True))
    # Not where a row or column would be left over: all others would be off by a part of a pixel.
    fitting = (
        by for by in (8, 4, 2) if all(side % by == 0 and side >= _REDUCTION_MARGIN * by * to for side, to in sides)
    )
    return next(fitting, 1)


def _fitted(image: pyvips.Image, frame: Frame) -> Canvas:
    (top, left), (height, width) = frame.offset, frame.target
    resized_height, resized_width = frame.resized
    if (image.height, image.width) != frame.resized:
        # gap=0: libvips would first average whole pixels, which blurs fine lines (34 dB instead of 50), for no speed.
        image = image.resize(
            resized_width / image.width, vscale=resized_height / image.height, kernel="lanczos3", gap=0
        )
    pixels: np.ndarray = image.crop(left, top, width, height).numpy()
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
