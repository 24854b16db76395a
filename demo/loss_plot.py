"""The validation loss by timestep as a picture: over the timesteps as training goes on, and over training at each.

Owns two panels drawn with Pillow alone, readable in greyscale: lines differ in lightness and marker and are labelled
where they end. Losses are the unweighted per-timestep ones, on a logarithmic axis.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

__all__ = ["ValidationPoint", "draw_loss_plot", "font", "read_validation"]

Color = tuple[int, int, int]
Point = tuple[float, float]
Item = TypeVar("Item")

PAPER: Color = (252, 251, 248)
INK: Color = (34, 30, 40)
FAINT: Color = (222, 219, 214)
MUTED: Color = (112, 106, 116)
LINES: tuple[Color, ...] = (
    (198, 188, 178),
    (154, 168, 186),
    (196, 106, 84),
    (70, 112, 158),
    (122, 52, 98),
    (24, 22, 34),
)
"""Light to dark, so that the order shows without colour too."""
OVERSAMPLING = 3
MAX_LINES = len(LINES)


@dataclass(frozen=True)
class ValidationPoint:
    """One validation: the training step, and the loss at each timestep of its grid."""

    step: int
    losses: dict[int, float]


def read_validation(metrics: Path) -> list[ValidationPoint]:
    """The validations of a run's metrics.jsonl, in the order of steps; other records are passed over."""
    points = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line) if line.strip() else {}
        if "validation_loss" in record:
            losses = {int(t): float(loss) for t, loss in record["validation_loss"].items()}
            points.append(ValidationPoint(int(record["step"]), losses))
    return sorted(points, key=lambda point: point.step)


