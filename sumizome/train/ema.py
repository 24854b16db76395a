"""An exponential moving average of the trained weights, kept in float32: what is sampled, validated and exported."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sumizome.errors import ConfigError

__all__ = ["Ema", "EmaConfig"]


@dataclass(frozen=True)
class EmaConfig:
    """The moving average of the weights."""

    decay: float = 0.9999
    """Weight of the past at each step; 0 = no averaging. Early steps use (1+n)/(10+n) where that is less."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay is {self.decay}; give a number from 0 up to, but not, 1")


class Ema:
    """The average of `parameters` (by name), updated once a step."""

    def __init__(self, config: EmaConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        self.config = config
        self.parameters = dict(parameters)
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Moves the average towards the weights after `steps_done` steps (1 = the first).

        The decay grows as (1+n)/(10+n) up to its setting: a long average would else hold on to the start for its
        whole length. A function of the step alone, so a resume needs no count of its own.
        """
        decay = min(self.config.decay, (1 + steps_done) / (10 + steps_done))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the average of a checkpoint; names and shapes were checked by whoever read it."""
        for name, average in self.average.items():
            average.copy_(tensors[name])

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the average; after it, the very same weight tensors as before."""
        raw = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.average[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = raw[name]
