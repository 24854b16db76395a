"""AdamW for weights that are bfloat16 all the way: computed in float32, stored by rounding up or down at random.

bfloat16 has 8 bits of precision: a step of 1e-5 on a weight of 1 is far below what rounding to the nearest can see, and
is lost every time. Rounded up with a probability equal to the fraction that would be cut off, the weight moves by the
right amount on the average. The invariant: the random bits are a function of (seed, parameter, step), so a resumed run
rounds as the undisturbed one would have.
Source: Gupta et al., "Deep Learning with Limited Numerical Precision", 1502.02551; Zamirai et al., 2010.06192.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from sumizome.seeds import derive_seed

__all__ = ["RoundedAdamW", "round_stochastically"]

_CUT = 16
"""Mantissa bits that float32 has and bfloat16 has not."""


def round_stochastically(values: Tensor, source: torch.Generator) -> Tensor:
    """float32 as bfloat16, each value one of its two neighbours; the mean over many draws is the value itself.

    What is not finite stays what it is, and nothing finite becomes infinite.
    """
    noise = torch.randint(0, 1 << _CUT, values.shape, dtype=torch.int32, device=values.device, generator=source)
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(1 << _CUT)).view(torch.float32)
    return torch.where(rounded.isfinite(), rounded, values).to(torch.bfloat16)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (1711.05101) on bfloat16 parameters, with bfloat16 moments.

    All three are rounded stochastically: the second moment moves by a thousandth a step (β₂ = 0.999), which nearest
    rounding would never show. Memory: 6 bytes a parameter, gradients apart. Each group says the `numbers` of its
    parameters, different for all parameters of a model, from which their random bits follow.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._seed = seed

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient. `closure`, if any, makes them and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for number, parameter in zip(group["numbers"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, number)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        gradient = _local(grad).float()
        weight = _local(parameter).float()
        first = _local(state["exp_avg"]).float().lerp_(gradient, 1 - beta1)
        second = _local(state["exp_avg_sq"]).float().lerp_(gradient.square(), 1 - beta2)
        # Decay and step as torch.optim.AdamW: θ ← θ(1 − lr·λ) − lr·m̂ / (√v̂ + ε).
        scale = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))
        # On the weight's own device: three draws for each of 2.6 G weights would take a CPU a minute a step.
        seed = derive_seed(self._seed, "rounding", number, step)
        source = torch.Generator(weight.device).manual_seed(seed)
        for stored, value in (
            (parameter, weight),
            (state["exp_avg"], first),
            (state["exp_avg_sq"], second),
        ):
            _local(stored).copy_(round_stochastically(value, source))


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded parameter that this process holds; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor
