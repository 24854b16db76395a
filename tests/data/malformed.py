"""Broken and hostile pictures, made here byte by byte, each with the verdict that it must get."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    height: int,
    width: int,
    bit_depth: int,
    colour_type: int,
    rows: bytes,
    extra: bytes = b"",
    *,
    interlaced: bool = False,
) -> bytes:
    """A PNG by the specification's own words; `rows` holds each row after its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_of(samples: np.ndarray, bit_depth: int, colour_type: int, extra: bytes = b"") -> bytes:
    """A PNG of 8- or 16-bit samples [height, width(, channels)]."""
    samples = samples.astype(">u2" if bit_depth == 16 else "u1")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    return png(samples.shape[0], samples.shape[1], bit_depth, colour_type, rows, extra)


def encoded(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _with_size(jpeg: bytes, height: int, width: int) -> bytes:
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def _without(jpeg: bytes, marker: bytes) -> bytes:
    start = jpeg.index(marker)
    length = int.from_bytes(jpeg[start + 2 : start + 4], "big")
    return jpeg[:start] + jpeg[start + 2 + length :]


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _cases() -> dict[str, tuple[bytes, str]]:
    good_png, jpeg = encoded(NOISE, "PNG"), encoded(NOISE, "JPEG")
    progressive, webp = encoded(NOISE, "JPEG", progressive=True), encoded(NOISE, "WEBP")
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - NOISE)]}
    grey_rows = (b"\0" + b"\x80" * 16) * 16
    six_passes = b"".join(
        (b"\0" + b"\x80" * width) * height for height, width in [(2, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)]
    )
    bomb = zlib.compress(b"\0" * 80_000_000)
    header_only = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0))
    return {
        "zero_bytes.png": (b"", "empty_file"),
        "garbage.png": (bytes(range(1, 200)), "not_an_image"),
        "text.jpg": (b"Not found", "not_an_image"),
        "html.jpg": (b"<html>404</html>", "format_not_supported"),
        "gif.png": (encoded(NOISE, "GIF"), "format_not_supported"),
        "bmp.webp": (encoded(NOISE, "BMP"), "format_not_supported"),
        "tiff.jpeg": (encoded(NOISE, "TIFF"), "format_not_supported"),
        "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "format_not_supported"),
        "signature_only.png": (good_png[:8], "undecodable"),
        "bad_header_crc.png": (_flip(good_png, 30), "undecodable"),
        "cut_in_half.png": (good_png[: len(good_png) // 2], "truncated"),
        "flipped.png": (_flip(good_png, len(good_png) // 2), "undecodable"),
        "no_pixels.png": (header_only + chunk(b"IEND", b""), "undecodable"),
        "too_few_rows.png": (png(64, 64, 8, 0, bytes(65 * 16)), "truncated"),
        "too_few_rows_interlaced.png": (png(16, 16, 8, 0, six_passes, interlaced=True), "truncated"),
        "not_zlib.png": (header_only + chunk(b"IDAT", b"rubbish") + chunk(b"IEND", b""), "undecodable"),
        "unknown_filter.png": (png(16, 16, 8, 0, (b"\x09" + b"\x80" * 16) * 16), "undecodable"),
        "no_palette.png": (png(16, 16, 8, 3, grey_rows), "broken_palette"),
        "short_palette.png": (png(16, 16, 8, 3, grey_rows, chunk(b"PLTE", bytes(30))), "broken_palette"),
        "text_bomb.png": (png(16, 16, 8, 0, grey_rows, chunk(b"zTXt", b"a\0\0" + bomb)), "bad_chunk"),
        "profile_bomb.png": (png(16, 16, 8, 0, grey_rows, chunk(b"iCCP", b"a\0\0" + bomb)), "bad_chunk"),
        "pixel_bomb.png": (png(13_000, 13_000, 1, 0, b"\0" * 1626 * 13_000), "too_many_pixels"),
        "just_over.png": (png(10_001, 10_000, 1, 0, b""), "too_many_pixels"),
        "absurd_size.png": (png(2**31 - 1, 2**31 - 1, 8, 2, b""), "too_many_pixels"),
        "long_side.png": (png(32_769, 2_000, 1, 0, b""), "side_too_long"),
        "thread.png": (png(400, 19, 8, 0, (b"\0" + b"\x80" * 19) * 400), "too_elongated"),
        "one_pixel.png": (png(1, 1, 8, 0, b"\0\x80"), "too_small"),
        "invisible.png": (encoded(np.zeros((16, 16, 4), np.uint8), "PNG"), "fully_transparent"),
        "animated.png": (encoded(NOISE, "PNG", **frames), "animated"),
        "animated.webp": (encoded(NOISE, "WEBP", **frames), "animated"),
        "cut_header.jpg": (jpeg[:20], "undecodable"),
        "cut_in_half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut_at_the_end.jpg": (jpeg[:-40], "truncated"),
        "cut_progressive.jpg": (progressive[: len(progressive) // 2], "truncated"),
        "no_tables.jpg": (_without(jpeg, b"\xff\xdb"), "undecodable"),
        "huge_claim.jpg": (_with_size(jpeg, 60_000, 60_000), "too_many_pixels"),
        "no_height.jpg": (_with_size(jpeg, 0, 40), "undecodable"),
        "cut_in_half.webp": (webp[: len(webp) // 2], "truncated"),
        "cut_at_the_end.webp": (webp[:-6], "truncated"),
        "broken.webp": (_flip(webp, 20), "undecodable"),
    }


MALFORMED = _cases()
"""file name → (bytes, reason of the rejection)"""
