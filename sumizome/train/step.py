"""One training step's arithmetic, as the report writes it: noise the latents, predict, compare, weight.

Nothing here branches on configuration: what varies (loss, schedule, prediction type, how timesteps are drawn) comes
in as values and callables. All randomness is a function of the sample's seed or of (run seed, step, position).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sumizome.data.loader import TrainBatch
from sumizome.diffusion.prediction import PredictionType, training_target
from sumizome.diffusion.schedule import NoiseSchedule
from sumizome.models.conditioning import UNetConditioning, apply_unet
from sumizome.models.sdxl import SDXLModel
from sumizome.models.text_encoding import encode_prompts, tokenize
from sumizome.seeds import derive_seed, generator
from sumizome.shapes import Latents, PerSample, Timesteps

__all__ = [
    "DrawTimesteps",
    "Objective",
    "StepLoss",
    "TimestepSampling",
    "build_timestep_draw",
    "condition",
    "denoising_loss",
    "draw_noise",
    "draw_timesteps",
    "shifted_timesteps",
    "training_loss",
]

TimestepSampling = Literal["stratified", "uniform"]

DrawTimesteps: TypeAlias = Callable[[TrainBatch, int, Float[Tensor, " b"]], Timesteps]
"""(batch, step, positions of its samples in the global batch, in [0, 1)) → a timestep for each sample, on the CPU."""


@dataclass(frozen=True)
class Objective:
    """What is learned: how latents are noised, what the network predicts, and how much each timestep counts."""

    schedule: NoiseSchedule
    prediction_type: PredictionType
    loss: Callable[..., tuple[PerSample, PerSample]]
    """(model_output, target, timesteps, loss_weight) → (weighted, unweighted) loss of each sample."""
    noise_offset: float = 0.0
    """See `draw_noise`."""


@dataclass(frozen=True)
class StepLoss:
    """The loss of each sample of a micro-batch, and where on the schedule it was taken."""

    weighted: PerSample
    """What is minimised: squared error × timestep weight × tag weight."""
    unweighted: PerSample
    """The plain mean squared error, comparable between runs of different weights."""
    timesteps: Timesteps
    """On the CPU."""
    captions_cut: int = 0
    """Captions whose end did not fit into the chunks."""
    tokens: int = 0
    """Rows of the text condition."""

    def detached(self) -> "StepLoss":
        """The same numbers without the graph that they came from."""
        return replace(self, weighted=self.weighted.detach(), unweighted=self.unweighted.detach())


def training_loss(
    model: SDXLModel, objective: Objective, batch: TrainBatch, timesteps: Timesteps, max_chunks: int
) -> StepLoss:
    """The loss of each sample of the batch at the given timesteps; gradients flow to whatever requires them.

    Source: report §4.2 (conditioning), and that of `denoising_loss`.
    """
    conditioning, captions_cut = condition(model, batch, max_chunks)
    return replace(denoising_loss(model, objective, batch, timesteps, conditioning), captions_cut=captions_cut)


def denoising_loss(
    model: SDXLModel, objective: Objective, batch: TrainBatch, timesteps: Timesteps, conditioning: UNetConditioning
) -> StepLoss:
    """The loss of each sample of the batch under a condition that is already encoded.

    Source: report §2.1 (v target), §2.2 (schedule), §2.4 (weights), §4.3 (tag weights).
    """
    schedule, device = objective.schedule, model.unet.device
    latents = batch.latents.to(device)
    noise = draw_noise(batch.seeds, latents.shape[1:], objective.noise_offset).to(device)

    # Timesteps stay on the CPU with the schedule's tables: looking them up from a GPU would wait for it.
    noised_latents = schedule.add_noise(latents, noise, timesteps)
    target = training_target(objective.prediction_type, latents, noise, schedule.alphas_cumprod_of(timesteps))

    model_output = apply_unet(model.unet, noised_latents, timesteps.to(device), conditioning)

    weighted, unweighted = objective.loss(model_output.float(), target, timesteps, batch.tag_weight)
    return StepLoss(weighted, unweighted, timesteps, tokens=conditioning.prompt_embeds.shape[1])


def condition(model: SDXLModel, batch: TrainBatch, max_chunks: int) -> tuple[UNetConditioning, int]:
    """The batch's captions and sizes as the U-Net takes them, and how many captions did not fit whole."""
    tokens = tokenize(batch.captions, max_chunks)
    prompt_embeds, pooled_prompt_embeds = encode_prompts(model.text_encoders, tokens.input_ids)
    conditioning = UNetConditioning(prompt_embeds, pooled_prompt_embeds, batch.time_ids.to(prompt_embeds.device))
    return conditioning, sum(map(bool, tokens.dropped))


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


def build_timestep_draw(
    sampling: TimestepSampling, schedule: NoiseSchedule, run_seed: int, shift_from: int = 0
) -> DrawTimesteps:
    """How a run draws timesteps; `shift_from` is the side in px of the canvas that the schedule suits, 0 = any."""

    def draw(batch: TrainBatch, step: int, positions: Float[Tensor, " b"]) -> Timesteps:
        return draw_timesteps(sampling, schedule.num_timesteps, batch.seeds, run_seed, step, positions)

    def draw_shifted(batch: TrainBatch, step: int, positions: Float[Tensor, " b"]) -> Timesteps:
        height, width = batch.time_ids[0, 4:].tolist()  # the bucket, px
        return shifted_timesteps(schedule, math.sqrt(height * width) / shift_from)[draw(batch, step, positions)]

    return draw_shifted if shift_from else draw


def draw_timesteps(
    sampling: TimestepSampling,
    num_timesteps: int,
    seeds: Int[Tensor, " b"],
    run_seed: int,
    step: int,
    positions: Float[Tensor, " b"],
) -> Timesteps:
    """A timestep in [0, num_timesteps) for each sample; both ways are uniform over many steps.

    "uniform" draws from the sample's own seed. "stratified" cuts the schedule into one stratum a sample of the global
    batch and shifts them all by one random offset a step, so that each step sees the whole schedule, and the terminal
    step is never missed for long: the loss is less noisy at no cost.
    `positions`: where each sample stands in the global batch, in [0, 1).
    """
    if sampling == "uniform":
        draws = [derive_seed(seed, "timestep") % num_timesteps for seed in seeds.tolist()]
        return torch.tensor(draws, dtype=torch.int64)
    offset = derive_seed(run_seed, "timesteps", step) / 2**63
    return ((positions.double() + offset) % 1.0 * num_timesteps).floor().long().clamp(max=num_timesteps - 1)


@lru_cache(maxsize=256)
def shifted_timesteps(schedule: NoiseSchedule, sigma_factor: float) -> Timesteps:
    """For each timestep [T] the one whose sigma is nearest to `sigma_factor` times its own.

    Drawn uniformly and then read through this table, timesteps are those of a schedule shifted by
    snr / sigma_factor²; the network still sees each timestep at its own noise level. For a canvas of side d and one of
    side d₀ at which the schedule hides a picture equally well, the factor is d / d₀: averaging down by it divides
    the noise. The terminal step keeps its place.
    Source: report §2.3; Hoogeboom et al. 2301.11093 (simple diffusion), eq. 4.
    """
    shifted = schedule.timestep_of(schedule.log_sigmas.exp() * sigma_factor)
    shifted[-1] = schedule.num_timesteps - 1
    return shifted
