"""Gradient norms by part of the model: which part a step moves, and which one explodes first.

The global norm is taken from those of the parts, so that every gradient is read once.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sumizome.distributed.parallelize import whole

__all__ = ["GradientNorms", "global_norm", "part_of"]

_SIDES = ("down_blocks", "mid_block", "up_blocks")


def part_of(name: str) -> str:
    """A parameter's part: a side of the U-Net, the rest of it (embeddings, first and last layer), or a text encoder."""
    network, inner, *_ = name.split(".")
    if network != "unet":
        return network
    return f"unet.{inner}" if inner in _SIDES else "unet.rest"


class GradientNorms:
    """The norm of each part's gradients, as they are when it is called."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            self._parts.setdefault(part_of(name), []).append(parameter)

    def __call__(self) -> dict[str, Tensor]:
        """By part; parts without any gradient are left out. Collective where gradients are cut up."""
        gradients = {
            part: [gradient for p in members if (gradient := p.grad) is not None]
            for part, members in self._parts.items()
        }
        return {part: _norm(found) for part, found in gradients.items() if found}


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of some gradients together."""
    if isinstance(gradients[0], DTensor):
        return whole(nn.utils.get_total_norm(gradients))
    # What that does, without sorting tensors by device first: they are on one. Biases and scales are more than half of
    # the tensors and a hundredth of the numbers, so they are laid side by side: an operation's start costs more.
    vectors = [gradient for gradient in gradients if gradient.dim() == 1]
    rest = [gradient for gradient in gradients if gradient.dim() != 1]
    return _together(torch._foreach_norm([*rest, torch.cat(vectors)] if vectors else rest))


def global_norm(norms: Mapping[str, Tensor]) -> Tensor:
    """The norm of all gradients together, from those of the parts."""
    return _together(norms.values())


def _together(norms: Iterable[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return norm
