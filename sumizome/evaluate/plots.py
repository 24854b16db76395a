"""Lines with intervals as `report.charts.Chart`s, told apart by their strokes, so that a grey print keeps them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sumizome.evaluate.scores import Interval
from sumizome.report.charts import Chart, Line, Rect, Tick, short

__all__ = ["Series", "line_chart"]

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT, _LEGEND = 56.0, 618.0, 14.0, 46.0, 300.0, 22.0
_STYLES: tuple[Literal["solid", "dashed", "dotted", "dashdot"], ...] = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class Series:
    """One line: its value at each place, and where told, the interval."""

    name: str
    points: Sequence[tuple[float | int, Interval | float]]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    from_zero: bool = True,
    ticks: Sequence[float | int] = (),
) -> Chart:
    """Up to four lines; `y_title`, with its unit, stands in the title, intervals as bars behind the lines.

    `ticks`: where the horizontal axis is marked; by default at some of the places.
    """
    series = [each for each in series[: len(_STYLES)] if each.points]
    everything = [_span(value) for each in series for _, value in each.points]
    low = 0.0 if from_zero else min(span[0] for span in everything)
    high = max([span[2] for span in everything] + [low + 1e-9])
    places = [x for each in series for x, _ in each.points]
    first, last = min(places), max(places)
    bottom = _HEIGHT - _BOTTOM
    top = _TOP + _LEGEND * len(series) + 6

    def x_of(x: float | int) -> float:
        return _LEFT + 8 + (_RIGHT - _LEFT - 16) * ((x - first) / (last - first) if last > first else 0.5)

    def y_of(y: float) -> float:
        return bottom - (bottom - top) * (y - low) / (high - low)

    rects, lines = [], []
    for style, each in zip(_STYLES, series, strict=False):
        spans = [(x, *_span(value)) for x, value in each.points]
        lines.append(Line(" ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, _, y, _ in spans), style, each.name))
        rects += [
            Rect(x_of(x) - 2, y_of(top_y), 4, max(0.5, y_of(low_y) - y_of(top_y)), 0.28, f"{each.name}, {x:g}: {y:.4g}")
            for x, low_y, y, top_y in spans
            if top_y > low_y
        ]
    marks = list(ticks) or sorted(set(places))
    every = max(1, -(-len(marks) // 9))
    x_ticks = [Tick(x_of(mark), f"{mark:g}") for n, mark in enumerate(marks) if n % every == 0 or mark == marks[-1]]
    if len(x_ticks) > 1 and x_ticks[-1].at - x_ticks[-2].at < 44:
        del x_ticks[-2]
    y_ticks = [Tick(y_of(level), short(level)) for level in _round_levels(low, high)]
    return Chart(f"{title} ({y_title})", x_title, y_title, _HEIGHT, x_ticks, y_ticks, rects, lines)


def _round_levels(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _span(value: Interval | float) -> tuple[float, float, float]:
    """(low, value, high)"""
    return (value.low, value.value, value.high) if isinstance(value, Interval) else (value, value, value)
