"""Broken, hostile and merely odd pictures, made here byte by byte, each with the verdict that it must get.

`MALFORMED` are refused with a reason, `ODD` are taken, and show known colours in two corners. `verdict_table` is in
docs/rejects.md.
"""

import io
import struct
import zlib
from typing import NamedTuple

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
    return (
        _foreign(good_png, jpeg, webp)
        | _cut_and_forged(good_png, jpeg, webp)
        | {
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
    )


def _patched(data: bytes, at: int, patch: bytes) -> bytes:
    return data[:at] + patch + data[at + len(patch) :]


def _foreign(png_: bytes, jpeg: bytes, webp: bytes) -> dict[str, tuple[bytes, str]]:
    """Other formats under a picture's name."""
    return {
        "pdf.png": (b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n", "format_not_supported"),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', "format_not_supported"),
        "xml_svg.png": (b'<?xml version="1.0"?><svg width="64" height="64"/>', "format_not_supported"),
        "psd.png": (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 64, 64, 8, 3), "format_not_supported"),
        "avif.png": (b"\0\0\0\x20ftypavif" + bytes(40), "format_not_supported"),
        "heic.jpg": (b"\0\0\0\x20ftypheic" + bytes(40), "format_not_supported"),
        "video.png": (b"\0\0\0\x20ftypisom" + bytes(40), "format_not_supported"),
        "jxl.png": (b"\xff\x0a" + bytes(40), "format_not_supported"),
        "tiff_big_endian.png": (b"MM\0*" + bytes(40), "format_not_supported"),
        "wave.webp": (b"RIFF" + struct.pack("<I", 40) + b"WAVEfmt " + bytes(32), "not_an_image"),
        "zip.png": (b"PK\3\4" + bytes(60), "not_an_image"),
        "elf.png": (b"\x7fELF" + bytes(60), "not_an_image"),
        "gif_then_png.png": (b"GIF89a" + png_, "format_not_supported"),
        "space_then_png.png": (b" " + png_, "not_an_image"),
        "text_then_jpeg.jpg": (b"<!-- -->" + jpeg, "format_not_supported"),
        "animated_gif.webp": (
            encoded(NOISE, "GIF", save_all=True, append_images=[Image.fromarray(255 - NOISE)]),
            "format_not_supported",
        ),
    }


def _cut_and_forged(png_: bytes, jpeg: bytes, webp: bytes) -> dict[str, tuple[bytes, str]]:
    """Ends missing, headers that lie."""
    scan = jpeg.index(b"\xff\xda")
    alpha = encoded(np.dstack([NOISE, NOISE[..., 0]]), "WEBP")
    extended = alpha.index(b"VP8X") + 8
    lossless = encoded(NOISE, "WEBP", lossless=True)
    coded = webp.index(b"\x9d\x01\x2a") + 3
    grey_rows = (b"\0" + b"\x80" * 64) * 64
    late = png_.index(b"IEND") - 4
    return {
        "cut_in_signature.png": (png_[:5], "not_an_image"),
        "cut_in_header.png": (png_[:20], "truncated"),
        "cut_in_last_row.png": (png_[: late - 40], "truncated"),
        "zeroed_end.png": (png_[: len(png_) // 2] + bytes(len(png_) - len(png_) // 2), "undecodable"),
        "all_zeros.png": (bytes(2000), "not_an_image"),
        "zeroed_header.png": (_patched(png_, 16, bytes(8)), "undecodable"),
        "no_width.png": (png(64, 0, 8, 0, grey_rows), "undecodable"),
        "depth_3.png": (png(64, 64, 3, 0, grey_rows), "undecodable"),
        "colour_type_5.png": (png(64, 64, 8, 5, grey_rows), "undecodable"),
        "interlaced_cut.png": (png(64, 64, 8, 0, grey_rows[:40], interlaced=True), "undecodable"),
        "signature_of_jpeg.jpg": (jpeg[:3], "undecodable"),
        "cut_before_scan.jpg": (jpeg[:scan], "undecodable"),
        "no_end_marker.jpg": (jpeg[:-2], "truncated"),
        "cut_after_scan_header.jpg": (jpeg[: scan + 14], "truncated"),
        "no_frame.jpg": (_without(jpeg, b"\xff\xc0"), "undecodable"),
        "twelve_bits.jpg": (_patched(jpeg, jpeg.index(b"\xff\xc0") + 4, b"\x0c"), "undecodable"),
        "five_components.jpg": (_patched(jpeg, jpeg.index(b"\xff\xc0") + 9, b"\x05"), "undecodable"),
        "arithmetic_progressive.jpg": (_patched(jpeg, jpeg.index(b"\xff\xc0"), b"\xff\xca"), "undecodable"),
        "lossless.jpg": (_patched(jpeg, jpeg.index(b"\xff\xc0"), b"\xff\xc3"), "undecodable"),
        "hierarchical.jpg": (_patched(jpeg, jpeg.index(b"\xff\xc0"), b"\xff\xc5"), "undecodable"),
        "long_side.jpg": (_with_size(jpeg, 40_000, 2_100), "side_too_long"),
        "one_row.jpg": (_with_size(jpeg, 1, 30_000), "too_small"),
        "huge_canvas.webp": (_patched(alpha, extended + 4, b"\xff\x3f\0\xff\x3f\0"), "too_many_pixels"),
        "huge_frame.webp": (_patched(webp, coded, struct.pack("<HH", 16_383, 16_383)), "too_many_pixels"),
        "huge_lossless.webp": (
            _patched(lossless, lossless.index(b"VP8L") + 9, b"\xff\xff\xff\x0f"),
            "too_many_pixels",
        ),
        "cut_in_header.webp": (webp[:16], "truncated"),
        "no_chunks.webp": (b"RIFF\4\0\0\0WEBP", "undecodable"),
        "cut_lossless.webp": (lossless[: len(lossless) // 2], "truncated"),
        "one_pixel.webp": (encoded(NOISE[:1, :1], "WEBP"), "too_small"),
        "icc_bomb_small.png": (
            png(64, 64, 8, 0, grey_rows, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26)))),
            "bad_chunk",
        ),
        "international_text_bomb.png": (
            png(64, 64, 8, 0, grey_rows, chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**26)))),
            "bad_chunk",
        ),
    }


