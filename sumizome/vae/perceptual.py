"""LPIPS, the distance of two pictures in the features of a trained VGG16, from weights that the user has.

Nothing is fetched. The weights are one safetensors file with the names of the `lpips` package's network "vgg": the
convolutions `net.slice*.*` and one row of channel weights a layer, `lin*.model.1.weight`. With that package:
    python -c "import lpips, safetensors.torch as s; n = lpips.LPIPS(net='vgg');
    s.save_file({k: v.clone() for k, v in n.state_dict().items()}, 'lpips-vgg.safetensors')"
Source: Zhang et al. 1801.03924.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sumizome.errors import ModelError
from sumizome.models.tensor_file import open_tensor_file
from sumizome.shapes import PerSample, Pixels

__all__ = ["Lpips", "load_lpips"]

_SLICES = (("1", (0, 2)), ("2", (5, 7)), ("3", (10, 12, 14)), ("4", (17, 19, 21)), ("5", (24, 26, 28)))
"""VGG16's convolutions by slice, numbered as in torchvision's `features`; all slices but the first begin by halving."""
_CHANNELS = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Frozen; gradients flow to the pictures."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.slices = nn.ModuleList(nn.Sequential(*_slice(sizes)) for sizes in _CHANNELS)
        self.weights = nn.ParameterList(torch.zeros(sizes[-1]) for sizes in _CHANNELS)
        self.register_buffer("shift", torch.tensor(_SHIFT)[None, :, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[None, :, None, None], persistent=False)
        self.requires_grad_(False)

    def forward(self, a: Pixels, b: Pixels) -> PerSample:
        """0 for equal pictures [-1, 1]; sides of 16 px or more."""
        x = (torch.cat([a, b]) - self.shift) / self.scale
        total = torch.zeros(len(a), device=x.device)
        for number, (convolutions, weight) in enumerate(zip(self.slices, self.weights, strict=True)):
            if number:
                x = nn.functional.max_pool2d(x, 2)
            x = convolutions(x)
            unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            of_a, of_b = unit.chunk(2)
            total = total + torch.einsum("bchw,c->bhw", (of_a - of_b).square(), weight).mean(dim=(1, 2))
        return total


def _slice(sizes: Sequence[int]) -> Iterator[nn.Module]:
    """Convolutions, each with its ReLU behind it."""
    for inputs, outputs in pairwise(sizes):
        yield nn.Conv2d(inputs, outputs, 3, padding=1)
        yield nn.ReLU()


def load_lpips(path: Path) -> Lpips:
    """The network in the file. Raises: ModelError for a file that is none, or lacks a tensor."""
    file = open_tensor_file(path)
    network = Lpips()

    def take(names: tuple[str, ...], into: Tensor) -> None:
        stored = next((file.read(name) for name in names if name in file.shapes), None)
        if stored is None or stored.numel() != into.numel():
            raise ModelError(
                f"{path}: expected LPIPS weights of VGG16, and {names[0]} is missing or of another shape; "
                "docs/guide/vae.md says how such a file is made"
            )
        into.copy_(stored.float().reshape(into.shape))

    for number, (slice_name, places) in enumerate(_SLICES):
        for own, place in enumerate(places):
            for part in ("weight", "bias"):
                parameter = network.get_parameter(f"slices.{number}.{2 * own}.{part}")
                take((f"net.slice{slice_name}.{place}.{part}", f"features.{place}.{part}"), parameter.data)
        take((f"lin{number}.model.1.weight", f"lins.{number}.model.1.weight"), network.weights[number].data)
    return network.eval()
