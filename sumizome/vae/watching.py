"""Held-out pictures through the averaged decoder, while it trains: an observer of the loop."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from sumizome.distributed.runtime import Ranks
from sumizome.models.vae import encode_pixels
from sumizome.train.lookout import LookEnded, Lookout
from sumizome.train.observers import Observer
from sumizome.vae.config import DecoderValidationConfig
from sumizome.vae.crop_loader import CropLoader
from sumizome.vae.scores import Pair, score_pair, to_picture

__all__ = ["build_observers"]


def build_observers(
    config: DecoderValidationConfig, vae: AutoencoderKL, loader: CropLoader, ranks: Ranks
) -> list[Observer]:
    """Validation, where the settings ask for it and pictures are held out."""
    if not config.every or not len(loader.validation_rows):
        return []

    @torch.no_grad()
    def pairs(lookout: Lookout) -> list[Pair]:
        found = []
        for number, batch in enumerate(loader.validation_crops(config.side, config.shown)):
            if number % ranks.world != ranks.rank:
                continue
            lookout.alone()
            decoded = vae.decode(encode_pixels(vae, batch.pixels)).sample
            found.append(score_pair(to_picture(batch.pixels[0]), to_picture(decoded[0])))
        return found

    def validate(step: int, metrics: Any, lookout: Lookout) -> str:
        mine: list[Pair] = []
        ended = False
        try:
            mine = pairs(lookout)
        except LookEnded:
            ended = True
        lookout.together(ended=ended)
        found = [pair for of_rank in ranks.gather(mine) for pair in of_rank]
        if not found:
            return "no held-out picture is large enough"
        means = {name: float(np.mean([pair.values[name] for pair in found])) for name in found[0].values}
        grid = np.array([pair.grid for pair in found]).sum(axis=0)
        means["blockiness"] = float(grid[0] / max(grid[1], 1e-12))
        metrics.write(step, {"validation": means})
        return f"PSNR {means['psnr']:.2f} dB, MS-SSIM {means['ms_ssim']:.4f}, blockiness {means['blockiness']:.3f}"

    return [Observer("validation", config.every, validate, before_training=True)]
