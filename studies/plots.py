"""Plots of the studies: lines told apart by stroke and marker, so that a grey print keeps them; units on every axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot, ticker

from sumizome.evaluate.scores import Interval
from sumizome.files import write_atomically

__all__ = ["Line", "Panel", "write_plot"]

_STROKES = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "x")
_GREYS = ("0.0", "0.25", "0.45", "0.0", "0.35", "0.55")


@dataclass(frozen=True)
class Line:
    """One arm: its means over seeds, with intervals, by place."""

    name: str
    x: Sequence[float]
    y: Sequence[Interval | float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_title: str
    y_title: str
    lines: Sequence[Line]
    x_log: bool = False
    y_log: bool = False
    ticks: Sequence[tuple[float, str]] = ()
    """(place, words) along the horizontal axis; by default matplotlib's."""
    level: tuple[float, str] | None = None
    """A horizontal line and what it is."""
    from_zero: bool = True
    share: bool = False
    """Nothing lies outside 0 … 1, whatever an interval by Student's t says: the axis ends there."""
    points: bool = False
    """No lines between the places: they are arms, not amounts."""


def write_plot(panels: Sequence[Panel], path: Path) -> None:
    """Writes the panels as a PNG: side by side, four in two rows. Panels of the same lines have one legend."""
    columns = 2 if len(panels) == 4 else len(panels)
    rows = len(panels) // columns
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 4.2 * rows), squeeze=False)
    explained: list[str] = []
    for panel, axis in zip(panels, axes.flat, strict=True):
        _draw(panel, axis)
        names = [line.name for line in panel.lines]
        if len(names) > 1 and names != explained:
            axis.legend(fontsize=8, frameon=False)
            explained = names
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)


def _draw(panel: Panel, axis: pyplot.Axes) -> None:
    for number, line in enumerate(panel.lines):
        means = [y.value if isinstance(y, Interval) else y for y in line.y]
        bars = [(y.high - y.low) / 2 if isinstance(y, Interval) else 0.0 for y in line.y]
        axis.errorbar(
            line.x,
            means,
            yerr=bars if any(bars) else None,
            label=line.name if len(panel.lines) > 1 else None,
            linestyle="none" if panel.points else _STROKES[number % len(_STROKES)],
            marker=_MARKERS[number % len(_MARKERS)],
            color=_GREYS[number % len(_GREYS)],
            markersize=5,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
        )
    if panel.level is not None:
        axis.axhline(panel.level[0], color="0.6", linewidth=1)
        place = axis.get_yaxis_transform()
        axis.text(0.99, panel.level[0], panel.level[1], transform=place, ha="right", va="bottom", fontsize=8)
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel(panel.x_title)
    axis.set_ylabel(panel.y_title)
    if panel.x_log:
        axis.set_xscale("log")
    if panel.y_log:
        axis.set_yscale("log")
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted(ticker.FormatStrFormatter("%g"))
    elif panel.share:
        axis.set_ylim(-0.03, 1.03)
    elif panel.from_zero:
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    if panel.ticks:
        axis.set_xticks([place for place, _ in panel.ticks], [words for _, words in panel.ticks])
        axis.minorticks_off()
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
