"""Canvases against Pillow's Lanczos from the whole picture, and against themselves on other threads."""

import hashlib
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from malformed import MALFORMED, NOISE, ODD, encoded
from PIL import Image, ImageDraw

from sumizome.data.buckets import BucketConfig, assign_buckets, bucket_table, crop_geometry
from sumizome.data.canvas import Frame, load_canvas
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import decode_image


def frame_of(height: int, width: int, area: int = 128, crop: str = "random") -> Frame:
    sizes, table = np.array([[height, width]]), bucket_table(BucketConfig(area=area, step=16))
    made = crop_geometry(sizes, table[assign_buckets(sizes, table).bucket], ["a"], crop=crop, crop_seed=1)
    return Frame(*(tuple(each[0].tolist()) for each in (made.original, made.resized, made.offset, made.target)))


def by_pillow(data: bytes, frame: Frame) -> np.ndarray:
    (top, left), (height, width) = frame.offset, frame.target
    image = decode_image(data).image.resize(frame.resized[::-1], Image.Resampling.LANCZOS)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-3, np.mean((found.astype(float) - expected) ** 2))))


def drawing(height: int, width: int) -> np.ndarray:
    """Shading, flat shapes and thin lines."""
    random = np.random.default_rng(5)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    shading = np.stack([200 * x, 200 * y, 255 * x * y], axis=-1)
    image = Image.fromarray(shading.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(60):
        left, top, size = *(random.uniform(0, 1, 2) * (width, height)), random.uniform(5, 60)
        pen.ellipse(
            (left, top, left + size, top + size), fill=tuple(random.integers(0, 256, 3).tolist()), outline=(0, 0, 0)
        )
        pen.line((left, top, *(random.uniform(0, 1, 2) * (width, height))), fill=(0, 0, 0), width=2)
    return np.asarray(image)


def zone_plate(side: int) -> np.ndarray:
    """Every frequency up to the picture's own limit: what a small picture cannot show has to vanish, not come back."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    return np.repeat(
        (127.5 + 127.5 * np.cos(np.pi * side / 4 * (x * x + y * y))).astype(np.uint8)[..., None], 3, axis=2
    )


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(300, 200), (211, 407), (97, 61), (640, 640), (1024, 768), (1001, 1333)])
def test_a_canvas_is_pillows_lanczos_of_the_whole_picture(tmp_path: Path, size: tuple[int, int], format_: str) -> None:
    data = encoded(drawing(*size), format_, **({} if format_ == "PNG" else {"quality": 92}))
    (tmp_path / "a").write_bytes(data)
    frame = frame_of(*size)
    found = load_canvas(tmp_path / "a", frame)
    assert found.shape == (*frame.target, 3)
    assert psnr(found, by_pillow(data, frame)) >= 40


@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_no_frequency_comes_back_as_another(tmp_path: Path, format_: str) -> None:
    for name, pixels in {
        "zone": zone_plate(1000),
        "checker": np.repeat((np.indices((800, 800)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2),
    }.items():
        data = encoded(pixels, format_, **({} if format_ == "PNG" else {"quality": 97, "subsampling": 0}))
        (tmp_path / name).write_bytes(data)
        frame = frame_of(*pixels.shape[:2])
        assert psnr(load_canvas(tmp_path / name, frame), by_pillow(data, frame)) >= 40, name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_every_odd_picture_is_on_its_canvas_as_it_was_ingested(tmp_path: Path, name: str) -> None:
    """Both decoders, where a picture may come through either."""
    (tmp_path / "a").write_bytes(ODD[name].data)
    height, width = ODD[name].size
    frame = Frame((height, width), (height, width), (1, 2), (height - 4, width - 8))
    whole = np.asarray(decode_image(ODD[name].data).image).astype(int)
    assert np.abs(load_canvas(tmp_path / "a", frame) - whole[1:-3, 2:-6]).max() <= 1


@pytest.mark.parametrize("name", [name for name, (_, reason) in MALFORMED.items() if reason == "truncated"])
def test_a_damaged_picture_has_no_canvas(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(MALFORMED[name][0])
    with pytest.raises(ImageRejected):
        load_canvas(tmp_path / "a", frame_of(48, 40, 32))


def test_a_picture_of_another_size_or_other_bytes_has_changed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(encoded(NOISE, "PNG"))
    for frame, sha256 in ((frame_of(40, 48, 32), None), (frame_of(48, 40, 32), "0" * 64)):
        with pytest.raises(ImageRejected) as caught:
            load_canvas(tmp_path / "a", frame, sha256=sha256)
        assert caught.value.reason == "changed"


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(encoded(drawing(700, 500), "JPEG"))
    frame = frame_of(700, 500)
    with ThreadPoolExecutor(8) as pool:
        canvases = list(pool.map(lambda _: load_canvas(tmp_path / "a", frame).tobytes(), range(32)))
    assert len(set(canvases)) == 1


def test_instructions_and_inner_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(encoded(drawing(700, 500), "JPEG"))
    frame = frame_of(700, 500)
    program = (
        "import hashlib, sys; from pathlib import Path; from sumizome.data.canvas import Frame, load_canvas;"
        f"print(hashlib.sha256(load_canvas(Path(sys.argv[1]), Frame(*{tuple(frame)!r})).tobytes()).hexdigest())"
    )
    environment = os.environ | {"VIPS_NOVECTOR": "1", "VIPS_CONCURRENCY": "4"}
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert found == hashlib.sha256(load_canvas(tmp_path / "a", frame).tobytes()).hexdigest()


@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (211, 407), (640, 640), (130, 1000)])
def test_the_numbers_are_the_crop_that_was_made(tmp_path: Path, size: tuple[int, int], crop: str) -> None:
    """A picture whose red tells its row and whose green tells its column, averaged over noise finer than a level."""
    random, places = np.random.default_rng(0), np.mgrid[0 : size[0], 0 : size[1]]
    shown = [16 + 223 * place / extent + random.uniform(0, 1, size) for place, extent in zip(places, size, strict=True)]
    Image.fromarray(np.dstack([*shown, shown[0]]).astype(np.uint8)).save(tmp_path / "a.png")
    frame = frame_of(*size, crop=crop)
    canvas = load_canvas(tmp_path / "a.png", frame).astype(float)
    assert canvas.shape[:2] == frame.target
    for axis in (0, 1):
        line = (canvas[..., axis].mean(axis=1 - axis) - 16) * size[axis] / 223
        # Pixel centres: place p of the canvas is place p + offset of the resized picture.
        place = np.arange(frame.target[axis]) + frame.offset[axis] + 0.5
        expected = place * size[axis] / frame.resized[axis] - 0.5
        inside = slice(4, -4)  # Lanczos leans on the border pixels near the border
        canvas_pixel = size[axis] / frame.resized[axis]
        assert abs((line - expected)[inside].mean()) < 0.35 * canvas_pixel  # 8 bits hold it to about a quarter


def test_the_image_module_of_pillow_agrees_on_what_was_written(tmp_path: Path) -> None:
    """The fast decoder and Pillow give the same numbers for the same JPEG, to the last bit."""
    for options in ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}):
        data = encoded(drawing(203, 301), "JPEG", quality=90, **options)
        (tmp_path / "a.jpg").write_bytes(data)
        frame = Frame((203, 301), (203, 301), (0, 0), (203, 301))
        expected = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(load_canvas(tmp_path / "a.jpg", frame), expected)
