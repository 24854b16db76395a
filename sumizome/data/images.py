"""The one home of decoding: any PNG, JPEG or WebP becomes an upright, opaque, 8-bit sRGB picture, or is refused.

Owns the limits of size and the orientation rules; knows nothing of captions or manifests. Bytes are `picture_bytes`',
alpha, depth and palettes `image_modes`'.
Invariant: what the decoder cannot read whole is an `ImageRejected` with one reason, never a partial picture; where
`canvas` takes a faster decoder, `plain_header` has said that it gives the same numbers. (Damage inside a JPEG's coded
data is invisible to every decoder: against that stands the manifest's sha256.)
Files are untrusted. Sizes are (height, width); Pillow's (width, height) does not leave this module.
"""

import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from sumizome.data.byte_range import ByteRange
from sumizome.data.colour_profiles import means_srgb, to_srgb
from sumizome.data.image_modes import Colour, composite, split_alpha
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.picture_bytes import read_bytes
from sumizome.errors import ConfigError

__all__ = [
    "MAX_ASPECT_RATIO",
    "MAX_PIXELS",
    "MAX_SIDE",
    "MIN_SIDE",
    "WHITE",
    "Colour",
    "DecodedImage",
    "Picture",
    "PlainHeader",
    "decode_image",
    "open_image",
    "parse_colour",
    "plain_header",
    "read_image",
]

WHITE: Colour = (255, 255, 255)

MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768
"""px"""
MAX_ASPECT_RATIO = 20
"""long side / short side; the widest bucket of the report is 4"""
MIN_SIDE = 16
"""px: two latents of SDXL's 8-fold VAE; 1×1 tracking pixels and failed thumbnails lie below"""

_FORMATS = ("PNG", "JPEG", "WEBP")

# Pillow checks the size in the header, before it allocates: it warns above this and raises above twice this.
# A warning is an error here. (The explicit check in `_check_size` stands even where a host resets the filter.)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class Picture(NamedTuple):
    """What a file's bytes show."""

    image: Image.Image
    """mode "RGB", sRGB, upright; carries no metadata"""
    format: str
    """by content, not by file name: PNG, JPEG or WEBP"""
    profile_ignored: bool


class PlainHeader(NamedTuple):
    """What is known, before its pixels are decoded, of a picture whose stored numbers are its colours."""

    format: str
    size: tuple[int, int]
    """(height, width), px"""
    has_alpha: bool


class DecodedImage(NamedTuple):
    """A picture and what is known of its file."""

    image: Image.Image
    """mode "RGB", sRGB, upright; carries no metadata"""
    format: str
    """by content, not by file name: PNG, JPEG or WEBP"""
    sha256: str
    """hex, of the file's bytes"""
    file_bytes: int
    profile_ignored: bool
    """an embedded colour profile could not be used, and the numbers were taken as sRGB (CMYK: as plain ink)"""


def parse_colour(text: str) -> Colour:
    """The opaque colour of a CSS name ("white") or "#rrggbb".

    Raises: ConfigError.
    """
    expected = "background: expected an opaque colour such as 'white' or '#808080'"
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text)
    except ValueError as error:
        raise ConfigError(f"{expected}, found {text!r}.") from error
    if alpha:
        raise ConfigError(f"{expected}, found {text!r}, which has alpha.")
    return red, green, blue


def open_image(path: Path | ByteRange, background: Colour = WHITE, *, sha256: str | None = None) -> Image.Image:
    """The picture in a file: mode "RGB", upright, opaque, sRGB. See `read_image`."""
    return read_image(path, background, sha256=sha256).image


def read_image(
    path: Path | ByteRange, background: Colour = WHITE, *, sha256: str | None = None, md5: str | None = None
) -> DecodedImage:
    """The picture in a file and its facts; the bytes that are hashed are the bytes that are decoded.

    Given `sha256` (the manifest's column), a file that is no longer the one that was ingested is refused: a flipped
    bit in a JPEG decodes without complaint, so the digest is the only thing that sees it. `md5` is what a dump has of
    the file, and is checked the same way.
    Raises: ImageRejected.
    """
    data, digest = read_bytes(path, sha256=sha256, md5=md5)
    picture = decode_image(data, background)
    return DecodedImage(picture.image, picture.format, digest, len(data), picture.profile_ignored)


