"""Structural similarity of two pictures, at one scale and at several; differentiable.

Pixels are [b, 3, H, W] in [-1, 1], so the range is 2. Windows are Gaussian, 11 px wide, and lie wholly inside the
picture. Small crops have fewer scales: as many as leave a whole window, their weights made to sum to 1.
Source: Wang et al. 2004 (SSIM); Wang, Simoncelli & Bovik 2003 (MS-SSIM).
"""

import torch
from torch import Tensor

from sumizome.shapes import PerSample, Pixels

__all__ = ["SCALE_WEIGHTS", "ms_ssim", "scales_of", "ssim"]

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2


def ssim(a: Pixels, b: Pixels) -> PerSample:
    """1 for equal pictures; the mean over places and channels."""
    return _similarity(a.float(), b.float())[0]


def ms_ssim(a: Pixels, b: Pixels) -> PerSample:
    """Contrast and structure at every scale, luminance at the coarsest; 1 for equal pictures, 0 at worst.

    Negative correlation counts as none: its fractional power does not exist.
    """
    a, b = a.float(), b.float()
    count = scales_of(min(a.shape[-2:]))
    total = sum(SCALE_WEIGHTS[:count])
    product = torch.ones(len(a), device=a.device)
    for scale, weight in enumerate(SCALE_WEIGHTS[:count]):
        whole, contrast = _similarity(a, b)
        last = scale == count - 1
        # Not at 0 itself, where the power's slope is infinite.
        product = product * (whole if last else contrast).clamp(min=1e-6) ** (weight / total)
        if not last:
            a, b = (torch.nn.functional.avg_pool2d(each, 2) for each in (a, b))
    return product


def scales_of(side: int) -> int:
    """How many scales fit into a picture whose shorter side this is. Raises: ValueError if none does."""
    count: int = sum(side // 2**scale >= _WINDOW for scale in range(len(SCALE_WEIGHTS)))
    if not count:
        raise ValueError(f"a side of {side} px is less than the window of {_WINDOW}")
    return count


def _similarity(a: Tensor, b: Tensor) -> tuple[PerSample, PerSample]:
    """(SSIM, its contrast and structure alone), means over places and channels."""
    mean_a, mean_b = _smoothed(a), _smoothed(b)
    # Rounding can make a flat window's variance less than nothing.
    spread_a = (_smoothed(a * a) - mean_a * mean_a).clamp(min=0)
    spread_b = (_smoothed(b * b) - mean_b * mean_b).clamp(min=0)
    together = _smoothed(a * b) - mean_a * mean_b
    contrast = (2 * together + _C2) / (spread_a + spread_b + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
    return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _smoothed(x: Tensor) -> Tensor:
    places = torch.arange(_WINDOW, device=x.device, dtype=x.dtype) - _WINDOW // 2
    kernel = torch.exp(-(places**2) / (2 * _DEVIATION**2))
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    along = kernel.expand(channels, 1, 1, _WINDOW)
    x = torch.nn.functional.conv2d(x, along, groups=channels)
    return torch.nn.functional.conv2d(x, along.transpose(2, 3), groups=channels)