MALFORMED = _cases()
"""file name → (bytes, reason of the rejection)"""


# --- odd, but pictures ------------------------------------------------------------------------------------------------

RED, BLUE = (200, 30, 40), (20, 60, 220)
HALVES = np.zeros((32, 48, 3), np.uint8) + np.where(np.arange(32) < 16, 0, 1).astype(np.uint8)[:, None, None]
HALVES = np.where(HALVES == 0, np.array(RED, np.uint8), np.array(BLUE, np.uint8))
"""red above, blue below"""


class Odd(NamedTuple):
    data: bytes
    top_left: tuple[int, int, int] = RED
    bottom_right: tuple[int, int, int] = BLUE
    size: tuple[int, int] = (32, 48)
    tolerance: int = 6


def _turned(orientation: int, format_: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's Transpose that stores it so
    image = Image.fromarray(HALVES)
    image = image.transpose(Image.Transpose(turns[orientation])) if orientation in turns else image
    return encoded(image, format_, exif=exif, **({"quality": 95, "subsampling": 0} if format_ == "JPEG" else {}))


def _odd() -> dict[str, Odd]:
    png_, jpeg = encoded(HALVES, "PNG"), encoded(HALVES, "JPEG", quality=95, subsampling=0)
    webp = encoded(HALVES, "WEBP", lossless=True)
    progressive = encoded(HALVES, "JPEG", quality=95, progressive=True, subsampling=0)
    tables, scan = jpeg.index(b"\xff\xc4"), jpeg.index(b"\xff\xda")
    last = progressive.rindex(b"\xff\xda")
    late, start = png_.index(b"IEND") - 4, png_.index(b"IDAT") - 4
    wide = png_of(HALVES.astype(int) * 257, 16, 2)
    grey = HALVES[..., 1]
    alpha = np.dstack([HALVES, np.where(np.arange(48) < 24, 255, 0)[None].repeat(32, 0)]).astype(np.uint8)
    palette = chunk(b"PLTE", bytes((*RED, *BLUE)))
    indices = (HALVES[..., 0] == BLUE[0]).astype(np.uint8)
    bits = b"".join(b"\0" + np.packbits(row).tobytes() for row in indices)
    cmyk = Image.fromarray(HALVES).convert("CMYK")
    cases = {
        "trailing_zip.png": Odd(png_ + b"PK\3\4" + bytes(500), tolerance=0),
        "trailing_html.jpg": Odd(jpeg + b"<script>alert(1)</script>"),
        "trailing_noise.webp": Odd(webp + bytes(range(256)), tolerance=0),
        "two_pictures.jpg": Odd(jpeg + encoded(255 - HALVES, "JPEG")),
        "no_end_chunk.png": Odd(png_[:late], tolerance=0),
        "no_checksum_at_the_end.png": Odd(png_[: late - 4], tolerance=0),
        "standard_huffman_tables_left_out.jpg": Odd(jpeg[:tables] + jpeg[scan:]),
        "progressive.jpg": Odd(progressive),
        "extended_sequential.jpg": Odd(_patched(jpeg, jpeg.index(b"\xff\xc0"), b"\xff\xc1")),
        "last_scan_200_times.jpg": Odd(progressive[:-2] + progressive[last:-2] * 200 + b"\xff\xd9"),
        "a_jpeg_in_truth.png": Odd(jpeg),
        "wrong_thumbnail.jpg": Odd(jpeg[:2] + _app1(encoded(255 - HALVES, "JPEG")) + jpeg[2:]),
        "exif_of_64_kb.jpg": Odd(jpeg[:2] + _app1(bytes(65_000)) + jpeg[2:]),
        "broken_profile.png": Odd(encoded(HALVES, "PNG", icc_profile=b"no profile"), tolerance=0),
        "gamma_chunk.png": Odd(png_[:start] + chunk(b"gAMA", struct.pack(">I", 100_000)) + png_[start:], tolerance=0),
        "unknown_chunk.png": Odd(png_[:start] + chunk(b"zzZz", b"?" * 99) + png_[start:], tolerance=0),
        "16_bits.png": Odd(wide, tolerance=1),
        "16_bit_grey.png": Odd(png_of(grey.astype(int) * 257, 16, 0), (30,) * 3, (60,) * 3, tolerance=0),
        "grey.jpg": Odd(encoded(Image.fromarray(grey), "JPEG", quality=95), (30,) * 3, (60,) * 3),
        "grey_alpha.png": Odd(png_of(np.dstack([grey, alpha[..., 3]]), 8, 4), (30,) * 3, (255,) * 3, tolerance=0),
        "alpha.png": Odd(png_of(alpha, 8, 6), RED, (255, 255, 255), tolerance=0),
        "alpha.webp": Odd(encoded(alpha, "WEBP", lossless=True), RED, (255, 255, 255), tolerance=0),
        "one_bit.png": Odd(png(32, 48, 1, 0, bits), (0, 0, 0), (255, 255, 255), tolerance=0),
        "one_bit_palette.png": Odd(png(32, 48, 1, 3, bits, palette), tolerance=0),
        "palette_with_alpha.png": Odd(
            png_of(indices, 8, 3, palette + chunk(b"tRNS", b"\xff\0")), RED, (255, 255, 255), tolerance=0
        ),
        "colour_key.png": Odd(
            png_of(HALVES, 8, 2, chunk(b"tRNS", struct.pack(">HHH", *BLUE))), RED, (255, 255, 255), tolerance=0
        ),
        "inverted_cmyk.jpg": Odd(encoded(cmyk, "JPEG", quality=98), tolerance=8),
        "chroma_halved_in_one_direction.jpg": Odd(encoded(HALVES, "JPEG", quality=95, subsampling=1)),
        "orientation_9.jpg": Odd(_turned(9, "JPEG")),
        "orientation_0.png": Odd(_turned(0, "PNG"), tolerance=0),
    }
    turned = {f"orientation_{each}.jpg": Odd(_turned(each, "JPEG")) for each in range(1, 9)}
    return cases | turned | {"orientation_6.png": Odd(_turned(6, "PNG"), tolerance=0)}


def _app1(body: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body


ODD = _odd()
"""file name → what it shows"""


def verdict_table() -> str:
    """One line a case, for docs/rejects.md."""
    rows = [(name, f"refused: `{reason}`") for name, (_, reason) in sorted(MALFORMED.items())]
    rows += [
        (name, f"taken, {odd.size[0]}×{odd.size[1]}, {_hex(odd.top_left)} … {_hex(odd.bottom_right)}")
        for name, odd in sorted(ODD.items())
    ]
    return "\n".join(["| file | verdict |", "|---|---|", *(f"| {name} | {verdict} |" for name, verdict in rows), ""])


def _hex(colour: tuple[int, int, int]) -> str:
    return "#" + bytes(colour).hex()


if __name__ == "__main__":
    print(verdict_table(), end="")