def decode_image(data: bytes, background: Colour = WHITE) -> Picture:
    """The picture in a file's bytes.

    - alpha (RGBA, LA, palette, colour key) is composited on `background`, on the sRGB numbers, as browsers do;
    - 16-bit grey is scaled to 8 bits, not clipped; of 16-bit colour Pillow keeps the high byte (within one level);
    - an embedded ICC profile is converted to sRGB, relative colorimetric with black-point compensation. One that is
      broken or of another colour space is ignored and reported; CMYK then becomes (1 − ink)·(1 − black);
    - EXIF orientation is applied. Broken EXIF counts as upright, as in every viewer;
    - an animation is refused rather than cut to a first frame, which is often blank and not what its tags describe.
      A phone's multi-picture JPEG is not an animation: its first picture is the picture.

    Raises: ImageRejected.
    """
    if not data:
        raise ImageRejected("empty_file", "expected a picture, found a file of zero bytes.")
    try:
        return _decode(data, background)
    except ImageRejected:
        raise
    except MemoryError as error:
        raise ImageRejected("out_of_memory", "the picture does not fit in memory.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRejected("too_many_pixels", f"expected at most {MAX_PIXELS // 10**6} megapixels: {error}") from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Exception as error:  # decoders of untrusted bytes raise nearly anything: each is a reason, not a crash
        raise _damaged(data, error) from error


def _decode(data: bytes, background: Colour) -> Picture:
    image, format_ = _open(data)
    image.load()  # Pillow's verify() passes truncated files; only decoding every pixel tells.
    if format_ == "PNG":
        _check_png_rows(image, data)
    colour, alpha = split_alpha(image, bit_depth=data[24] if format_ == "PNG" else 8)
    rgb, profile_ignored = to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        rgb = composite(rgb, alpha, background)
    rgb = _upright(rgb, _orientation(image))
    rgb.info = {}
    return Picture(rgb, format_, profile_ignored)


def _open(data: bytes) -> tuple[Image.Image, str]:
    """(the picture with its header read and its size allowed, its format)."""
    image = Image.open(BytesIO(data), formats=_FORMATS)
    _check_size(image.height, image.width)
    format_ = "JPEG" if image.format == "MPO" else str(image.format)
    if format_ != "JPEG" and getattr(image, "is_animated", False):
        raise ImageRejected("animated", "expected a still picture, found an animation: save the frame you want.")
    return image, format_


def _check_size(height: int, width: int) -> None:
    long, short = max(height, width), min(height, width)
    found = f"found {height}×{width} (height×width)"
    if long > MAX_SIDE:
        raise ImageRejected("side_too_long", f"expected sides of at most {MAX_SIDE} px, {found}.")
    if height * width > MAX_PIXELS:
        raise ImageRejected("too_many_pixels", f"expected at most {MAX_PIXELS // 10**6} megapixels, {found}.")
    if short < MIN_SIDE:
        raise ImageRejected("too_small", f"expected sides of at least {MIN_SIDE} px, {found}.")
    if long > MAX_ASPECT_RATIO * short:
        raise ImageRejected("too_elongated", f"expected a ratio of sides of at most {MAX_ASPECT_RATIO}, {found}.")


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(left, top, step right, step down) of each pass of an interlaced PNG"""


def _check_png_rows(image: Image.Image, data: bytes) -> None:
    """Refuses a PNG whose pixel stream ends in good order but too early.

    Pillow takes it as whole and leaves what is missing at zero, so only a picture that ends in a row of zeros (of two
    rows: an interlaced one may lack every other) is worth a second look.
    """
    tail = np.asarray(image.crop((0, image.height - 2, image.width, image.height)))
    if tail.reshape(2, -1).any(axis=1).all():
        return
    bit_depth, colour_type, interlaced = data[24], data[25], data[28]
    bits = bit_depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(image.height - top) // down), -(-(image.width - left) // right)) for left, top, right, down in passes]
    expected = sum(height * (1 + -(-width * bits // 8)) for height, width in sizes)
    found = _inflated_length(data)
    if found < expected:
        raise ImageRejected("truncated", f"expected {expected} bytes of pixels, found {found}.")


def _inflated_length(data: bytes) -> int:
    """Bytes in a PNG's pixel stream."""
    inflater, length = zlib.decompressobj(), 0
    for kind, start, end in _png_chunks(data):
        rest = data[start:end] if kind == b"IDAT" else b""
        while rest and not inflater.eof:
            length += len(inflater.decompress(rest, 2**20))
            rest = inflater.unconsumed_tail
    return length


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end of its data) of each chunk."""
    at = 8
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        yield kind, at + 8, at + 8 + size
        at += size + 12


# --- orientation ------------------------------------------------------------------------------------------------------

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (Exif 2.32, tag 0x0112)."""


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # any damage inside EXIF: the pixels are whole, so the picture is used as it lies
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)


