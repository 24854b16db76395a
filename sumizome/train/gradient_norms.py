"""Gradient norms by part of the model: which part a step moves, and which one explodes first."""

from collections.abc import Mapping

from torch import nn

from sumizome.distributed.parallelize import whole

__all__ = ["norms_by_part", "part_of"]

_SIDES = ("down_blocks", "mid_block", "up_blocks")


def part_of(name: str) -> str:
    """A parameter's part: a side of the U-Net, the rest of it (embeddings, first and last layer), or a text encoder."""
    network, inner, *_ = name.split(".")
    if network != "unet":
        return network
    return f"unet.{inner}" if inner in _SIDES else "unet.rest"


def norms_by_part(parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """The norm of each part's gradients; their squares add up to the global one's. Collective where they are cut up."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parts.setdefault(part_of(name), []).append(parameter)
    gradients = {part: [p.grad for p in members if p.grad is not None] for part, members in parts.items()}
    return {part: float(whole(nn.utils.get_total_norm(found))) for part, found in gradients.items() if found}
