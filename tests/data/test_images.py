"""Decoding against pictures made in code: what each pixel must be follows from the formats' own definitions."""

import errno
import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import MALFORMED, NOISE, ODD, chunk, encoded, png, png_of, verdict_table
from PIL import Image, ImageCms, ImageFile

from sumizome.data import images, picture_bytes
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import decode_image, open_image, parse_colour, read_image
from sumizome.errors import ConfigError, DataError

PINK = (255, 0, 128)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def pixels(data: bytes, background: tuple[int, int, int] = PINK) -> np.ndarray:
    """int [height, width, 3]"""
    image = decode_image(data, background).image
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image).astype(int)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(int)[..., None], 3, axis=2)


def over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int] = PINK) -> np.ndarray:
    """The compositing formula, rounded: colour·a + background·(1 − a)."""
    share = alpha.astype(float)[..., None] / 255
    return np.floor(colour * share + np.array(background) * (1 - share) + 0.5).astype(int)


# --- modes ------------------------------------------------------------------------------------------------------------


def test_grey_of_every_bit_depth_spans_black_to_white() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in RAMP)  # 16 bytes a row at any depth
    for depth in (1, 2, 4, 8):
        per_byte = 8 // depth
        levels = np.unpackbits(RAMP, axis=1).reshape(16, 16 * per_byte, depth) @ (1 << np.arange(depth)[::-1])
        found = pixels(png(16, 16 * per_byte, depth, 0, rows))
        np.testing.assert_array_equal(found, grey(levels * 255 // (2**depth - 1)))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    """Golden values of round(v / 257); Pillow's own conversion makes 255 of everything from 255 up."""
    golden = {0: 0, 128: 0, 129: 1, 257: 1, 4660: 18, 32768: 128, 32896: 128, 65279: 254, 65406: 254, 65407: 255}
    golden[65535] = 255
    samples = np.resize(np.array(list(golden)), (16, 16))
    expected = np.resize(np.array(list(golden.values())), (16, 16))
    np.testing.assert_array_equal(pixels(png_of(samples, 16, 0)), grey(expected))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (31, 16)])
