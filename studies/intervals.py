"""Means over a few seeds with their intervals. Owns the arithmetic alone."""

import math
from collections.abc import Sequence

import numpy as np

from sumizome.evaluate.scores import Interval

__all__ = ["difference", "differs", "paired", "seed_interval", "told"]

_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantile of Student's t with n − 1 degrees of freedom, by n."""


def seed_interval(values: Sequence[float]) -> Interval:
    """The mean over seeds and its 95 % interval by Student's t, 2 to 10 seeds: wide for three, as it should be."""
    sample = np.asarray(values, np.float64)
    mean = float(sample.mean())
    half = _T[len(sample)] * float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return Interval(mean, mean - half, mean + half, len(sample))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean difference from a baseline of the same seeds, seed by seed: what seeds share falls out."""
    return seed_interval([value - base for value, base in zip(values, baseline, strict=True)])


def differs(interval: Interval) -> bool:
    """Whether the interval of a difference leaves 0 out."""
    return interval.low > 0 or interval.high < 0


def difference(interval: Interval, more: str, less: str, digits: int = 3, factor: float = 1.0, unit: str = "") -> str:
    """The difference in words: "lower by 0.12 ± 0.03", or that it cannot be told from none."""
    half = factor * (interval.high - interval.low) / 2
    if not differs(interval):
        return f"not told apart ({factor * interval.value:+.{digits}f} ± {half:.{digits}f}{unit})"
    word = more if interval.value > 0 else less
    return f"{word} by {abs(factor * interval.value):.{digits}f} ± {half:.{digits}f}{unit}"


def told(interval: Interval, digits: int = 3) -> str:
    """ "0.123 ± 0.045": the mean and half of its interval."""
    return f"{interval.value:.{digits}f} ± {(interval.high - interval.low) / 2:.{digits}f}"
