"""Decoding, resizing and cropping: Sumizome's `load_canvas` beside what Pillow, OpenCV, libvips and simplejpeg can do.

One set of pictures (JPEG, PNG and WebP in the mix of a booru), drawn here; each path in turn with ours, several
rounds, processor time, medians. Quality is PSNR against Pillow's Lanczos from the whole picture, the worst picture's.
A peer that is not installed (`pip install 'sumizome[bench]'`) is left out. `--rounds`, `--pictures`: a shorter or
longer look.
"""

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from measurement import record
from PIL import Image, ImageDraw

from sumizome.data.buckets import BucketConfig, assign_buckets, bucket_table, crop_geometry
from sumizome.data.canvas import Frame, load_canvas

QUALITY_DB = 40.0
"""least PSNR against Lanczos from the whole picture, of the worst picture, for a path to count as of equal quality"""

SIZES = ((1024, 1024), (1448, 2048), (3541, 2508), (1600, 1200), (4000, 2828), (1333, 2000))
FORMATS = ("JPEG", "JPEG", "PNG", "JPEG", "JPEG", "PNG", "JPEG", "WEBP", "JPEG", "PNG")
"""six in ten, three in ten, one in ten"""

Load = Callable[[Path, Frame], np.ndarray]


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(height: int, width: int, seed: int) -> np.ndarray:
    """Flat shapes with outlines, hatching and text-like marks on soft shading with a little paper grain."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height // 8 * 1j, 0 : 1 : width // 8 * 1j].astype(np.float32)
    a, b, c = random.uniform(2, 6, 3)
    shading = np.stack([np.sin(x * a + y * b), np.cos(x * b - y * c), np.sin(x * y * c)], axis=-1)
    image = Image.fromarray((150 + 80 * shading).clip(0, 255).astype(np.uint8))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    pen, scale = ImageDraw.Draw(image), max(height, width) / 1000
    for _ in range(150):
        colour, radius = tuple(random.integers(0, 256, 3).tolist()), random.uniform(4, 90) * scale
        left, top = random.uniform(0, width), random.uniform(0, height)
        box = (left, top, left + radius, top + radius * random.uniform(0.4, 2))
        pen.ellipse(box, fill=colour, outline=(25, 15, 30), width=max(1, round(2 * scale)))
    for _ in range(400):
        left, top = random.uniform(0, width), random.uniform(0, height)
        end = (left + random.normal(0, 60) * scale, top + random.normal(0, 60) * scale)
        pen.line((left, top, *end), fill=(25, 15, 30), width=random.integers(1, 4).item())
    grain = np.rint(random.normal(0, 1.5, (512, 512, 1))).astype(np.int16)
    tiles = (-(-height // 512), -(-width // 512), 1)
    return (np.asarray(image) + np.tile(grain, tiles)[:height, :width]).clip(0, 255).astype(np.uint8)


def write_pictures(folder: Path, count: int) -> list[Path]:
    paths = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        image, format_ = Image.fromarray(draw(height, width, number)), FORMATS[number % len(FORMATS)]
        path = folder / f"{number:03}.{format_.lower()}"
        subsampling = {"subsampling": 2 if number % 2 else 0} if format_ == "JPEG" else {}
        image.save(path, format_, **({} if format_ == "PNG" else {"quality": 92}), **subsampling)
        paths.append(path)
    return paths


def frames(paths: Sequence[Path], area: int) -> list[Frame]:
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(image.size[::-1])
    pictures, table = np.array(sizes), bucket_table(BucketConfig(area=area))
    geometry = crop_geometry(
        pictures, table[assign_buckets(pictures, table).bucket], [path.name for path in paths], crop="center"
    )
    columns = (each.tolist() for each in (geometry.original, geometry.resized, geometry.offset, geometry.target))
    return [Frame(*(tuple(pair) for pair in row)) for row in zip(*columns, strict=True)]


# --- the paths --------------------------------------------------------------------------------------------------------


def cropped(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    (top, left), (height, width) = frame.offset, frame.target
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def by_lanczos(image: Image.Image, frame: Frame) -> np.ndarray:
    return cropped(np.asarray(image.resize(frame.resized[::-1], Image.Resampling.LANCZOS)), frame)


def pillow(path: Path, frame: Frame) -> np.ndarray:
    return by_lanczos(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"), frame)


def pillow_draft(path: Path, frame: Frame) -> np.ndarray:
    image = Image.open(io.BytesIO(path.read_bytes()))
    image.draft("RGB", tuple(2 * side for side in frame.resized[::-1]))
    return by_lanczos(image.convert("RGB"), frame)


def peers() -> dict[str, Load]:
    found: dict[str, Load] = {"Pillow Lanczos": pillow, "Pillow draft + Lanczos": pillow_draft}
    for add in (_opencv, _pyvips, _simplejpeg):
        try:
            found |= add()
        except ImportError as error:
            print(f"# left out: {error}", flush=True)
    return found


def _opencv() -> dict[str, Load]:
    import cv2

    cv2.setNumThreads(1)

    def opencv(path: Path, frame: Frame) -> np.ndarray:
        """As kohya's scripts: area where the picture shrinks, Lanczos where it grows."""
        data = np.frombuffer(path.read_bytes(), np.uint8)
        return cropped(shrink(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB), frame), frame)

    def shrink(pixels: np.ndarray, frame: Frame) -> np.ndarray:
        grows = frame.resized[0] > pixels.shape[0]
        method = cv2.INTER_LANCZOS4 if grows else cv2.INTER_AREA
        return np.asarray(cv2.resize(pixels, frame.resized[::-1], interpolation=method))

    found = {"OpenCV area": opencv}
    try:
        import simplejpeg
    except ImportError:
        return found

    def simplejpeg_opencv(path: Path, frame: Frame) -> np.ndarray:
        data = path.read_bytes()
        if data[:2] != b"\xff\xd8":
            return opencv(path, frame)
        height, width = frame.resized
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
        return cropped(shrink(pixels, frame), frame)

    return {**found, "simplejpeg scaled + OpenCV area": simplejpeg_opencv}


