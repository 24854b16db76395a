"""Numbers of pictures: brightness, distance from a colour, saturation, sharpness; and an interval over seeds.

Owns no model and no file. Pictures are uint8 RGB arrays [n, H, W, 3]; numbers lie in 0 … 1 of the display's range (not
linear light), as the report's "medium brightness" does. The invariant: a picture's number depends on it alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import erfc

import numpy as np
from jaxtyping import Bool, Float, UInt8

__all__ = [
    "COLOURS",
    "Images",
    "Interval",
    "bootstrap",
    "brightness",
    "colour_error",
    "jackknife",
    "proportion",
    "saturation",
    "sharpness",
]

Images = UInt8[np.ndarray, "_ _ _ 3"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "pink": (255, 192, 203),
    "brown": (165, 42, 42),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
"""Black, white, mid grey and ten colours, sRGB. Source: CSS Color Level 4, named colours (grey: half of the range)."""

_LUMA = np.array([0.299, 0.587, 0.114])
"""Source: ITU-R BT.601."""


@dataclass(frozen=True)
class Interval:
    """A mean or another number of a sample, and its 95 % interval: of 100 such, 95 hold the number of all there are."""

    value: float
    low: float
    high: float
    count: int
    """Pictures, or seeds, that it rests on."""


def bootstrap(values: Sequence[float] | Float[np.ndarray, " n"], draws: int = 2000) -> Interval:
    """The mean and its percentile-bootstrap interval; the same numbers always give the same interval.

    Plain percentiles are too narrow for few values (8: 89 in 100 intervals hold the mean, not 95), so they are taken
    further out, as Student's t does. Of fewer than 6 no interval within their range can do it.
    Source: Hesterberg 1411.5279, §5.3 ("expanded percentile").
    """
    sample = np.asarray(values, np.float64)
    if not len(sample):
        raise ValueError("no interval of no values")
    rows = np.random.default_rng(0).integers(0, len(sample), (draws, len(sample)))
    tail = _expanded_tail(len(sample))
    low, high = np.quantile(sample[rows].mean(axis=1), (tail, 1 - tail))
    return Interval(float(sample.mean()), float(low), float(high), len(sample))


def _expanded_tail(count: int) -> float:
    """Φ(−√(n/(n−1))·t) with Student's t at 97.5 %, n − 1 degrees of freedom: 0.025 for many, 0.0057 for 8."""
    if count < 2:
        return 0.025
    # With t = √ν·tan θ the density is cos^(ν−1) θ dθ.
    angles = np.linspace(0, np.pi / 2, 100_001)
    share = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (count - 2))
    quantile = np.sqrt(count - 1) * np.tan(np.interp(0.95, share / share[-1], angles[1:]))
    return float(erfc(quantile * np.sqrt(count / (count - 1)) / np.sqrt(2)) / 2)


def proportion(hits: Sequence[bool] | Bool[np.ndarray, " n"]) -> Interval:
    """The share of hits and its 95 % interval, which is wide where few were tried, also if all or none hit.

    A bootstrap of ten misses would say "certainly never". Source: Wilson 1927, the score interval.
    """
    count = len(hits)
    if not count:
        raise ValueError("no interval of no values")
    share, z = float(np.mean(hits)), 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * float(np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half), count)


def jackknife(statistic: Callable[[np.ndarray], float], rows: Float[np.ndarray, "n d"], groups: int = 10) -> Interval:
    """A number of a whole sample and its interval, from the same number with one group of rows left out at a time.

    For distances between sets: a bootstrap would draw rows twice, and a set with doubles is further from any other.
    Source: Efron & Tibshirani 1993, ch. 11 (delete-d jackknife), 1.96 standard errors on each side.
    """
    groups = min(groups, len(rows))
    value = statistic(rows)
    member = np.arange(len(rows)) % groups
    without = np.array([statistic(rows[member != group]) for group in range(groups)])
    error = 1.96 * float(np.sqrt((groups - 1) / groups * np.square(without - without.mean()).sum()))
    return Interval(value, value - error, value + error, len(rows))


def brightness(images: Images) -> Float[np.ndarray, " n"]:
    """Mean luma of each picture: 0 black, 1 white."""
    return np.asarray((images.astype(np.float64) @ _LUMA).mean(axis=(1, 2)) / 255)


def colour_error(images: Images, colour: tuple[int, int, int]) -> Float[np.ndarray, " n"]:
    """Root mean square distance of each picture's pixels and channels from one colour: 0 exact, 1 black for white."""
    return np.asarray(np.sqrt(np.square(images.astype(np.float64) - colour).mean(axis=(1, 2, 3))) / 255)


def saturation(images: Images) -> Float[np.ndarray, " n"]:
    """Mean over pixels of (max − min) / max over channels (HSV's S), 0 for black."""
    most, least = images.max(axis=3).astype(np.float64), images.min(axis=3).astype(np.float64)
    return np.asarray(((most - least) / np.maximum(most, 1)).mean(axis=(1, 2)))


def sharpness(images: Images) -> Float[np.ndarray, " n"]:
    """Root mean square of the luma's Laplacian (four neighbours), in units of the range: 0 is flat."""
    luma = images.astype(np.float64) @ _LUMA / 255
    middle = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return np.asarray(np.sqrt(np.square(around - 4 * middle).mean(axis=(1, 2))))
