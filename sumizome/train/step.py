"""One training step's arithmetic, as the report writes it: noise the latents, predict, compare, weight.

Nothing here branches on configuration: what varies (loss, schedule, prediction type, how timesteps are drawn) comes
in as values and callables. All randomness is a function of the sample's seed or of (run seed, step, position).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from sumizome.data.loader import TrainBatch
from sumizome.diffusion.prediction import PredictionType, training_target
from sumizome.diffusion.schedule import NoiseSchedule
from sumizome.models.conditioning import UNetConditioning, apply_unet
from sumizome.models.sdxl import SDXLModel
from sumizome.models.text_encoding import PromptTokens, encode_prompts, tokenize
from sumizome.seeds import generator
from sumizome.shapes import Latents, PerSample, Timesteps
from sumizome.train.task import StepLoss

__all__ = [
    "Drawn",
    "Objective",
    "StepLoss",
    "condition",
    "denoising_loss",
    "draw",
    "draw_noise",
    "training_loss",
]


@dataclass(frozen=True)
class Objective:
    """What is learned: how latents are noised, what the network predicts, and how much each timestep counts."""

    schedule: NoiseSchedule
    prediction_type: PredictionType
    loss: Callable[..., tuple[PerSample, PerSample]]
    """(model_output, target, timesteps, loss_weight) → (weighted, unweighted) loss of each sample."""


@dataclass(frozen=True)
class Drawn:
    """What a batch is trained with beside itself: it follows from seeds and captions, so it can be made ahead."""

    timesteps: Timesteps
    """On the CPU, as the schedule's tables are: looking them up from a GPU would wait for it."""
    noise: Latents
    """On the CPU, float32; page-locked where the batch is."""
    tokens: PromptTokens


def draw(batch: TrainBatch, timesteps: Timesteps, max_chunks: int, noise_offset: float = 0.0) -> Drawn:
    """The batch's noise and its captions' tokens, beside its timesteps; see `draw_noise`."""
    noise = draw_noise(batch.seeds, batch.latents.shape[1:], noise_offset)
    noise = noise.pin_memory() if batch.latents.is_pinned() else noise
    return Drawn(timesteps, noise, tokenize(batch.captions, max_chunks))


def training_loss(model: SDXLModel, objective: Objective, batch: TrainBatch, drawn: Drawn) -> StepLoss:
    """The loss of each sample of the batch as drawn; gradients flow to whatever requires them.

    Source: report §4.2 (conditioning), and that of `denoising_loss`.
    """
    conditioning = condition(model, batch, drawn.tokens)
    loss = denoising_loss(model, objective, batch, drawn.timesteps, drawn.noise, conditioning)
    return replace(loss, captions_cut=sum(map(bool, drawn.tokens.dropped)))


def denoising_loss(
    model: SDXLModel,
    objective: Objective,
    batch: TrainBatch,
    timesteps: Timesteps,
    noise: Latents,
    conditioning: UNetConditioning,
) -> StepLoss:
    """The loss of each sample of the batch under a condition that is already encoded; timesteps lie on the CPU.

    Source: report §2.1 (v target), §2.2 (schedule), §2.4 (weights), §4.3 (tag weights).
    """
    schedule, device = objective.schedule, model.device
    # A batch's own tensors are pinned where there is a GPU: the copy waits for nothing that is still being computed.
    latents = batch.latents.to(device, non_blocking=True)
    noise = noise.to(device, non_blocking=True)

    noised_latents = schedule.add_noise(latents, noise, timesteps)
    target = training_target(objective.prediction_type, latents, noise, schedule.alphas_cumprod_of(timesteps))

    model_output = apply_unet(model.unet, noised_latents, timesteps.to(device, non_blocking=True), conditioning)

    weighted, unweighted = objective.loss(model_output.float(), target, timesteps, batch.tag_weight)
    height, width = (int(side) for side in batch.time_ids[0, 4:].tolist())
    return StepLoss(weighted, unweighted, timesteps, canvas=(height, width), tokens=conditioning.prompt_embeds.shape[1])


def condition(model: SDXLModel, batch: TrainBatch, tokens: PromptTokens) -> UNetConditioning:
    """The batch's captions, as `tokens`, and its sizes as the U-Net takes them."""
    prompt_embeds, pooled_prompt_embeds = encode_prompts(model.text_encoders, tokens.input_ids)
    time_ids = batch.time_ids.to(prompt_embeds.device, non_blocking=True)
    return UNetConditioning(prompt_embeds, pooled_prompt_embeds, time_ids)


def draw_noise(seeds: Int[Tensor, " b"], shape: tuple[int, ...], offset: float = 0.0) -> Latents:
    """Unit Gaussian noise [b, *shape], float32 on the CPU: each sample's own seed alone decides its noise.

    With `offset`, each channel of each sample is moved as a whole by `offset` times a unit Gaussian.
    """
    noise = torch.stack([torch.randn(shape, generator=generator(seed, "noise")) for seed in seeds.tolist()])
    if offset:
        places = (shape[0], 1, 1)
        draws = [torch.randn(places, generator=generator(seed, "noise offset")) for seed in seeds.tolist()]
        noise = noise + offset * torch.stack(draws)
    return noise
