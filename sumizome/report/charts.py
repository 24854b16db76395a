"""Drawings as numbers: bars, a density, lines on logarithmic axes, each a `Chart` that a template draws as SVG.

Owns the geometry and the ticks; knows neither HTML nor what is drawn. Units: those of the drawing's view box, y
downwards. Colours are the page's: a rectangle has a shade between 0 and 1, which a greyscale print keeps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chart", "Line", "Rect", "Tick", "density", "histogram", "rank_frequency", "short"]

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 640.0, 56.0, 618.0, 14.0, 46.0


class Tick(NamedTuple):
    at: float
    label: str


class Rect(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    shade: float
    """0 to 1"""
    title: str


class Line(NamedTuple):
    points: str
    """as SVG has them"""
    style: Literal["solid", "dashed", "dotted", "dashdot"]
    name: str


@dataclass(frozen=True)
class Chart:
    """One drawing; the plot lies between left and right, top and bottom."""

    title: str
    x_title: str
    y_title: str
    height: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    rects: Sequence[Rect] = ()
    lines: Sequence[Line] = ()
    width: float = _WIDTH
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP

    @property
    def bottom(self) -> float:
        return self.height - _BOTTOM


def short(number: float | int) -> str:
    """1500 → "1.5k"."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def histogram(
    title: str,
    counts: Sequence[int],
    edges: Sequence[float | int],
    x_title: str,
    *,
    label: Callable[[float | int], str] = short,
    y_title: str = "pictures",
    width: float = _WIDTH,
) -> Chart:
    """Bars of equal width between their edges (one more than bars), whatever the edges are."""
    height, right = 210.0, width - _WIDTH + _RIGHT
    bottom, most = height - _BOTTOM, max(1, *counts)
    top = _nice_ceiling(most)
    step = (right - _LEFT) / len(counts)
    rects = [
        Rect(
            _LEFT + index * step + 0.5,
            bottom - (bottom - _TOP) * count / top,
            step - 1,
            (bottom - _TOP) * count / top,
            1.0,
            f"{label(edges[index])} to {label(edges[index + 1])}: {count:,}",
        )
        for index, count in enumerate(counts)
        if count
    ]
    every = math.ceil(len(edges) / (width / 72))
    x_ticks = [Tick(_LEFT + index * step, label(edge)) for index, edge in enumerate(edges) if index % every == 0]
    y_ticks = [Tick(bottom - (bottom - _TOP) * share, short(top * share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    return Chart(title, x_title, y_title, height, x_ticks, y_ticks, rects, width=width, right=right)


def _nice_ceiling(value: float | int) -> float:
    """The next of 4, 8, 12, 20, 40, 80, … so that quarters are whole."""
    power = 10.0 ** math.floor(math.log10(max(value, 4) / 4))
    return next(step * power for step in (4, 8, 12, 20, 40) if step * power >= value)


def density(
    title: str,
    x: NDArray[np.generic],
    y: NDArray[np.generic],
    x_title: str,
    y_title: str,
    *,
    ticks: Sequence[float | int],
    bins: int = 44,
) -> Chart:
    """How many points lie where, on two logarithmic axes of one scale; shades go with the logarithm of the count."""
    low, high = (math.log2(edge) for edge in _span(x, y))
    edges = np.linspace(low, high, bins + 1)
    counts, _, _ = np.histogram2d(np.log2(y.astype(np.float64)), np.log2(x.astype(np.float64)), bins=(edges, edges))
    height = _RIGHT - _LEFT + _TOP + _BOTTOM
    height = 0.72 * height
    bottom = height - _BOTTOM
    cell_width, cell_height = (_RIGHT - _LEFT) / bins, (bottom - _TOP) / bins
    most = math.log1p(counts.max())
    rects = [
        Rect(
            _LEFT + column * cell_width,
            bottom - (row + 1) * cell_height,
            cell_width,
            cell_height,
            0.18 + 0.82 * math.log1p(counts[row, column]) / most,
            f"{2 ** edges[column]:.0f}–{2 ** edges[column + 1]:.0f} px wide, "
            f"{2 ** edges[row]:.0f}–{2 ** edges[row + 1]:.0f} px tall: {counts[row, column]:,.0f}",
        )
        for row, column in np.argwhere(counts > 0).tolist()
    ]
    inside = [tick for tick in ticks if low <= math.log2(tick) <= high]
    places = [(math.log2(tick) - low) / (high - low) for tick in inside]
    x_ticks = [Tick(_LEFT + (_RIGHT - _LEFT) * at, f"{tick:.0f}") for at, tick in zip(places, inside, strict=True)]
    y_ticks = [Tick(bottom - (bottom - _TOP) * at, f"{tick:.0f}") for at, tick in zip(places, inside, strict=True)]
    return Chart(title, x_title, y_title, height, x_ticks, y_ticks, rects)


def _span(x: NDArray[np.generic], y: NDArray[np.generic]) -> tuple[float, float]:
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    return low / 1.15, high * 1.15


def rank_frequency(title: str, series: Sequence[tuple[str, NDArray[np.float64]]], *, height: float = 320.0) -> Chart:
    """Each series, highest value first, over its rank, both logarithmic; at most some 200 points of each are drawn."""
    bottom = height - _BOTTOM
    ranks_most = max(2, *(len(values) for _, values in series))
    values_most = max(2.0, *(float(values.max(initial=1)) for _, values in series))
    values_least = min(1.0, *(float(values[values > 0].min(initial=1)) for _, values in series))
    high, low = math.log10(values_most), max(math.log10(values_least), -2.0)

    def place(rank: int, value: float) -> str:
        x = _LEFT + (_RIGHT - _LEFT) * math.log10(rank) / math.log10(ranks_most)
        y = bottom - (bottom - _TOP) * (math.log10(max(value, 10**low)) - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    lines = []
    styles: tuple[Literal["solid", "dashed"], ...] = ("solid", "dashed")
    for style, (name, values) in zip(styles, series, strict=False):
        ranks = np.unique(np.geomspace(1, max(1, len(values)), 200).astype(np.int64))
        points = " ".join(place(rank, float(values[rank - 1])) for rank in ranks.tolist() if rank <= len(values))
        lines.append(Line(points, style, name))
    x_ticks = [
        Tick(_LEFT + (_RIGHT - _LEFT) * power / math.log10(ranks_most), short(10.0**power))
        for power in range(math.floor(math.log10(ranks_most)) + 1)
    ]
    y_ticks = [
        Tick(bottom - (bottom - _TOP) * (power - low) / (high - low), short(10.0**power))
        for power in range(math.ceil(low), math.floor(high) + 1)
    ]
    return Chart(title, "rank of the tag (logarithmic)", "showings an epoch", height, x_ticks, y_ticks, (), lines)