# --- pictures that need none of the rules -----------------------------------------------------------------------------


def plain_header(data: bytes) -> PlainHeader | None:
    """The header of a picture that any decoder of its format decodes to the same sRGB numbers, if it is one.

    That is 8-bit grey or RGB, with or without an alpha channel, upright, and with no colour profile other than sRGB:
    nearly all pictures. Says nothing of damage.
    """
    try:
        image, format_ = _open(data)
        if format_ == "PNG":
            plain = data[24] == 8 and "transparency" not in image.info and not _may_be_turned(data)
        else:
            plain = _orientation(image) == 1
        plain = plain and image.mode in ("L", "RGB", "RGBA")
        if not plain or not means_srgb(image.info.get("icc_profile"), image.mode.removesuffix("A")):
            return None
    except Exception:  # what is wrong with it is `decode_image`'s to say
        return None
    return PlainHeader(format_, image.size[::-1], image.mode == "RGBA")


def _may_be_turned(data: bytes) -> bool:
    """Whether a PNG has EXIF or XMP, which may stand after the pixels: Pillow would decode all of them to look."""
    return any(
        kind == b"eXIf" or (kind[1:] == b"TXt" and data.startswith((b"XML:com.adobe", b"Raw profile"), start))
        for kind, start, _ in _png_chunks(data)
    )


# --- the words for what is wrong --------------------------------------------------------------------------------------

_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"8BPS", "PSD"),
    (0, b"%!PS", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyp", "HEIF or a video"),
    (0, b"<svg", "SVG"),
    (0, b"<", "HTML or XML"),
)


def _kind(data: bytes) -> str | None:
    return next((kind for at, magic, kind in _SIGNATURES if data[at : at + len(magic)] == magic), None)


def _unidentified(data: bytes) -> ImageRejected:
    kind = _kind(data)
    if kind in _FORMATS:
        return ImageRejected("undecodable", f"expected a whole {kind} file, found a broken header.")
    if kind is None:
        return ImageRejected("not_an_image", "expected PNG, JPEG or WebP, found no picture format that is known here.")
    return ImageRejected("format_not_supported", f"expected PNG, JPEG or WebP, found {kind}: convert it.")


def _damaged(data: bytes, error: Exception) -> ImageRejected:
    text = str(error) or type(error).__name__
    cut_webp = _kind(data) == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    if "truncated" in text.lower() or cut_webp:
        return ImageRejected("truncated", f"expected the whole file, found its end missing ({text}).")
    if "MAX_TEXT_CHUNK" in text or "text chunks" in text:
        return ImageRejected(
            "bad_chunk", f"expected metadata of ordinary size, found a chunk that is too large ({text})."
        )
    return ImageRejected("undecodable", f"the decoder gave up: {text}.")
