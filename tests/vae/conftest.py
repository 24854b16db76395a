"""Pictures with lines and flats, large enough for a crop, as a manifest; and the settings of a short decoder's run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sumizome.data.ingest import ingest
from sumizome.data.manifest import write_manifest
from sumizome.train.config import CheckpointConfig
from sumizome.train.ema import EmaConfig
from sumizome.train.optim import OptimConfig
from sumizome.vae.config import DecoderValidationConfig, VaeTrainConfig
from sumizome.vae.crops import CropConfig

SHAPES = [(48, 48), (40, 64), (64, 40), (48, 48)]


def draw(number: int, height: int, width: int) -> Image.Image:
    """Ellipses and lines on a gradient, drawn at twice the size: soft flanks, as illustrations have."""
    random = np.random.default_rng(number)
    corners = random.integers(60, 256, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, r = (int(value) for value in random.integers((10, 10, 8), (2 * width, 2 * height, 28)))
        pen.ellipse(
            (x - r, y - r, x + r, y + r), fill=tuple(random.integers(0, 256, 3).tolist()), outline="black", width=3
        )
    pen.line([tuple(p) for p in random.integers(0, 2 * min(height, width), (4, 2)).tolist()], fill="black", width=3)
    return image.resize((width, height), Image.Resampling.LANCZOS)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for number in range(60):
        draw(number, *SHAPES[number % 4]).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text("close-up, eyes" if number % 3 == 0 else "drawing")
    return folder


@pytest.fixture(scope="session")
def manifest(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "manifest.parquet"
    write_manifest(ingest([pictures], workers=0).manifest, path)
    return path


@pytest.fixture
def config(tiny_folder: Path, manifest: Path, tmp_path: Path) -> VaeTrainConfig:
    return VaeTrainConfig(
        model=tiny_folder,
        manifest=manifest,
        run_dir=tmp_path / "run",
        steps=4,
        micro_batch_size=2,
        micro_batches_per_step=2,
        workers=1,
        log_every=2,
        tensorboard=False,
        device="cpu",
        crops=CropConfig(side=32),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, lr_schedule="cosine"),
        ema=EmaConfig(decay=0.9),
        validation=DecoderValidationConfig(every=0, count=3, shown=3),
        checkpoint=CheckpointConfig(every=0),
    )
