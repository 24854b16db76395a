"""Which part of a picture a showing takes: a function of the picture's pixels and the showing's seed.

Pictures are uint8 [H, W, 3]; corners are (top, left), sides are pixels. The rule that favours detail: of a few places
drawn at random, the one with the most gradient energy, weighted by region; a share of the showings takes the first
place drawn instead, so that flat parts are not forgotten.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sumizome.data.canvas import Canvas
from sumizome.errors import ConfigError
from sumizome.seeds import derive_seed

__all__ = ["CropConfig", "balanced_repeats", "choose_corner", "detail_of", "middle"]

_MOST_REPEATS = 16


@dataclass(frozen=True)
class CropConfig:
    """What is shown of each picture."""

    side: int = 256
    """Side of a crop in pixels, a multiple of 16; 0 = whole canvases, with `latents`. Smaller pictures are left out."""
    candidates: int = 4
    """Places that are drawn for a showing; the one with the most detail is taken."""
    detail: float = 0.75
    """Share of the showings that choose so; the others take the first place drawn."""
    align: int = 8
    """Crops begin at multiples of so many pixels: 8 keeps them on the latents' grid, and on that of a picture's JPEG
    blocks; 1 = anywhere. With `latents` never less than the VAE's factor."""
    balance: float = 0.5
    """How far rare shapes of picture are shown more often: 0 = each picture once an epoch, 1 = all shapes equally often
    (16 times the commonest at most). Shapes are the aspect buckets."""

    def __post_init__(self) -> None:
        if self.side < 0 or self.side % 16 or 0 < self.side < 32:
            raise ConfigError(f"crops.side is {self.side}; give a multiple of 16 from 32 on, or 0 for whole canvases")
        if self.candidates < 1 or self.align < 1:
            raise ConfigError("crops.candidates and crops.align must be 1 or more")
        if not (0 <= self.detail <= 1 and 0 <= self.balance <= 1):
            raise ConfigError("crops.detail and crops.balance are shares: give 0 to 1")


def choose_corner(
    picture: Canvas, region: Float[np.ndarray, "H W"] | None, side: int, config: CropConfig, align: int, seed: int
) -> tuple[int, int]:
    """The corner of a showing's crop. `region`: what a pixel's error weighs; None = the same everywhere."""
    random = np.random.default_rng(derive_seed(seed, "crop"))
    places = [(length - side) // align + 1 for length in picture.shape[:2]]
    drawn = random.integers(0, places, (config.candidates, 2)) * align
    corners = [(int(top), int(left)) for top, left in drawn]
    if random.random() >= config.detail:
        return corners[0]
    return max(corners, key=lambda corner: _score(picture, region, corner, side))  # the first of equal ones


def _score(picture: Canvas, region: Float[np.ndarray, "H W"] | None, corner: tuple[int, int], side: int) -> float:
    top, left = corner
    part = (slice(top, top + side), slice(left, left + side))
    return detail_of(picture[part]) * (1.0 if region is None else float(region[part].mean()))


def detail_of(picture: Canvas) -> float:
    """Gradient energy: the mean squared difference of neighbouring pixels, green only, which is most of luma."""
    green = picture[..., 1].astype(np.float32)
    return float(np.square(np.diff(green, axis=0)).mean() + np.square(np.diff(green, axis=1)).mean())


def middle(size: tuple[int, int], side: tuple[int, int], align: int) -> tuple[int, int]:
    """The corner of the window of `side` (height, width) in the middle of a picture, at a multiple of `align`."""
    top, left = ((length - wanted) // 2 // align * align for length, wanted in zip(size, side, strict=True))
    return top, left


def balanced_repeats(bucket: Int[np.ndarray, " n"], repeats: Int[np.ndarray, " n"], strength: float) -> np.ndarray:
    """`repeats`, times (the commonest bucket's showings / the own one's)^strength, to a whole number.

    A picture's factor is that of its bucket; rows with 0 repeats stay out of it all.
    """
    shown = np.bincount(bucket, repeats)[bucket]
    most = np.where(repeats > 0, shown, 0).max(initial=0)
    factor = np.clip(np.rint((most / np.maximum(shown, 1)) ** strength), 1, _MOST_REPEATS)
    return np.asarray(repeats * factor, np.int64)