def _pyvips() -> dict[str, Load]:
    import pyvips

    def thumbnail(path: Path, frame: Frame) -> np.ndarray:
        height, width = frame.resized
        image = pyvips.Image.thumbnail_buffer(path.read_bytes(), width, height=height, size="force")
        return cropped(image.numpy()[..., :3], frame)

    def lanczos(path: Path, frame: Frame) -> np.ndarray:
        image = pyvips.Image.new_from_buffer(path.read_bytes(), "", access="sequential")
        height, width = frame.resized
        return cropped(image.resize(width / image.width, vscale=height / image.height).numpy()[..., :3], frame)

    return {"pyvips thumbnail": thumbnail, "pyvips resize": lanczos}


def _simplejpeg() -> dict[str, Load]:
    import simplejpeg

    def scaled(data: bytes, frame: Frame) -> np.ndarray:
        height, width = frame.resized
        return np.asarray(simplejpeg.decode_jpeg(data, min_height=2 * height, min_width=2 * width))

    def with_pillow(path: Path, frame: Frame) -> np.ndarray:
        data = path.read_bytes()
        is_jpeg = data[:2] == b"\xff\xd8"
        return by_lanczos(Image.fromarray(scaled(data, frame)), frame) if is_jpeg else pillow(path, frame)

    def with_torch(path: Path, frame: Frame) -> np.ndarray:
        data = path.read_bytes()
        if data[:2] == b"\xff\xd8":
            pixels = scaled(data, frame)
        else:
            pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(planes, size=frame.resized, mode="lanczos", antialias=True)
        return cropped(resized[0].permute(1, 2, 0).numpy(), frame)

    return {"simplejpeg scaled + Pillow Lanczos": with_pillow, "simplejpeg scaled + torch Lanczos": with_torch}


