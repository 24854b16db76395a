"""The modes that PNG, JPEG and WebP decode to: each as colour and alpha of 8 bits, and laid on a background.

Owns depth, palettes, colour keys and transparency; colour profiles are `colour_profiles`'.
"""

from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from sumizome.data.image_rejected import ImageRejected

__all__ = ["Colour", "composite", "split_alpha"]

Colour: TypeAlias = tuple[int, int, int]
"""8-bit sRGB (red, green, blue)."""


def split_alpha(image: Image.Image, bit_depth: int) -> tuple[Image.Image, Image.Image | None]:
    """(colour in mode L, RGB or CMYK; alpha in mode L or None)."""
    match image.mode:
        case "I;16":
            return _split_grey16(image)
        case "P":
            _check_palette(image)
            return _split(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        case "1" | "L" | "RGB" if "transparency" in image.info:
            image.info["transparency"] = _scale_colour_key(image.info["transparency"], image.mode, bit_depth)
            return _split(image.convert("RGBA" if image.mode == "RGB" else "LA"))
        case "1":
            return image.convert("L"), None
        case "L" | "RGB" | "CMYK" | "LA" | "RGBA":
            return _split(image)
        case mode:
            raise ImageRejected("format_not_supported", f"expected grey, RGB, palette or CMYK, found mode {mode}.")


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.mode == "RGBA":
        return image.convert("RGB"), image.getchannel("A")
    return image, None


def _split_grey16(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Pillow's own conversion of 16-bit grey clips at 255 and turns nearly every pixel white."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return grey, None
    return grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))


def _scale_colour_key(key: Any, mode: str, bit_depth: int) -> Any:
    """PNG states the transparent colour at the file's depth; Pillow compares it with 8-bit pixels as it stands."""
    if mode == "L" and bit_depth in (2, 4):
        return key * 255 // (2**bit_depth - 1)
    if mode == "RGB" and bit_depth == 16:
        return tuple(channel >> 8 for channel in key)
    return key


def _check_palette(image: Image.Image) -> None:
    """Refuses indices beyond the palette, which Pillow would draw black."""
    colours = len(image.getpalette("RGB") or ()) // 3
    highest = int(np.asarray(image).max())
    if highest >= colours:
        raise ImageRejected(
            "broken_palette", f"expected a colour for each index, found index {highest} and {colours} colours."
        )


def composite(rgb: Image.Image, alpha: Image.Image, background: Colour) -> Image.Image:
    lowest, highest = alpha.getextrema()
    if highest == 0:
        raise ImageRejected("fully_transparent", "expected something to see, found a wholly transparent picture.")
    if lowest == 255:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
