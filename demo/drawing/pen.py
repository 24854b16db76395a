"""A pen that draws bold-outlined flat shapes on an oversampled canvas, and the palette that all pictures share.

Owns geometry and antialiasing, knows nothing of what is drawn. Points are (x, y) in the pen's own frame, whose origin,
unit and tilt `placed` chooses; one canvas is shared by every pen placed on it. Colours are (r, g, b) in 0..255.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["HUES", "INK", "Color", "Pen", "Point", "blank_pen", "darker", "lighter", "mix", "spline"]

Color = tuple[int, int, int]
Point = tuple[float, float]

OVERSAMPLING = 4
INK: Color = (44, 32, 52)
OUTLINE_SHARE = 0.019
"""Outline width as a share of the canvas' shorter side: 1.2 px when that side is 64 px."""

HUES: dict[str, Color] = {
    "red": (216, 48, 52),
    "orange": (242, 140, 40),
    "yellow": (250, 212, 64),
    "green": (62, 166, 84),
    "aqua": (64, 202, 206),
    "blue": (52, 98, 214),
    "purple": (140, 76, 192),
    "pink": (246, 140, 178),
    "brown": (134, 84, 50),
    "grey": (128, 128, 128),
    "white": (248, 248, 250),
    "black": (52, 48, 60),
}

_SPLINE_STEPS = 7
_T = np.linspace(0, 1, _SPLINE_STEPS, endpoint=False)[:, None]
# Catmull-Rom: the weight of the points before, at, after and two after, at each t between two points.
_SPLINE = 0.5 * np.concatenate(
    [-_T + 2 * _T**2 - _T**3, 2 - 5 * _T**2 + 3 * _T**3, _T + 4 * _T**2 - 3 * _T**3, -(_T**2) + _T**3], axis=1
)


def mix(a: Color, b: Color, share: float) -> Color:
    """`a` moved towards `b` by `share` in 0..1."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


def darker(color: Color, share: float = 0.28) -> Color:
    """The shade tone of a flat colour: darker, and a little towards violet, as shadows are painted."""
    return mix(tuple(round(c * (1 - 0.75 * share)) for c in color), (60, 16, 90), share * 0.35)  # type: ignore[arg-type]


def lighter(color: Color, share: float = 0.4) -> Color:
    """The light tone of a flat colour."""
    return mix(color, (255, 255, 255), share)


def spline(points: list[Point], closed: bool = True) -> list[Point]:
    """A Catmull-Rom curve through the points."""
    p = np.asarray(points, dtype=np.float64)
    if closed:
        ring = np.concatenate([p[-1:], p, p[:2]])
        before, p, after, later = ring[:-3], ring[1:-2], ring[2:-1], ring[3:]
    else:
        ends = np.concatenate([p[:1], p, p[-1:]])
        before, p, after, later = ends[:-3], ends[1:-2], ends[2:-1], ends[3:]
    curve = np.einsum("tk,knd->ntd", _SPLINE, np.stack([before, p, after, later])).reshape(-1, 2)
    if not closed:
        curve = np.concatenate([curve, after[-1:]])
    return [tuple(xy) for xy in curve.tolist()]


@dataclass(frozen=True)
class Pen:
    """A frame on the canvas. `origin`, and `unit` (the length 1), are in oversampled pixels, `tilt` is in degrees."""

    image: Image.Image
    draw: ImageDraw.ImageDraw
    origin: Point
    unit: float
    tilt: float
    line: float
    """Outline width in oversampled pixels."""

    @property
    def size(self) -> Point:
        """(width, height) of the whole canvas in this pen's unit."""
        return self.image.width / self.unit, self.image.height / self.unit

    def placed(self, x: float, y: float, scale: float = 1.0, tilt: float = 0.0, line: float = 1.0) -> "Pen":
        """A pen whose origin is this pen's (x, y) and whose unit is `scale` of this pen's."""
        return replace(
            self,
            origin=self._at([(x, y)])[0],
            unit=self.unit * scale,
            tilt=self.tilt + tilt,
            line=self.line * line,
        )

    def _at(self, points: list[Point]) -> list[Point]:
        cos = math.cos(math.radians(self.tilt)) * self.unit
        sin = math.sin(math.radians(self.tilt)) * self.unit
        ox, oy = self.origin
        return [(ox + x * cos - y * sin, oy + x * sin + y * cos) for x, y in points]

    def polygon(
        self, points: list[Point], fill: Color, outline: float = 1.0, ink: Color = INK, smooth: bool = False
    ) -> None:
        """A filled polygon; `outline` scales the line's width, 0 = none; `smooth`: no corner needs rounding."""
        path = self._at(points)
        self.draw.polygon(path, fill=fill)
        if outline:
            width = max(1, round(self.line * outline))
            self.draw.line([*path, path[0], path[1]], fill=ink, width=width, joint=None if smooth else "curve")

    def blob(self, points: list[Point], fill: Color, outline: float = 1.0, ink: Color = INK) -> None:
        """A filled closed curve through the points."""
        self.polygon(spline(points), fill, outline, ink, smooth=True)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Color, outline: float = 1.0, ink: Color = INK
    ) -> None:
        """A filled ellipse, tilted with the pen."""
        steps = max(12, min(48, int(max(rx, ry) * self.unit / 2)))
        angles = [2 * math.pi * k / steps for k in range(steps)]
        rim = [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]
        self.polygon(rim, fill, outline, ink, smooth=True)

    def box(
        self, left: float, top: float, right: float, bottom: float, fill: Color, outline: float = 1.0, ink: Color = INK
    ) -> None:
        """A filled rectangle, tilted with the pen."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill, outline, ink)

    def stroke(self, points: list[Point], color: Color = INK, width: float = 1.0, smooth: bool = True) -> None:
        """An open line with round ends; `width` in outline widths."""
        path = self._at(spline(points, closed=False) if smooth else points)
        w = max(1, round(self.line * width))
        self.draw.line(path, fill=color, width=w, joint="curve")
        r = (w - 1) / 2
        for x, y in (path[0], path[-1]):
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def outlined_stroke(self, points: list[Point], color: Color, width: float, smooth: bool = True) -> None:
        """A thick line with an outline of ink: limbs, handles, stalks. `width` in the pen's unit."""
        lines = width * self.unit / self.line
        self.stroke(points, INK, lines + 2, smooth)
        self.stroke(points, color, lines, smooth)

    def backdrop(self, top: Color, bottom: Color | None = None, horizon: float = 1.0) -> None:
        """Fills the canvas from its top edge to the share `horizon` of its height, as a vertical gradient."""
        width, height = self.image.size
        end = round(height * horizon)
        if bottom is None or bottom == top:
            self.draw.rectangle((0, 0, width, end), fill=top)
            return
        bands = max(1, end // OVERSAMPLING // 2)
        for k in range(bands):
            y0, y1 = end * k // bands, end * (k + 1) // bands
            self.draw.rectangle((0, y0, width, y1), fill=mix(top, bottom, (k + 0.5) / bands))

    def finished(self) -> Image.Image:
        """The canvas, averaged down to its true size."""
        return self.image.reduce(OVERSAMPLING)


def blank_pen(height: int, width: int, paper: Color = (255, 255, 255)) -> Pen:
    """A pen on a new canvas: origin in the top-left corner, unit = the shorter side."""
    side = min(height, width) * OVERSAMPLING
    image = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), paper)
    return Pen(image, ImageDraw.Draw(image), (0.0, 0.0), float(side), 0.0, side * OUTLINE_SHARE)
