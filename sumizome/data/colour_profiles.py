"""Pictures with an embedded colour profile in sRGB, without one as they are.

Owns the use of ICC profiles; invariant: a profile that means sRGB moves no pixel, and one that cannot be used is
reported and ignored, never an error. Conversion: relative colorimetric with black-point compensation.
"""

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["means_srgb", "to_srgb"]


def to_srgb(colour: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """(picture in mode RGB, whether its profile had to be ignored) of a picture in mode L, RGB or CMYK."""
    if not profile:
        return colour.convert("RGB"), False
    try:
        mode, transform = _srgb_transform(profile, colour.mode)
    except (OSError, ValueError, TypeError):
        return colour.convert("RGB"), True
    if transform is None:
        return colour.convert("RGB"), False
    converted: Image.Image = transform.apply(colour.convert(mode) if colour.mode != mode else colour)
    return converted, False


def means_srgb(profile: bytes | None, mode: str) -> bool:
    """Whether `to_srgb` would leave a picture of this mode (L or RGB) as it is, and ignore nothing."""
    if not profile:
        return True
    try:
        return _srgb_transform(profile, mode)[1] is None
    except (OSError, ValueError, TypeError):
        return False


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> tuple[str, Any]:
    """(mode to apply it in, transform to sRGB); None as transform where it would leave the picture as it is.

    Most profiles are sRGB under some name. They are known by what they do to a grid of colours, not by their name,
    and left out: an identity through lcms costs time and moves pixels by a level.
    Raises: OSError, ValueError, TypeError: a profile that cannot be used with this mode.
    """
    from PIL import ImageCms  # a third of the import time of this module, and few files need it

    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    # An RGB profile on a grey picture is common and means r = g = b; any other mismatch is a mistake.
    applied = {("GRAY", "L"): "L", ("RGB", "L"): "RGB", ("RGB", "RGB"): "RGB", ("CMYK", "CMYK"): "CMYK"}.get(
        (space, mode)
    )
    if applied is None:
        raise ValueError(f"profile for {space}, picture in {mode}")
    try:
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            applied,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # For grey, lcms would trade the curve for 33 straight pieces: twice too dark near black.
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if applied == "L" else 0),
        )
    except ImageCms.PyCMSError as error:
        raise ValueError(str(error)) from error
    probe = _probe(applied)
    before, after = (np.asarray(picture.convert("RGB"), np.int16) for picture in (probe, transform.apply(probe)))
    identity = applied != "CMYK" and int(np.abs(before - after).max()) <= 2
    return applied, None if identity else transform


def _probe(mode: str) -> Image.Image:
    """A strip of colours: 256 greys, or a 6×6×6 cube (CMYK: without black)."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    cube = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(cube)
    return probe.convert("CMYK") if mode == "CMYK" else probe
