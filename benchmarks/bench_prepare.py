"""Preparation when the VAE is the bottleneck: the share of the time it works, and its speed beside the VAE alone.

A VAE of SDXL's own shape with random weights encodes photographs' worth of JPEG (1000 × 1400 px of noise and gradients)
at `--area`; decoding, resizing, writing and the leases of several units go on beside it. The peer is the bare VAE on
the same batches, after it in the same process. Nothing is read from the net.
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
from sumizome.prepare_encoder import Encoder, InFlight


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


def kept_batches(encoder: type[Encoder]) -> list[np.ndarray]:
    """The batches that any encoder is given from now on, as they come."""
    batches: list[np.ndarray] = []
    begin = encoder.begin

    def keeping(self: Encoder, canvases: np.ndarray) -> InFlight:
        batches.append(canvases)
        return begin(self, canvases)

    encoder.begin = keeping  # type: ignore[method-assign]
    return batches


@torch.no_grad()
def alone(vae: AutoencoderKL, batches: list[np.ndarray]) -> float:
    """Seconds of the bare VAE for these batches, with nothing beside it."""
    started = time.perf_counter()
    for canvases in batches:
        pixels = torch.from_numpy(canvases).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        vae.encode(pixels).latent_dist.mode().cpu()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24, help="in two units")
    parser.add_argument("--area", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    vae = sdxl_vae().to(choose_device(arguments.device))
    buckets = BucketConfig(area=arguments.area, step=32)
    config = PrepareConfig(buckets, unit_size=-(-arguments.pictures // 2), batch_size=arguments.batch_size)
    batches = kept_batches(Encoder)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "pictures").mkdir()
        manifest = draw_pictures(Path(place) / "pictures", arguments.pictures)
        steps = prepare_latents(manifest, vae, Path(place) / "out", config)
        next(steps)
        started = time.perf_counter()
        *_, last = steps
        seconds = time.perf_counter() - started
    record("prepare: share of the time in the VAE", last.vae_seconds / seconds, "share", target=0.95, better="higher")
    speed, limit = last.written / seconds, last.written / alone(vae, batches)
    record("prepare", speed, "images/s", better="higher", peer="the bare VAE, same batches", peer_value=limit)


if __name__ == "__main__":
    main()