def test_a_black_picture_is_not_taken_for_a_cut_one(interlaced: bool, size: tuple[int, int]) -> None:
    """Where rows are missing Pillow leaves zeros, so zeros are looked at twice: here every one is meant."""
    height, width = size
    adam7 = [(8, 8, 0, 0), (8, 8, 0, 4), (8, 4, 4, 0), (4, 4, 0, 2), (4, 2, 2, 0), (2, 2, 0, 1), (2, 1, 1, 0)]
    passes = adam7 if interlaced else [(1, 1, 0, 0)]
    shapes = [np.zeros(size)[top::down, left::right].shape for down, right, top, left in passes]
    rows = b"".join(bytes(1 + (columns * 4 + 7) // 8) * count for count, columns in shapes)
    assert not pixels(png(height, width, 4, 0, rows, interlaced=interlaced)).any()
    with pytest.raises(ImageRejected) as caught:
        decode_image(png(height, width, 4, 0, rows[:-9], interlaced=interlaced))
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_is_right_to_one_level_and_exact_where_8_bits_hold_it(colour_type: int, channels: int) -> None:
    samples = np.random.default_rng(1).integers(0, 65536, (16, 16, channels))
    opaque = samples.copy()
    if colour_type in (4, 6):
        opaque[..., -1] = 65535
    found = pixels(png_of(opaque, 16, colour_type))
    expected = np.round((opaque if channels > 2 else np.repeat(opaque[..., :1], 3, -1))[..., :3] / 257)
    assert np.abs(found - expected).max() <= 1
    exact = samples // 257 * 257
    rgb = exact // 257 if channels > 2 else np.repeat(exact[..., :1], 3, -1) // 257
    expected = rgb if channels == 3 else over(rgb[..., :3], exact[..., -1] // 257)
    assert np.abs(pixels(png_of(exact, 16, colour_type)) - expected).max() <= (0 if channels == 3 else 1)


@pytest.mark.parametrize("background", [PINK, (255, 255, 255), (0, 0, 0)])
def test_alpha_is_composited_on_the_stated_background(background: tuple[int, int, int]) -> None:
    colour = NOISE[:16, :16]
    rgba = np.dstack([colour, RAMP])
    for data in (png_of(rgba, 8, 6), encoded(rgba, "WEBP", lossless=True, exact=True)):
        assert np.abs(pixels(data, background) - over(colour.astype(int), RAMP, background)).max() <= 1
    la = np.dstack([colour[..., 0], RAMP])
    assert np.abs(pixels(png_of(la, 8, 4), background) - over(grey(colour[..., 0]), RAMP, background)).max() <= 1


def test_opaque_alpha_leaves_the_pixels_as_they_are() -> None:
    rgba = np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(pixels(png_of(rgba, 8, 6)), NOISE)
    np.testing.assert_array_equal(pixels(png_of(NOISE, 8, 2)), NOISE)


def test_palettes_with_and_without_alpha() -> None:
    palette = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)
    alpha = np.arange(255, -1, -1, dtype=np.uint8)
    plte = chunk(b"PLTE", palette.tobytes())
    np.testing.assert_array_equal(pixels(png_of(RAMP, 8, 3, plte)), palette[RAMP])
    found = pixels(png_of(RAMP, 8, 3, plte + chunk(b"tRNS", alpha.tobytes())))
    assert np.abs(found - over(palette[RAMP].astype(int), alpha[RAMP])).max() <= 1
    one_clear = pixels(png_of(RAMP, 8, 3, plte + chunk(b"tRNS", b"\xff" * 7 + b"\0")))
    expected = palette[RAMP].astype(int)
    expected[RAMP == 7] = PINK
    np.testing.assert_array_equal(one_clear, expected)


def test_a_colour_key_is_read_at_the_depth_of_the_file() -> None:
    """PNG's tRNS for grey and RGB names one transparent colour, at 1 to 16 bits."""
    expected = grey(RAMP)
    expected[RAMP == 9] = PINK
    np.testing.assert_array_equal(pixels(png_of(RAMP, 8, 0, chunk(b"tRNS", struct.pack(">H", 9)))), expected)
    expected = np.dstack([RAMP] * 3).astype(int)
    expected[RAMP == 9] = PINK
    key = chunk(b"tRNS", struct.pack(">HHH", 9, 9, 9))
    np.testing.assert_array_equal(pixels(png_of(np.dstack([RAMP] * 3), 8, 2, key)), expected)

    nibbles = np.dstack([RAMP >> 4, RAMP & 15]).reshape(16, 32)
    expected = grey(nibbles * 17)
    expected[nibbles == 5] = PINK
    rows = b"".join(b"\0" + row.tobytes() for row in RAMP)
    np.testing.assert_array_equal(pixels(png(16, 32, 4, 0, rows, chunk(b"tRNS", struct.pack(">H", 5)))), expected)

    wide = RAMP.astype(int) * 257
    expected = grey(RAMP)
    expected[RAMP == 9] = PINK
    key = chunk(b"tRNS", struct.pack(">H", 9 * 257))
    np.testing.assert_array_equal(pixels(png_of(wide, 16, 0, key)), expected)
    key = chunk(b"tRNS", struct.pack(">HHH", *[9 * 257] * 3))
    np.testing.assert_array_equal(pixels(png_of(np.dstack([wide] * 3), 16, 2, key)), expected)


def test_jpeg_and_lossy_webp_are_close_to_what_was_encoded() -> None:
    smooth = np.asarray(Image.fromarray(NOISE).resize((8, 8)).resize((64, 64), Image.Resampling.BICUBIC))
    for data in (encoded(smooth, "JPEG", quality=95), encoded(smooth, "WEBP", quality=95)):
        assert np.abs(pixels(data) - smooth).mean() < 3
    grey_jpeg = encoded(Image.fromarray(smooth[..., 0]), "JPEG", quality=95)
    assert np.abs(pixels(grey_jpeg) - grey(smooth[..., 0])).mean() < 2


def test_cmyk_without_a_profile_is_ink_times_black() -> None:
    """R = (1 − C)(1 − K), and so on; inks as fractions."""
    for inks in [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (100, 50, 0, 80)]:
        found = pixels(encoded(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100))
        expected = [255 * (1 - ink / 255) * (1 - inks[3] / 255) for ink in inks[:3]]
        assert np.abs(found - expected).max() <= 3, inks


def test_a_multi_picture_jpeg_is_its_first_picture() -> None:
    first, second = (Image.new("RGB", (32, 32), colour) for colour in [(200, 100, 50), (0, 0, 0)])
    image, format, _ = decode_image(encoded(first, "MPO", save_all=True, append_images=[second], quality=95))
    assert format == "JPEG"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(first)).max() <= 3


# --- orientation ------------------------------------------------------------------------------------------------------

STORED = {
    # EXIF 2.32, tag 0x0112: what the stored row 0 and column 0 are of the upright picture.
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright.swapaxes(0, 1)[::-1],  # right, top
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation_is_undone(orientation: int, format: str) -> None:
    upright = np.kron(NOISE[:4, :3], np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {"lossless": True}
    data = encoded(np.ascontiguousarray(STORED[orientation](upright)), format, exif=exif, **options)
    found = pixels(data)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= (3 if format == "JPEG" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_counts_as_upright(exif: bytes) -> None:
    assert pixels(encoded(NOISE, "JPEG", exif=exif)).shape == NOISE.shape


# --- colour profiles --------------------------------------------------------------------------------------------------


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """sRGB with the names of its red and green primaries exchanged: what it calls red is green."""
    swap = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}
    profile = bytearray(srgb_profile())
    for entry in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12):
        name = bytes(profile[entry : entry + 4])
        profile[entry : entry + 4] = swap.get(name, name)
    return bytes(profile)


def icc(space: bytes, pcs: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC version 2 profile by its specification (ICC.1:2001-04, clauses 6.1 and 6.2)."""
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body
    illuminant = struct.pack(">iii", 63190, 65536, 54061)
    header = struct.pack(">I4sI4s4s4s12s4s28s", start + len(data), b"", 0x02400000, kind, space, pcs, b"", b"acsp", b"")
    return (header + illuminant).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def linear_grey_profile() -> bytes:
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    return icc(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": white, b"kTRC": b"curv" + bytes(8)})


def cmyk_profile() -> bytes:
    """A printer whose cyan ink is a mid grey: L* = 100·(1 − k)·(1 − c/2), and no other ink shows."""
    corners = [(1 - k) * (1 - c / 2) for c in (0, 1) for _ in range(4) for k in (0, 1)]  # cyan slowest, black fastest
    lattice = b"".join(bytes([round(255 * light), 128, 128]) for light in corners)
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *[65536 * (i in (0, 4, 8)) for i in range(9)])
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + lattice + identity * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    return icc(b"CMYK", b"Lab ", b"prtr", {b"wtpt": white, b"A2B0": lut, b"A2B1": lut})


def test_a_profile_is_converted_to_srgb() -> None:
    found = pixels(encoded(NOISE, "PNG", icc_profile=swapped_profile()))
    assert np.abs(found - NOISE[..., [1, 0, 2]]).max() <= 2


def test_a_profile_leaves_alpha_alone() -> None:
    rgba = np.dstack([NOISE[:16, :16], RAMP])
    found = pixels(encoded(rgba, "PNG", icc_profile=swapped_profile()))
    assert np.abs(found - over(NOISE[:16, :16][..., [1, 0, 2]].astype(int), RAMP)).max() <= 2


def test_a_linear_grey_profile_gets_srgbs_curve() -> None:
    linear = RAMP / 255
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    found = pixels(encoded(Image.fromarray(RAMP), "PNG", icc_profile=linear_grey_profile()))
    assert np.abs(found - expected[..., None]).max() <= 2


def test_cmyk_goes_through_its_profile() -> None:
    expected = {(0, 0, 0, 0): 255, (0, 0, 0, 255): 0, (0, 255, 0, 0): 255, (255, 0, 0, 0): 119}  # L* 50 is sRGB 119
    for inks, level in expected.items():
        data = encoded(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100, icc_profile=cmyk_profile())
        image, _, profile_ignored = decode_image(data)
        assert not profile_ignored
        assert np.abs(np.asarray(image).astype(int) - level).max() <= 3, inks


def test_an_rgb_profile_on_a_grey_picture_means_equal_channels() -> None:
    image, _, ignored = decode_image(encoded(Image.fromarray(RAMP), "PNG", icc_profile=swapped_profile()))
    assert not ignored
    found = np.asarray(image).astype(int)
    assert np.abs(found - grey(RAMP)).max() <= 2  # exchanging two primaries moves no neutral


@pytest.mark.parametrize("profile", [b"not a profile", swapped_profile()[:200], linear_grey_profile(), cmyk_profile()])
def test_a_profile_that_cannot_be_used_is_ignored_and_reported(profile: bytes) -> None:
    image, _, ignored = decode_image(encoded(NOISE, "PNG", icc_profile=profile))
    assert ignored
    np.testing.assert_array_equal(np.asarray(image), NOISE)


def test_an_srgb_profile_moves_no_pixel() -> None:
    image, _, ignored = decode_image(encoded(NOISE, "PNG", icc_profile=srgb_profile()))
    assert not ignored
    np.testing.assert_array_equal(np.asarray(image), NOISE)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pictures_are_refused_with_their_reason(name: str) -> None:
    data, reason = MALFORMED[name]
    with pytest.raises(ImageRejected) as caught:
        decode_image(data)
    assert caught.value.reason == reason, str(caught.value)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 300


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_taken_and_show_the_right_colours(name: str) -> None:
    odd = ODD[name]
    found = np.asarray(decode_image(odd.data).image).astype(int)
    assert found.shape[:2] == odd.size
    assert np.abs(found[2, 2] - odd.top_left).max() <= odd.tolerance
    assert np.abs(found[-3, -3] - odd.bottom_right).max() <= odd.tolerance


def test_the_verdicts_are_those_of_the_docs() -> None:
    """`python tests/data/malformed.py` prints the table."""
    assert len(MALFORMED) + len(ODD) >= 60
    assert verdict_table() in (Path(__file__).parents[2] / "docs" / "rejects.md").read_text(encoding="utf-8")


@settings(max_examples=300, deadline=None)
@given(st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_decode_or_are_rejected_and_nothing_else(data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(FUZZ_SEEDS))
    damaged = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        image = decode_image(bytes(damaged)).image
    except ImageRejected as error:
        assert error.reason
    else:
        assert image.mode == "RGB"


FUZZ_SEEDS = [
    encoded(NOISE[:20, :20], "PNG", icc_profile=swapped_profile()),
    encoded(Image.fromarray(NOISE[:20, :20]).quantize(16), "PNG"),
    encoded(NOISE[:20, :20], "JPEG", progressive=True),
    encoded(Image.new("CMYK", (16, 16)), "JPEG", icc_profile=cmyk_profile()),
    encoded(np.dstack([NOISE[:16, :16], RAMP]), "WEBP"),
    png_of(RAMP.astype(int) * 257, 16, 0),
]


def test_the_largest_picture_allowed_passes_the_limits_and_no_decoder_is_lenient() -> None:
    images._check_size(10_000, 10_000)
    images._check_size(32_768, 3_000)
    images._check_size(320, 16)
    assert Image.MAX_IMAGE_PIXELS == images.MAX_PIXELS == 100_000_000
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_what_is_not_a_readable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening one would wait for ever
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(picture_bytes.MAX_FILE_BYTES + 1)  # sparse
    expected = {"folder.png": "not_a_file", "pipe.png": "not_a_file", "large.png": "file_too_large"}
    for name, reason in (expected | {"missing.png": "missing", "nul\0.png": "unreadable"}).items():
        with pytest.raises(ImageRejected) as caught:
            read_image(tmp_path / name)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOENT, "missing"),
        (errno.EACCES, "no_permission"),
        (errno.EPERM, "no_permission"),
        (errno.EIO, "read_error"),
        (errno.ESTALE, "unreadable"),
    ],
)
def test_what_the_system_refuses_has_its_own_reason(
    number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(NOISE, "PNG"))

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(picture_bytes.os, "open", fail)
    with pytest.raises(ImageRejected) as caught:
        read_image(path)
    assert caught.value.reason == reason
    assert os.strerror(number) in str(caught.value)


@pytest.mark.parametrize("change", [-10, 10])
def test_a_file_that_grows_or_shrinks_while_it_is_read_is_refused(
    change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    data = encoded(NOISE, "PNG")
    path.write_bytes(data)
    fstat = os.fstat

    def stat_then_change(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(path, len(data) + change)
        return status

    monkeypatch.setattr(picture_bytes.os, "fstat", stat_then_change)
    with pytest.raises(ImageRejected) as caught:
        read_image(path)
    assert caught.value.reason == "unstable"


def test_a_file_that_changed_since_ingest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(NOISE, "JPEG"))
    before = read_image(path)
    assert np.array_equal(np.asarray(open_image(path, sha256=before.sha256)), np.asarray(before.image))
    flipped = bytearray(path.read_bytes())
    flipped[-100] ^= 1  # decodes without complaint
    path.write_bytes(flipped)
    assert read_image(path).sha256 != before.sha256
    with pytest.raises(ImageRejected) as caught:
        open_image(path, sha256=before.sha256)
    assert caught.value.reason == "changed"


def test_a_rejection_comes_back_whole_from_another_process() -> None:
    again = pickle.loads(pickle.dumps(ImageRejected("too_small", "expected more.")))  # noqa: S301
    assert (again.reason, str(again), isinstance(again, DataError)) == ("too_small", "expected more.", True)


def test_colours_are_names_or_numbers_and_opaque() -> None:
    assert parse_colour("white") == (255, 255, 255)
    assert parse_colour("#102030") == (16, 32, 48)
    for wrong in ("", "whit", "#12345", "#10203040", "rgba(1,2,3,4)"):
        with pytest.raises(ConfigError, match="background"):
            parse_colour(wrong)


def test_the_decoded_picture_does_not_hold_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(NOISE, "PNG"))
    image = open_image(path)
    path.unlink()
    assert type(image) is Image.Image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert buffer.tell() > 0
