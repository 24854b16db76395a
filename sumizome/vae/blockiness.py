"""What a picture shows of an 8 × 8 grid: a measure for reports, and a term for training against it.

JPEG codes blocks of 8 × 8 pixels, so its damage is steps across the lines of that grid; a decoder that was trained on
such pictures draws the steps of its own accord. Pixels are [b, 3, H, W]; a step is the difference of luma between two
neighbours along one direction, and it lies on the grid when the second one's place is a multiple of 8.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sumizome.shapes import PerSample, Pixels

__all__ = ["CELL", "blockiness", "grid_energies", "grid_steps", "luma"]

CELL = 8
"""Side of JPEG's blocks, px."""
_CONTOUR = 0.12
"""Steps well above this (of the range −1 … 1: 15 of 255 levels) are contours, which the term leaves alone."""


def luma(pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b H W"]:
    """Source: ITU-R BT.601."""
    red, green, blue = pixels.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def grid_energies(pixels: Pixels) -> tuple[PerSample, PerSample]:
    """Mean squared step (across the grid's lines, everywhere else) of each picture, both directions together."""
    on, off = zip(*(_apart(steps.square()) for steps in _steps(pixels)), strict=True)
    return sum(on) / 2, sum(off) / 2


def blockiness(pixels: Pixels) -> PerSample:
    """The 8-pixel grid energy ratio of each picture: about 1 without a grid, more with one; 1 where nothing changes.

    A picture's own contours fall on the grid or beside it by chance, so one picture's ratio says little: compare it
    with the same picture's before, or take the mean over a set.
    """
    on, off = grid_energies(pixels)
    nothing = torch.finfo(torch.float32).tiny
    return (on + nothing) / (off + nothing)


def grid_steps(pixels: Pixels) -> PerSample:
    """The training term: by how much isolated small steps are higher on the grid than elsewhere, ≥ 0, differentiable.

    A step counts by what it exceeds the mean of both its neighbours by: the edge of a block stands alone between flat
    parts, while a drawn line's flank goes over several pixels. What exceeds `_CONTOUR` saturates, so that a contour
    that happens to lie on the grid is not blurred. The mean elsewhere is a yardstick and gets no gradient.
    """

    def excess(steps: Tensor) -> PerSample:
        size = steps.abs()
        beside = (size[..., :-2] + size[..., 2:]) / 2
        alone = torch.tanh((size[..., 1:-1] - beside).clamp(min=0) / _CONTOUR)
        on, off = _apart(alone, first=1)
        return (on - off.detach()).clamp(min=0)

    along_width, along_height = _steps(pixels)
    return (excess(along_width) + excess(along_height)) / 2


def _steps(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Differences along the width and along the height, the direction of the difference last."""
    if min(pixels.shape[-2:]) <= CELL:
        raise ValueError(f"{tuple(pixels.shape[-2:])} px hold no line of a grid of {CELL}")
    brightness = luma(pixels.float())
    return brightness.diff(dim=2), brightness.transpose(1, 2).diff(dim=2)


def _apart(values: Tensor, first: int = 0) -> tuple[PerSample, PerSample]:
    """Means of each sample over (the grid's lines, all else); `first`: the number of the first step."""
    places = torch.arange(first, first + values.shape[-1], device=values.device)
    on = (places + 1) % CELL == 0
    return values[..., on].mean(dim=(1, 2)), values[..., ~on].mean(dim=(1, 2))
