"""The optimizer and its learning rate, which is a function of the step: no scheduler object, so nothing to restore.

Weight decay acts on matrices and kernels only; gains, biases and embeddings of one dimension are left alone.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, TypeAlias, assert_never

import torch
from torch import nn

from sumizome.errors import ConfigError
from sumizome.train.fused_backward import FusedBackward
from sumizome.train.rounding import RoundedAdamW

__all__ = [
    "LrSchedule",
    "OptimConfig",
    "OptimizerName",
    "apply_lr",
    "build_optimizer",
    "check_rounding",
    "lr_factor",
    "lr_factors",
]

OptimizerName: TypeAlias = Literal["adamw", "adamw8bit", "adafactor"]
LrSchedule: TypeAlias = Literal["constant", "cosine", "linear", "rex"]


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
    """Peak learning rate of the U-Net; of the decoder in `sumizome vae train`."""
    text_encoder_lr: float = 0.0
    """Peak learning rate of both text encoders; 0 keeps them frozen (the report trains the U-Net)."""
    lr_of: dict[str, float] = field(default_factory=dict)
    """Factors on the rate of parts, by the dotted beginning of their names: `"unet.up_blocks" = 0.5`,
    `"text_encoder_2" = 0.1`; * stands for anything, the longest that fits counts, and 0 keeps a part as it is."""
    lr_schedule: LrSchedule = "constant"
    """Shape after the warm-up; cosine, linear and rex fall towards `final_lr_factor` at the end (of a stage)."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly from 0."""
    final_lr_factor: float = 0.0
    """Fraction of the peak left when the last step is over, which is itself a little above (all but constant)."""
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
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"optim.lr is {self.lr}; give a learning rate above 0, such as 1e-5")
        if not 0 <= self.text_encoder_lr < math.inf or self.warmup_steps < 0 or self.max_grad_norm < 0:
            raise ConfigError("optim.text_encoder_lr, warmup_steps and max_grad_norm are numbers of 0 or more")
        for pattern, factor in self.lr_of.items():
            if not (factor >= 0 and math.isfinite(factor)):
                raise ConfigError(f'optim.lr_of "{pattern}" is {factor}; give 0 (keep that part as it is) or more')


def build_optimizer(
    config: OptimConfig,
    parameters: Mapping[str, nn.Parameter],
    seed: int = 0,
    *,
    lr_apart: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer | FusedBackward:
    """The optimizer over the named parameters ("unet.…", "text_encoder.…", "decoder.…").

    `lr_apart` gives networks, by the beginning of their parameters' names, a peak rate in place of `config.lr`; text
    encoders have theirs in the settings.

    Each group carries its `peak_lr`; `apply_lr` sets the rate of a step from it. bfloat16 parameters are rounded
    stochastically, by `seed`.
    Raises: ConfigError if the optimizer is not installed, or not for these parameters.
    """
    groups: list[dict[str, Any]] = []
    numbers = {name: number for number, name in enumerate(parameters)}
    factors = lr_factors(config.lr_of, parameters)
    lr_apart = {"text_encoder": config.text_encoder_lr} if lr_apart is None else lr_apart
    for network, peak_lr in (("", config.lr), *lr_apart.items()):
        # The plain factor first: the first group's rate is the one that is told.
        for factor in sorted(set(factors.values()), key=lambda factor: (factor != 1, factor)):
            named = [
                (name, p)
                for name, p in parameters.items()
                if factors[name] == factor and next((a for a in lr_apart if name.startswith(a)), "") == network
            ]
            for decayed in (True, False):
                members = {name: p for name, p in named if (p.ndim >= 2) == decayed}
                if members:
                    groups.append(
                        {
                            "params": list(members.values()),
                            "numbers": [numbers[name] for name in members],
                            "peak_lr": peak_lr * factor,
                            "lr": peak_lr * factor,
                            "weight_decay": config.weight_decay if decayed else 0.0,
                        }
                    )
    make = _maker(config, parameters, seed)
    return FusedBackward(groups, make, config.max_grad_norm) if config.fused_backward else make(groups)


def lr_factors(lr_of: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The factor on the learning rate of each named parameter: that of the longest pattern that fits it, else 1.

    Raises: ConfigError for a pattern that fits no trained parameter, naming the nearest part.
    """
    names = list(names)
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in sorted(lr_of.items(), key=lambda item: len(item[0])):
        fitting = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not fitting:
            raise ConfigError(_no_such_part(pattern, names))
        factors |= dict.fromkeys(fitting, factor)
    return factors


def _no_such_part(pattern: str, names: Sequence[str]) -> str:
    said = f'optim.lr_of "{pattern}" fits no parameter that is trained'
    networks = {name.split(".", 1)[0] for name in names}
    if pattern.startswith("text_encoder") and not networks - {"unet"}:
        return f"{said}: text encoders are frozen; set optim.text_encoder_lr above 0, or leave the pattern out"
    depth = pattern.count(".") + 1
    parts = sorted({".".join(name.split(".")[:depth]) for name in names})
    close = difflib.get_close_matches(pattern, parts, n=1, cutoff=0.0)
    return f'{said}; did you mean "{close[0]}"?'


def _maker(
    config: OptimConfig, parameters: Mapping[str, nn.Parameter], seed: int
) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """The optimizer's class with its settings, waiting for parameter groups."""
    betas = (config.beta1, config.beta2)
    is_half = any(parameter.dtype == torch.bfloat16 for parameter in parameters.values())
    check_rounding(config, in_bfloat16=is_half)
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


def check_rounding(config: OptimConfig, *, in_bfloat16: bool) -> None:
    """Raises: ConfigError if the weights are bfloat16 and this optimizer cannot round them stochastically."""
    if in_bfloat16 and config.name != "adamw":
        raise ConfigError(
            f'optim.name = "{config.name}" rounds to the nearest, which loses small steps of bfloat16 weights; '
            'take "adamw", which rounds them stochastically, or precision = "bf16" with float32 weights'
        )


def lr_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step (0 = first) as a fraction of its peak, in (0, 1].

    Source: rex: Chen et al. 2107.04197, (1 − p) / (1 − p/2): high for long, then down fast.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    match config.lr_schedule:
        case "constant":
            return 1.0
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            fall = 1 - progress
        case "rex":
            fall = (1 - progress) / (1 - progress / 2)
        case _:
            assert_never(config.lr_schedule)
    return config.final_lr_factor + (1 - config.final_lr_factor) * fall


def apply_lr(optimizer: torch.optim.Optimizer | FusedBackward, factor: float) -> float:
    """Sets every group's rate to `factor` of its peak; returns the first group's: the U-Net's, without `lr_of`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
