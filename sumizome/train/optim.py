"""The optimizer and its learning rate, which is a function of the step: no scheduler object, so nothing to restore.

Weight decay acts on matrices and kernels only; gains, biases and embeddings of one dimension are left alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from sumizome.errors import ConfigError
from sumizome.train.fused_backward import FusedBackward
from sumizome.train.rounding import RoundedAdamW

__all__ = ["OptimConfig", "OptimizerName", "apply_lr", "build_optimizer", "lr_factor"]

OptimizerName: TypeAlias = Literal["adamw", "adamw8bit", "adafactor"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: OptimizerName = "adamw"
    """"adamw": two float32 moments, 8 bytes a weight. "adamw8bit": the same in blocks of 8 bits, 2 bytes a weight
    (`pip install 'sumizome[8bit]'`). "adafactor": the second moment by rows and columns, next to nothing for matrices;
    its rate is relative to the size of the weights, so start with optim.lr = 1e-3 or less."""
    fused_backward: bool = False
    """Update each weight inside the backward pass: gradients take the memory of one tensor. Without accumulation, on
    one device; a gradient is clipped by its own norm."""
    lr: float = 1e-5
    """Peak learning rate of the U-Net."""
    text_encoder_lr: float = 0.0
    """Peak learning rate of both text encoders; 0 keeps them frozen (the report trains the U-Net)."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up; cosine and linear fall to `final_lr_factor` at the last step."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly from 0."""
    final_lr_factor: float = 0.0
    """Fraction of the peak left at the last step (cosine, linear)."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on parameters of two or more dimensions."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 = no clipping."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr is {self.lr}; give a learning rate above 0, such as 1e-5")
        if self.text_encoder_lr < 0 or self.warmup_steps < 0 or self.max_grad_norm < 0:
            raise ConfigError("optim.text_encoder_lr, optim.warmup_steps and optim.max_grad_norm cannot be negative")


def build_optimizer(
    config: OptimConfig, parameters: Mapping[str, nn.Parameter], seed: int = 0
) -> torch.optim.Optimizer | FusedBackward:
    """The optimizer over the named parameters ("unet.…", "text_encoder.…", "text_encoder_2.…").

    Each group carries its `peak_lr`; `apply_lr` sets the rate of a step from it. bfloat16 parameters are rounded
    stochastically, by `seed`.
    Raises: ConfigError if the optimizer is not installed, or not for these parameters.
    """
    groups: list[dict[str, Any]] = []
    numbers = {name: number for number, name in enumerate(parameters)}
    for is_unet, peak_lr in ((True, config.lr), (False, config.text_encoder_lr)):
        named = [(name, p) for name, p in parameters.items() if name.startswith("unet.") == is_unet]
        for decayed in (True, False):
            members = {name: p for name, p in named if (p.ndim >= 2) == decayed}
            if members:
                groups.append(
                    {
                        "params": list(members.values()),
                        "numbers": [numbers[name] for name in members],
                        "peak_lr": peak_lr,
                        "lr": peak_lr,
                        "weight_decay": config.weight_decay if decayed else 0.0,
                    }
                )
    make = _maker(config, parameters, seed)
    return FusedBackward(groups, make, config.max_grad_norm) if config.fused_backward else make(groups)


def _maker(
    config: OptimConfig, parameters: Mapping[str, nn.Parameter], seed: int
) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """The optimizer's class with its settings, waiting for parameter groups."""
    betas = (config.beta1, config.beta2)
    is_half = any(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
    if is_half and config.name != "adamw":
        raise ConfigError(
            f'optim.name = "{config.name}" rounds to the nearest, which loses small steps of bfloat16 weights; '
            'take "adamw", which rounds them stochastically, or precision = "bf16" with float32 weights'
        )
    if is_half:
        return partial(RoundedAdamW, betas=betas, eps=config.eps, seed=seed)
    if config.name == "adamw":
        return partial(torch.optim.AdamW, betas=betas, eps=config.eps, fused=True)
    if config.name == "adafactor":
        return torch.optim.Adafactor
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optim.name = \"adamw8bit\" needs bitsandbytes ({error}); run `pip install 'sumizome[8bit]'`"
        ) from error
    return partial(AdamW8bit, betas=betas, eps=config.eps)


def lr_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step (0 = first) as a fraction of its peak, in (0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1 - progress
    return config.final_lr_factor + (1 - config.final_lr_factor) * fall


def apply_lr(optimizer: torch.optim.Optimizer | FusedBackward, factor: float) -> float:
    """Sets every group's rate to `factor` of its peak; returns the U-Net's (the first group's)."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
