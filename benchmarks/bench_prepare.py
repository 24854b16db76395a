"""Preparation when the VAE is the bottleneck: the share of the time it works, and its speed beside the VAE alone.

A VAE of SDXL's own shape with random weights encodes photographs' worth of JPEG (1000 × 1400 px of noise and gradients)
at `--area`; decoding, resizing, writing and the leases of several units go on beside it. Nothing is read from the net.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from measurement import record
from PIL import Image

from sumizome.data.buckets import BucketConfig
from sumizome.data.ingest import ingest_to
from sumizome.data.manifest import Manifest, load_manifest
from sumizome.device import choose_device
from sumizome.prepare import PrepareConfig, prepare_latents
from sumizome.prepare_encoder import Encoder


def sdxl_vae() -> AutoencoderKL:
    """SDXL's AutoencoderKL, untrained."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    ).eval()


def draw_pictures(folder: Path, count: int) -> Manifest:
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
        size = [(1400, 1000), (1000, 1400), (1200, 1200)][number % 3]
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=92)
        (folder / f"{number}.txt").write_text("1girl")
    path = folder.parent / "manifest.parquet"
    ingest_to(path, [folder], workers=0)
    return load_manifest(path)


def alone(vae: AutoencoderKL, config: PrepareConfig, batches: int) -> float:
    """Canvases a second of the VAE with nothing beside it."""
    encoder, side = Encoder(vae, config.precision), int(config.buckets.area)  # type: ignore[call-overload]
    canvases = np.zeros((config.batch_size, side, side, 3), np.uint8)
    encoder.finish(encoder.begin(canvases))
    started = time.perf_counter()
    for _ in range(batches):
        encoder.finish(encoder.begin(canvases))
    return batches * config.batch_size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--area", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    vae = sdxl_vae().to(choose_device(arguments.device))
    buckets = BucketConfig(area=arguments.area, step=32)
    config = PrepareConfig(buckets, unit_size=arguments.pictures // 3, batch_size=arguments.batch_size)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "pictures").mkdir()
        manifest = draw_pictures(Path(place) / "pictures", arguments.pictures)
        limit = alone(vae, config, batches=4)
        steps = prepare_latents(manifest, vae, Path(place) / "out", config)
        next(steps)
        started = time.perf_counter()
        *_, last = steps
        seconds = time.perf_counter() - started
    record("prepare: share of the time in the VAE", last.vae_seconds / seconds, "share", target=0.95, better="higher")
    speed = last.written / seconds
    record("prepare", speed, "images/s", better="higher", peer="the VAE alone, same batches", peer_value=limit)


if __name__ == "__main__":
    main()
