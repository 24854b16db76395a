"""One denoising step of a U-Net whose weights are read layer by layer: what proves that a written file is the model.

Owns the probe (fixed latents, conditions and noise levels) and running a U-Net of any size in the memory of one layer:
each layer's weights are fetched in float32 when it is called and let go of after. Arithmetic is the same for
every source, so that two sources with the same weights and the same statement of what they predict agree bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sumizome.diffusion.denoiser import Denoiser
from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import TERMINAL_SIGMA, ScheduleConfig, build_noise_schedule
from sumizome.models.architecture import Config
from sumizome.models.conditioning import UNetConditioning, apply_unet, canvas_time_ids
from sumizome.models.networks import build_network

__all__ = ["STEP_TOLERANCE", "StepSource", "denoise_once", "step_difference"]

STEP_TOLERANCE = {"fp32": 1e-6, "fp16": 0.02, "bf16": 0.1}
"""Largest relative difference (root mean square) between a step of the source and one of the file, by the file's
dtype: what rounding the weights may do. A wrong prediction type, schedule or layer gives a difference near 1."""

_LATENT_SIDE = 16
_PROMPT_ROWS = 77
_MIDDLE_SIGMA = 2.0


@dataclass(frozen=True)
class StepSource:
    """A U-Net as a denoiser: its configuration, where its weights come from, and what it is said to predict."""

    config: Config
    read: Callable[[str], Tensor]
    """The U-Net's tensor of a native name."""
    prediction_type: PredictionType
    schedule_config: ScheduleConfig


def step_difference(source: StepSource, copy: StepSource) -> float:
    """‖D_copy − D_source‖ / ‖D_source‖ over both of the probe's noise levels; 0 for a faithful copy."""
    expected, found = denoise_once(source), denoise_once(copy)
    if expected.shape != found.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@torch.no_grad()
def denoise_once(source: StepSource) -> Tensor:
    """D(x; sigma) [2, 4, 16, 16] float32 of fixed latents at the noisiest sigma and at 2, on the CPU."""
    unet = _streamed(source)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    schedule = build_noise_schedule(source.schedule_config)
    last = TERMINAL_SIGMA if schedule.zero_terminal_snr else float(schedule.sigmas[-1])
    sigmas = torch.tensor([last, _MIDDLE_SIGMA], dtype=torch.float64)
    grid = (_LATENT_SIDE, _LATENT_SIDE)
    channels = source.config.get("out_channels", 4)
    x = draw(2, channels, *grid) * sigmas[:, None, None, None].float()
    features = source.config["addition_time_embed_dim"]
    conditioning = UNetConditioning(
        draw(2, _PROMPT_ROWS, source.config["cross_attention_dim"]),
        draw(2, source.config["projection_class_embeddings_input_dim"] - 6 * features),
        canvas_time_ids((8 * _LATENT_SIDE, 8 * _LATENT_SIDE), 2),
    )
    # An inpainting U-Net sees five channels more: the mask, and the latents of what is kept.
    beside = draw(2, max(source.config["in_channels"] - channels, 0), *grid)
    unet.register_forward_pre_hook(lambda _, inputs: (torch.cat([inputs[0], beside], dim=1), *inputs[1:]))

    def predict(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        return apply_unet(unet, noised_latents, timesteps, conditioning)

    return Denoiser(schedule, source.prediction_type, predict)(x, sigmas)


def _streamed(source: StepSource) -> Any:
    """The U-Net without memory: each layer that has weights reads them before it runs and drops them after."""
    unet = build_network("unet", source.config, device="meta").eval()
    for path, layer in unet.named_modules():
        held = dict(layer.named_parameters(recurse=False))
        if held:
            names = {leaf: f"{path}.{leaf}" if path else leaf for leaf in held}
            layer.register_forward_pre_hook(partial(_fetch, source.read, names))
            layer.register_forward_hook(partial(_drop, held))
    return unet


def _fetch(read: Callable[[str], Tensor], names: Mapping[str, str], layer: nn.Module, _: Any) -> None:
    for leaf, name in names.items():
        layer._parameters[leaf] = nn.Parameter(read(name).detach().to("cpu", torch.float32), requires_grad=False)


def _drop(held: Mapping[str, nn.Parameter], layer: nn.Module, *_: Any) -> None:
    layer._parameters.update(held)
