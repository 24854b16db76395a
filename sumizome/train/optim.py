"""The optimizer and its learning rate, which is a function of the step: no scheduler object, so nothing to restore.

Weight decay acts on matrices and kernels only; gains, biases and embeddings of one dimension are left alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sumizome.errors import ConfigError

__all__ = ["OptimConfig", "apply_lr", "build_optimizer", "lr_factor"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

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


def build_optimizer(config: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """AdamW over the named parameters ("unet.…", "text_encoder.…", "text_encoder_2.…").

    Each group carries its `peak_lr`; `apply_lr` sets the rate of a step from it.
    """
    groups = []
    for is_unet, peak_lr in ((True, config.lr), (False, config.text_encoder_lr)):
        named = [(name, p) for name, p in parameters.items() if name.startswith("unet.") == is_unet]
        for decayed in (True, False):
            members = [p for _, p in named if (p.ndim >= 2) == decayed]
            if members:
                decay = config.weight_decay if decayed else 0.0
                groups.append({"params": members, "peak_lr": peak_lr, "lr": peak_lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


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


def apply_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group's rate to `factor` of its peak; returns the U-Net's (the first group's)."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