# --- measuring --------------------------------------------------------------------------------------------------------


def psnr(found: np.ndarray, reference: np.ndarray) -> float:
    error = np.mean((found.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-3)))  # equal pictures count as 78 dB


def seconds(load: Load, work: Iterable[tuple[Path, Frame]]) -> tuple[float, list[np.ndarray]]:
    """(processor time of the whole work, the canvases)."""
    started = time.process_time()
    canvases = [load(path, frame) for path, frame in work]
    return time.process_time() - started, canvases


class Rate(NamedTuple):
    """Of one path."""

    per_second: float
    """pictures a second of processor time"""
    quality: float
    """dB, of the worst picture"""


def compare(paths: Sequence[Path], area: int, rounds: int) -> None:
    work = list(zip(paths, frames(paths, area), strict=True))
    references = [pillow(*each) for each in work]
    best: tuple[Rate, Rate, str] | None = None
    for name, load in peers().items():
        ours, theirs = beside(load, work, references, rounds)
        equal = theirs.quality >= QUALITY_DB
        record(
            f"decode to {area}² ({ours.quality:.1f} dB)",
            ours.per_second,
            "pictures per CPU-second",
            better="higher",
            peer=f"{name} ({theirs.quality:.1f} dB{'' if equal else f', below {QUALITY_DB:g} dB'})",
            peer_value=theirs.per_second,
        )
        if equal and (best is None or theirs.per_second > best[1].per_second):
            best = ours, theirs, name
    assert best is not None  # Pillow's Lanczos is the reference itself
    record(
        f"decode to {area}², beside the fastest of at least {QUALITY_DB:g} dB; target is a ratio",
        best[0].per_second,
        "pictures per CPU-second",
        target=0.9,
        better="higher",
        peer=best[2],
        peer_value=best[1].per_second,
    )


def beside(
    load: Load, work: Sequence[tuple[Path, Frame]], references: Sequence[np.ndarray], rounds: int
) -> tuple[Rate, Rate]:
    """(ours, the peer's), in turn, so that a busy moment of the machine meets both; medians."""
    found = []
    for each in (load_canvas, load):
        _, canvases = seconds(each, work)  # warms, too
        found.append((min(map(psnr, canvases, references)), list[float]()))
    for _ in range(rounds):
        for each, (_, times) in zip((load_canvas, load), found, strict=True):
            times.append(seconds(each, work)[0])
    ours, theirs = (Rate(len(work) / median(times), quality) for quality, times in found)
    return ours, theirs


def _loads_all(work: Sequence[tuple[Path, Frame]], barrier: Barrier) -> None:
    torch.set_num_threads(1)
    load_canvas(*work[0])
    barrier.wait()
    for each in work:
        load_canvas(*each)
    barrier.wait()


def pictures_per_second(work: Sequence[tuple[Path, Frame]], processes: int) -> float:
    """By the clock, each process with all of the work, from the moment that all have started."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    workers = [context.Process(target=_loads_all, args=(work, barrier)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    barrier.wait()
    started = time.perf_counter()
    barrier.wait()
    elapsed = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return processes * len(work) / elapsed


def scale(paths: Sequence[Path], rounds: int) -> None:
    work = list(zip(paths, frames(paths, 512), strict=True))
    rates = {1: [], 2: []}
    for _ in range(rounds):
        for processes, each in rates.items():
            each.append(pictures_per_second(work, processes))
    record(
        "decode to 512² in 2 processes; target is a ratio",
        median(rates[2]),
        "pictures per second",
        target=1.8,
        better="higher",
        peer="one process",
        peer_value=median(rates[1]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), asked.pictures)
        for area in (512, 1024):
            compare(paths, area, asked.rounds)
        scale(paths, asked.rounds)


if __name__ == "__main__":
    main()
