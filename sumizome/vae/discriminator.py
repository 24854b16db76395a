"""The adversary that a decoder may be trained against: a small network that judges patches, and both sides' losses.

It has no batch statistics, so a sample's loss is the sample's own, on any number of ranks.
Source: Isola et al. 1611.07004 (patches); Lim & Ye 1705.02894 (hinge losses); Esser et al. 2012.09841 (late start).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sumizome.errors import ConfigError
from sumizome.seeds import derive_seed
from sumizome.shapes import PerSample, Pixels

__all__ = ["AdversarialConfig", "PatchDiscriminator", "build_discriminator", "deceived", "told_apart"]


@dataclass(frozen=True)
class AdversarialConfig:
    """The adversary; off by default. What it adds is texture that was not in the picture."""

    weight: float = 0.0
    """Of the decoder's adversarial loss, such as 0.05; 0 = no adversary."""
    start: int = 500
    """Step from which it learns to tell decoded crops from real ones."""
    warmup_steps: int = 500
    """Steps, from `start` on, over which its word for the decoder rises from nothing to `weight`."""
    lr: float = 1e-4
    """Its own peak learning rate."""
    width: int = 64
    """Channels of its first layer; 64 makes 2.8 M parameters."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.start < 0 or self.warmup_steps < 0 or self.lr <= 0 or self.width < 8:
            raise ConfigError(
                "adversarial: weight, start and warmup_steps cannot be negative, lr must be above 0 and width 8 or more"
            )
        if self.width % 8:
            raise ConfigError(f"adversarial.width is {self.width}; give a multiple of 8")

    def weight_at(self, step: int) -> float:
        """The weight at a step, counted from 0."""
        return self.weight * min(1.0, max(0, step - self.start) / max(1, self.warmup_steps))


class PatchDiscriminator(nn.Module):
    """Pixels [b, 3, H, W] → logits [b, 1, ≈H/8, ≈W/8]: is the patch around here of a picture (> 0), or decoded?"""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            *_layer(width, 2 * width, stride=2),
            *_layer(2 * width, 4 * width, stride=2),
            *_layer(4 * width, 8 * width, stride=1),
            nn.Conv2d(8 * width, 1, 3, padding=1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        answers: Tensor = self.layers(pixels)
        return answers


def _layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    size = 4 if stride == 2 else 3
    return [nn.Conv2d(inputs, outputs, size, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.2)]


def build_discriminator(config: AdversarialConfig, seed: int) -> PatchDiscriminator | None:
    """The adversary with its first weights, a function of the seed; None where there is none."""
    if not config.weight:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "discriminator"))
        return PatchDiscriminator(config.width)


def told_apart(discriminator: nn.Module, real: Pixels, decoded: Pixels) -> PerSample:
    """The adversary's own loss: 0 once it is sure of both; no gradient reaches the decoder."""
    is_real = nn.functional.relu(1 - discriminator(real))
    is_decoded = nn.functional.relu(1 + discriminator(decoded.detach()))
    return (is_real.mean(dim=(1, 2, 3)) + is_decoded.mean(dim=(1, 2, 3))) / 2


def deceived(discriminator: nn.Module, decoded: Pixels) -> PerSample:
    """The decoder's: the less, the more it is taken for a picture; no gradient reaches the adversary's weights."""
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    logits: Tensor = functional_call(discriminator, frozen, (decoded,))
    return -logits.mean(dim=(1, 2, 3))
