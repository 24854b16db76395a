"""How near a decoded picture is to its original: numbers of pairs of 8-bit pictures, as files hold them.

Owns the measures and which way is better; tables are the page's. Pictures are uint8 [H, W, 3]. A measure is a number a
picture, but for blockiness, which is a ratio over the whole set: one picture's own lines fall on the grid, or beside
it, by chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from sumizome.data.canvas import Canvas
from sumizome.evaluate.scores import Interval, bootstrap, jackknife
from sumizome.vae.blockiness import CELL, grid_energies
from sumizome.vae.crop_loader import to_pixels
from sumizome.vae.perceptual import Lpips
from sumizome.vae.similarity import ms_ssim, ssim

__all__ = [
    "MEASURES",
    "Measure",
    "Pair",
    "blockiness_of_originals",
    "compare",
    "distance_of",
    "score_pair",
    "summarise",
    "to_picture",
]


@dataclass(frozen=True)
class Measure:
    """What a column of the table says."""

    title: str
    unit: str
    explained: str
    best: float | None
    """What a perfect decoder has; None: what the originals have."""
    digits: int = 3


MEASURES: Mapping[str, Measure] = {
    "psnr": Measure("PSNR", "dB", "of the mean squared error, peak 255; higher is better", np.inf, 2),
    "ssim": Measure("SSIM", "", "structural similarity, windows of 11 px; 1 is equal", 1.0, 4),
    "ms_ssim": Measure("MS-SSIM", "", "the same at several scales; 1 is equal", 1.0, 4),
    "lpips": Measure("LPIPS", "", "distance in the features of a VGG16; 0 is equal", 0.0, 4),
    "blockiness": Measure(
        "blockiness",
        "",
        "energy of steps on the 8-pixel grid over that elsewhere; best is what the originals have",
        None,
    ),
    "sharpness": Measure(
        "edge sharpness", "", "gradient at the originals' edges, as a share of theirs; 1 is equal", 1.0
    ),
    "red": Measure("red", "levels", "mean error of the red of areas of 8 × 8 px, of 255 levels", 0.0),
    "green": Measure("green", "levels", "the same for green", 0.0),
    "blue": Measure("blue", "levels", "the same for blue", 0.0),
}

_EDGES = 0.1
"""Share of a picture's pixels that count as its edges: those of most gradient."""


@dataclass(frozen=True)
class Pair:
    """The numbers of one decoded picture beside its original."""

    values: Mapping[str, float]
    """By the names of `MEASURES`, without blockiness."""
    grid: tuple[float, float]
    """Energy of the decoded picture's steps on the grid, and elsewhere."""
    grid_of_original: tuple[float, float]


def to_picture(pixels: Float[torch.Tensor, "3 H W"]) -> Canvas:
    """[-1, 1] as a file would hold it."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())


@torch.no_grad()
def score_pair(original: Canvas, decoded: Canvas, lpips: Lpips | None = None) -> Pair:
    """The measures of one picture."""
    a, b = to_pixels(original)[None], to_pixels(decoded)[None]
    squared = float((a - b).double().square().mean()) / 4
    difference = decoded.astype(np.float64) - original
    red, green, blue = _cell_means(difference)
    values = {
        "psnr": float(-10 * np.log10(max(squared, 1e-10))),
        "ssim": float(ssim(a, b)),
        "ms_ssim": float(ms_ssim(a, b)),
        "sharpness": _edge_sharpness(original, decoded),
        "red": red,
        "green": green,
        "blue": blue,
    }
    if lpips is not None:
        device = next(lpips.buffers()).device
        values["lpips"] = float(lpips(a.to(device), b.to(device)))
    grids = [tuple(float(energy) for energy in grid_energies(pixels)) for pixels in (b, a)]
    return Pair(values, (grids[0][0], grids[0][1]), (grids[1][0], grids[1][1]))


def _cell_means(difference: Float[np.ndarray, "H W 3"]) -> list[float]:
    """Mean over areas of 8 × 8 px of the absolute mean difference, by channel: tone, not texture."""
    height, width = (side // CELL * CELL for side in difference.shape[:2])
    cells = difference[:height, :width].reshape(height // CELL, CELL, width // CELL, CELL, 3).mean(axis=(1, 3))
    return [float(value) for value in np.abs(cells).mean(axis=(0, 1))]


def _edge_sharpness(original: Canvas, decoded: Canvas) -> float:
    """Σ gradient of the decoded picture at the original's edges / Σ the original's; 1 for a picture without any."""
    before, after = (_gradient(picture) for picture in (original, decoded))
    edges = before >= max(np.quantile(before, 1 - _EDGES), 1e-6)
    return float(after[edges].sum() / before[edges].sum()) if edges.any() else 1.0


def _gradient(picture: Canvas) -> Float[np.ndarray, "h w"]:
    grey = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    gradient: np.ndarray = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])
    return gradient


def summarise(pairs: Sequence[Pair]) -> dict[str, Interval]:
    """Each measure over a set, with its 95 % interval: of 100 sets, 95 give one that holds the measure of all."""
    names = [name for name in MEASURES if all(name in pair.values for pair in pairs)]
    found = {name: bootstrap([pair.values[name] for pair in pairs]) for name in names}
    found["blockiness"] = _ratio([pair.grid for pair in pairs])
    return {name: found[name] for name in MEASURES if name in found}


def _ratio(energies: Sequence[tuple[float, float]]) -> Interval:
    rows = np.array(energies, np.float64) + 1e-12
    if len(rows) == 1:  # nothing is left when it is left out
        value = float(rows[0, 0] / rows[0, 1])
        return Interval(value, value, value, 1)
    return jackknife(lambda part: float(part[:, 0].sum() / part[:, 1].sum()), rows)


def blockiness_of_originals(pairs: Sequence[Pair]) -> Interval:
    """That of the pictures themselves."""
    return _ratio([pair.grid_of_original for pair in pairs])


def distance_of(name: str, value: float, of_originals: float) -> float:
    """How far a measure is from its best, ≥ 0: what is to fall, whichever way the measure itself goes."""
    best = MEASURES[name].best
    if best is None:
        return abs(value - of_originals)
    return -value if best == np.inf else abs(value - best)


def compare(before: Mapping[str, Interval], after: Mapping[str, Interval], of_originals: float) -> dict[str, bool]:
    """Whether each measure is better after than before."""
    return {
        name: distance_of(name, after[name].value, of_originals) < distance_of(name, before[name].value, of_originals)
        for name in after
        if name in before
    }