def font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans where it is installed, else the scalable font that Pillow carries."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def draw_loss_plot(points: list[ValidationPoint], width: int, height: int) -> Image.Image:
    """Both panels side by side; says so in words where there are fewer than two validations to draw."""
    size = (width * OVERSAMPLING, height * OVERSAMPLING)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    if len(points) < 2:
        words = "fewer than two validations: no curve yet"
        draw.text((size[0] / 2, size[1] / 2), words, MUTED, font(13 * OVERSAMPLING), anchor="mm")
        return image.resize((width, height), Image.Resampling.LANCZOS)

    values = [loss for point in points for loss in point.losses.values() if math.isfinite(loss) and loss > 0]
    low, high = min(values, default=0.1), max(values, default=1.0)
    half, gap = size[0] / 2, 8 * OVERSAMPLING
    left, right = (0.0, 0.0, half - gap, size[1]), (half + gap, 0.0, size[0], size[1])

    shown = _spread(points, MAX_LINES)
    timesteps = sorted({t for point in points for t in point.losses})
    panel = _Panel(draw, left, (0, max(timesteps)), (low, high), "timestep (0 = least noise, 999 = pure noise)")
    panel.frame("loss by timestep, as training goes on", [*range(0, 900, 200), max(timesteps)])
    panel.lines([(f"step {p.step}", [(t, p.losses[t]) for t in sorted(p.losses)]) for p in shown])

    kept = _spread(timesteps, MAX_LINES)
    last = points[-1].step
    panel = _Panel(draw, right, (points[0].step, last), (low, high), "training step")
    panel.frame("loss over training, at each timestep", _linear_ticks(points[0].step, last))
    panel.lines([(f"t = {t}", [(p.step, p.losses[t]) for p in points if t in p.losses]) for t in kept])
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _spread(items: list[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly apart, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def _linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five of them."""
    span = max(high - low, 1)
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= 6)
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten; powers of ten alone where that would be many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d * 1.001 and m * 10.0**d <= high * 1.001]


@dataclass
class _Panel:
    """One pair of axes inside `box` (left, top, right, bottom), x linear and y logarithmic."""

    draw: ImageDraw.ImageDraw
    box: tuple[float, float, float, float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_title: str

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        s = OVERSAMPLING
        self.inner = (left + 62 * s, top + 34 * s, right - 74 * s, bottom - 46 * s)
        low, high = self.y_range
        self.y_range = (low / 1.25, high * 1.25)

    def at(self, x: float, y: float) -> Point:
        left, top, right, bottom = self.inner
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across = (x - x0) / max(x1 - x0, 1e-9)
        up = math.log(min(max(y, y0), y1) / y0) / math.log(y1 / y0)
        return left + across * (right - left), bottom - up * (bottom - top)

    def frame(self, title: str, ticks: list[float]) -> None:
        s, draw = OVERSAMPLING, self.draw
        left, top, right, bottom = self.inner
        small = font(11 * s)
        for value in _log_ticks(*self.y_range):
            y = self.at(self.x_range[0], value)[1]
            draw.line((left, y, right, y), FAINT, s)
            draw.text((left - 7 * s, y), f"{value:g}", MUTED, small, anchor="rm")
        for value in ticks:
            x = self.at(value, 1)[0]
            draw.line((x, bottom, x, bottom + 4 * s), MUTED, s)
            draw.text((x, bottom + 7 * s), f"{value:g}", MUTED, small, anchor="mt")
        draw.line((left, top, left, bottom, right, bottom), MUTED, s)
        draw.text((left, self.box[1] + 4 * s), title, INK, font(13 * s, bold=True))
        draw.text(((left + right) / 2, bottom + 25 * s), self.x_title, INK, small, anchor="mt")
        self._upright("mean squared error, unweighted", small)

    def _upright(self, text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
        width, height = round(face.getlength(text)) + 8, 16 * OVERSAMPLING
        label = Image.new("L", (width, height), 0)
        ImageDraw.Draw(label).text((width / 2, height / 2), text, 255, face, anchor="mm")
        label = label.rotate(90, expand=True)
        middle = (self.inner[1] + self.inner[3]) / 2
        corner = (round(self.box[0]), round(middle - width / 2))
        self.draw.bitmap(corner, label, fill=INK)

    def lines(self, series: list[tuple[str, list[Point]]]) -> None:
        series = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in series]
        series = [(name, points) for name, points in series if points]
        colors = LINES[MAX_LINES - len(series) :]
        ends = []
        for k, ((name, points), color) in enumerate(zip(series, colors, strict=True)):
            path = [self.at(x, y) for x, y in points]
            self.draw.line([xy for point in path for xy in point], color, round(2.2 * OVERSAMPLING), joint="curve")
            for point in _spread(path, 14):
                self._marker(point, k, color)
            ends.append((path[-1][1], name, color))
        self._labels(ends)

    def _marker(self, point: Point, shape: int, color: Color) -> None:
        (x, y), r = point, 3.6 * OVERSAMPLING
        if shape % 3 == 0:
            self.draw.ellipse((x - r, y - r, x + r, y + r), color)
        elif shape % 3 == 1:
            self.draw.rectangle((x - r, y - r, x + r, y + r), color)
        else:
            self.draw.polygon([(x, y - 1.3 * r), (x + 1.2 * r, y + r), (x - 1.2 * r, y + r)], color)

    def _labels(self, ends: list[tuple[float, str, Color]]) -> None:
        """Names where the lines end, pushed apart so that none covers another."""
        pitch, place = 14.0 * OVERSAMPLING, -math.inf
        heights = []
        for y, _, _ in sorted(ends):
            place = max(y, place + pitch)
            heights.append(place)
        overrun = max(0.0, heights[-1] - self.inner[3])
        for height, (y, name, color) in zip(heights, sorted(ends), strict=True):
            x = self.inner[2]
            target = (x + 13 * OVERSAMPLING, height - overrun)
            self.draw.line((x + 5 * OVERSAMPLING, y, *target), color, OVERSAMPLING)
            self.draw.text((target[0] + 4 * OVERSAMPLING, target[1]), name, INK, font(11 * OVERSAMPLING), anchor="lm")
