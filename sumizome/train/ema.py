"""An exponential moving average of the trained weights, kept in float32: what is sampled, validated and exported.

Cut up where the weights are (FSDP2); on the CPU where the device's memory is short.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sumizome.distributed.parallelize import local
from sumizome.errors import ConfigError

__all__ = ["Ema", "EmaConfig"]


@dataclass(frozen=True)
class EmaConfig:
    """The moving average of the weights."""

    decay: float = 0.9999
    """Weight of the past at each step; 0 = no averaging. Early steps use (1+n)/(10+n) where that is less."""
    device: Literal["same", "cpu"] = "same"
    """"same": beside the weights. "cpu": in main memory; each step then copies the weights there."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay is {self.decay}; give a number from 0 up to, but not, 1")


class Ema:
    """The average of `parameters` (by name), updated once a step."""

    def __init__(self, config: EmaConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        self.config = config
        self.parameters = dict(parameters)
        self.average = {name: self._place(p.detach().float()).clone() for name, p in parameters.items()}
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self.config.device == "cpu" else tensor

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Moves the average towards the weights after `steps_done` steps (1 = the first).

        The decay grows as (1+n)/(10+n) up to its setting: a long average would else hold on to the start for its
        whole length. A function of the step alone, so a resume needs no count of its own.
        """
        decay = min(self.config.decay, (1 + steps_done) / (10 + steps_done))
        averages, weights = self._pairs = self._pairs or self._local_pairs()
        if all(map(_alike, averages[:1], weights[:1])):  # all parameters are of one kind
            torch._foreach_lerp_(averages, weights, 1 - decay)
            return
        for average, weight in zip(averages, weights, strict=True):
            # One at a time: copies of all weights at once would not fit.
            average.lerp_(self._place(weight.float()), 1 - decay)

    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(averages, weights) that this rank holds, sharing their memory, which neither ever changes."""
        names = list(self.parameters)
        weights = [local(self.parameters[name].detach()) for name in names]
        return [local(self.average[name]) for name in names], weights

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the average; after it, the very same weights in the same memory as before.

        Weights and average change places tensor by tensor: FSDP gathers from the memory that it knows, and a second
        copy of all weights would not fit where it matters.
        """
        kept = {name: self._exchange(name) for name in self.parameters}
        try:
            yield
        finally:
            for name in self.parameters:
                self._restore(name, kept[name])

    def _exchange(self, name: str) -> Tensor | None:
        """Puts the average in the weight's memory. Returns the weight if the average's memory cannot hold it."""
        weight, average = local(self.parameters[name].detach()), local(self.average[name])
        held = weight.clone()
        weight.copy_(average)
        if weight.dtype != average.dtype:  # the average would come back rounded
            return held
        average.copy_(held)
        return None

    def _restore(self, name: str, kept: Tensor | None) -> None:
        if kept is None:
            self._exchange(name)
        else:
            local(self.parameters[name].detach()).copy_(kept)


def _alike(average: Tensor, weight: Tensor) -> bool:
    return average.dtype == weight.dtype and average.device == weight.device
