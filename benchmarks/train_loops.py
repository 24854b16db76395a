"""The loops that a run's loop is measured beside: the bare one, and what diffusers' SDXL script does under accelerate.

Both train the same modules at the same shapes; a loop is a function that does one step. What is bare: zero_grad, both
text encoders' forward (they are part of the model), the U-Net's forward, a mean squared error, backward,
optimizer.step; tokens, noise, noised latents and targets lie ready.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sumizome.data.loader import TrainBatch
from sumizome.models.conditioning import UNetConditioning, apply_unet
from sumizome.models.sdxl import SDXLModel
from sumizome.models.text_encoding import encode_prompts, tokenize
from sumizome.train.step import Objective, draw_noise

__all__ = ["accelerate_loop", "bare_loop"]


@dataclass(frozen=True)
class Ready:
    """A step's inputs, made beforehand."""

    input_ids: Tensor
    time_ids: Tensor
    noised: Tensor
    timesteps: Tensor
    target: Tensor


def make_ready(batch: TrainBatch, objective: Objective, seed: int) -> Ready:
    random = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(objective.schedule.num_timesteps, (len(batch.seeds),), generator=random)
    noise = draw_noise(batch.seeds, batch.latents.shape[1:])
    noised = objective.schedule.add_noise(batch.latents, noise, timesteps)
    return Ready(tokenize(batch.captions, 1).input_ids, batch.time_ids, noised, timesteps, torch.randn_like(noise))


def bare_loop(
    model: SDXLModel, optimizer: torch.optim.Optimizer, objective: Objective, batches: list[TrainBatch]
) -> Callable[[], object]:
    """A bare step on the model itself."""
    ready = itertools.cycle([make_ready(batch, objective, seed) for seed, batch in enumerate(batches)])

    def step() -> None:
        inputs = next(ready)
        optimizer.zero_grad(set_to_none=True)
        conditioning = UNetConditioning(*encode_prompts(model.text_encoders, inputs.input_ids), inputs.time_ids)
        output = apply_unet(model.unet, inputs.noised, inputs.timesteps, conditioning)
        F.mse_loss(output, inputs.target).backward()
        optimizer.step()

    return step


@dataclass(frozen=True)
class Peer:
    """What diffusers' script for SDXL has before its loop begins, on copies of the networks."""

    accelerator: Any
    unet: nn.Module
    encoders: nn.ModuleList
    optimizer: Any
    rate: Any
    loader: Any
    schedule: Any
    average: Any


def make_peer(model: SDXLModel, batches: list[TrainBatch], folder: Path) -> Peer:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_config=ProjectConfiguration(str(folder)))
    accelerator.init_trackers("peer")
    schedule = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    unet, encoders = copy.deepcopy(model.unet), copy.deepcopy(model.text_encoders)
    average = EMAModel(unet.parameters(), decay=0.995, model_cls=type(unet), model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    loader = torch.utils.data.DataLoader(
        _samples(batches), batch_size=len(batches[0].seeds), shuffle=True, drop_last=True
    )
    unet, optimizer, loader, rate = accelerator.prepare(
        unet, optimizer, loader, get_scheduler("constant", optimizer=optimizer)
    )
    return Peer(accelerator, unet, encoders, optimizer, rate, loader, schedule, average)


def accelerate_loop(model: SDXLModel, batches: list[TrainBatch], folder: Path, log_every: int) -> Callable[[], object]:
    """A step as diffusers' text-to-image script for SDXL makes it, with cached latents, on copies of the networks.

    Tokens are made beforehand, as that script does; captions are encoded in the step, as here, where tags are shuffled
    anew each time. The average is diffusers' EMAModel; the loss is read each step, and logged as often as by ours.
    """
    peer = make_peer(model, batches, folder)
    accelerator = peer.accelerator
    endless = itertools.chain.from_iterable(itertools.repeat(peer.loader))
    done = itertools.count(1)
    unread: list[float] = []

    def step() -> None:
        latents, ids, time_ids = next(endless)
        with accelerator.accumulate(peer.unet):
            loss = peer_loss(peer, latents, ids, time_ids)
            unread.append(accelerator.gather(loss.repeat(len(latents))).mean().item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(peer.unet.parameters(), 1.0)
            peer.optimizer.step()
            peer.rate.step()
            peer.optimizer.zero_grad()
        if accelerator.sync_gradients:
            peer.average.step(peer.unet.parameters())
        if (number := next(done)) % log_every == 0:
            accelerator.log({"train_loss": sum(unread) / len(unread)}, step=number)
            unread.clear()

    return step


def peer_loss(peer: Peer, latents: Tensor, ids: Tensor, time_ids: Tensor) -> Tensor:
    noise = torch.randn_like(latents)
    timesteps = torch.randint(1000, (len(latents),))
    noised = peer.schedule.add_noise(latents, noise, timesteps)
    prompt, pooled = encode_prompts(peer.encoders, ids.transpose(0, 1))
    added = {"text_embeds": pooled, "time_ids": time_ids}
    output = peer.unet(noised, timesteps, prompt, added_cond_kwargs=added, return_dict=False)[0]
    target = peer.schedule.get_velocity(latents, noise, timesteps)
    return F.mse_loss(output.float(), target.float(), reduction="mean")


def _samples(batches: list[TrainBatch]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(latents, token ids [2, k, 77], time ids) a sample."""
    samples: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        ids = tokenize(batch.captions, 1).input_ids
        samples += zip(batch.latents, ids.transpose(0, 1), batch.time_ids, strict=True)
    return samples
