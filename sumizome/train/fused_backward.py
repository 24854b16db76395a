"""The optimizer's step inside the backward pass: each weight is updated as soon as its gradient is there.

A gradient lives for one update, so that gradients take the memory of the largest tensor and not of the whole model:
10 GB less for SDXL in float32. The price, which is the user's choice: no accumulation; a gradient is clipped by its own
norm and not by that of all together; one that is not finite has moved the weights when it is found, and they are lost.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FusedBackward"]


class FusedBackward:
    """An optimizer a parameter, stepped by autograd. It has an optimizer's `param_groups`, `state` and `zero_grad`."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        max_grad_norm: float,
    ) -> None:
        self._limit = max_grad_norm or math.inf
        self._optimizers = {
            parameter: make([{**group, "params": [parameter], "numbers": [number]}])
            for group in groups
            for number, parameter in zip(group["numbers"], group["params"], strict=True)
        }
        self._squared_norm: float | Tensor = 0.0
        self._handles = [parameter.register_post_accumulate_grad_hook(self._update) for parameter in self._optimizers]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One a parameter; `optim.apply_lr` sets their rates."""
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    @property
    def state(self) -> Mapping[nn.Parameter, dict[str, Any]]:
        """Each parameter's moments, as one optimizer over all of them has."""
        return _States(self._optimizers)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begins a step: no gradient is left over, and the norm counts from nothing."""
        self._squared_norm = 0.0

    def step(self) -> None:
        """Nothing: the weights moved in the backward pass."""

    def grad_norm(self) -> Tensor:
        """The global norm of the last backward pass's gradients, before any was clipped.

        If it is not finite, nor are weights and moments.
        """
        return torch.as_tensor(self._squared_norm).sqrt()

    def _update(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return
        norm = nn.utils.get_total_norm([parameter.grad])
        self._squared_norm = self._squared_norm + norm.double().square()
        nn.utils.clip_grads_with_norm_([parameter], self._limit, norm)
        # Not even if the norm is finite is asked here: a GPU would have to come to rest once a parameter to answer.
        self._optimizers[parameter].step()
        parameter.grad = None


class _States(Mapping[nn.Parameter, dict[str, Any]]):
    def __init__(self, optimizers: Mapping[nn.Parameter, torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizers[parameter].state[parameter]
        return state

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._optimizers)

    def __len__(self) -> int:
        return len(self._optimizers)
