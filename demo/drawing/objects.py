"""Things: one in the middle of a plain background, in a colour that its tag names.

Frame: the thing stands in the square from (-1, -1) to (1, 1). Each painter gets the colour and paints; `OBJECTS` says
which colours a thing comes in.
"""

import math
from collections.abc import Callable
from random import Random

from .pen import HUES, INK, Color, Pen, Point, darker, lighter, spline
from .scenery import plain_backdrop

__all__ = ["OBJECTS", "draw_object"]

WHITE: Color = (255, 255, 255)


def _shine(pen: Pen, points: list[Point], width: float = 1.6) -> None:
    pen.stroke(points, WHITE, width)


def apple(pen: Pen, color: Color) -> None:
    body = [(0, -0.42), (0.5, -0.56), (0.84, -0.1), (0.6, 0.65), (0.2, 0.82), (0, 0.74)]
    pen.blob(body + [(-x, y) for x, y in reversed(body[1:-1])], color)
    pen.blob([(0.45, -0.3), (0.74, 0), (0.5, 0.6), (0.15, 0.75), (0.4, 0.2)], darker(color), 0)
    _shine(pen, [(-0.56, 0.1), (-0.54, -0.18), (-0.38, -0.34)], 2)
    pen.stroke([(0, -0.42), (0.04, -0.68), (0.14, -0.86)], (100, 60, 40), 2.2)
    pen.blob([(0.1, -0.6), (0.42, -0.92), (0.72, -0.78), (0.44, -0.56)], HUES["green"])


def cat(pen: Pen, color: Color) -> None:
    pen.outlined_stroke([(0.5, 0.8), (0.95, 0.6), (0.86, 0.05)], color, 0.17)
    pen.blob([(-0.5, 0.95), (-0.45, 0.2), (0, 0.0), (0.45, 0.2), (0.5, 0.95)], color)
    for side in (-1, 1):
        pen.polygon([(side * 0.18, -0.65), (side * 0.62, -1.0), (side * 0.66, -0.3)], color)
        pen.polygon([(side * 0.36, -0.66), (side * 0.55, -0.82), (side * 0.57, -0.5)], (250, 170, 180), 0)
    pen.ellipse(0, -0.25, 0.68, 0.52, color)
    for side in (-1, 1):
        pen.ellipse(side * 0.28, -0.3, 0.13, 0.16, (250, 226, 80), 0.7)
        pen.ellipse(side * 0.28, -0.3, 0.05, 0.13, INK, 0)
        pen.stroke([(side * 0.5, -0.05), (side * 0.85, -0.12)], INK, 0.6, smooth=False)
    pen.ellipse(0, -0.1, 0.07, 0.05, (246, 120, 140), 0.4)
    pen.stroke([(-0.14, 0.06), (-0.05, 0.04), (0, -0.06), (0.05, 0.04), (0.14, 0.06)], INK, 0.8)
    pen.ellipse(-0.18, 0.92, 0.16, 0.1, lighter(color, 0.35), 0.8)
    pen.ellipse(0.18, 0.92, 0.16, 0.1, lighter(color, 0.35), 0.8)


def car(pen: Pen, color: Color) -> None:
    pen.blob([(-0.55, -0.1), (-0.4, -0.56), (0.25, -0.58), (0.55, -0.1)], color)
    pen.polygon([(-0.42, -0.12), (-0.3, -0.45), (-0.03, -0.45), (-0.03, -0.12)], (180, 224, 246), 0.8)
    pen.polygon([(0.06, -0.12), (0.06, -0.45), (0.24, -0.45), (0.42, -0.12)], (180, 224, 246), 0.8)
    pen.blob([(-0.98, 0.34), (-0.95, -0.02), (-0.5, -0.14), (0.5, -0.14), (0.95, 0.02), (1.0, 0.34), (0, 0.38)], color)
    pen.box(-0.9, 0.2, 0.93, 0.34, darker(color), 0)
    pen.ellipse(0.88, 0.08, 0.08, 0.08, (255, 240, 140), 0.6)
    for x in (-0.52, 0.54):
        pen.ellipse(x, 0.38, 0.24, 0.24, (50, 48, 56))
        pen.ellipse(x, 0.38, 0.1, 0.1, (220, 220, 226), 0)


def sword(pen: Pen, color: Color) -> None:
    at = pen.placed(0, 0, 1.0, 45)
    at.polygon([(-0.14, 0.4), (-0.14, -0.85), (0, -1.15), (0.14, -0.85), (0.14, 0.4)], (222, 230, 240))
    at.polygon([(0.02, 0.4), (0.02, -1.05), (0.14, -0.85), (0.14, 0.4)], (160, 174, 196), 0)
    at.box(-0.42, 0.38, 0.42, 0.54, (248, 204, 70))
    at.box(-0.1, 0.54, 0.1, 0.98, color)
    at.ellipse(0, 1.05, 0.15, 0.15, (248, 204, 70))


def umbrella(pen: Pen, color: Color) -> None:
    pen.stroke([(0, -0.9), (0, 0.7), (0.14, 0.9), (0.32, 0.84), (0.34, 0.68)], INK, 3)
    pen.stroke([(0, -0.9), (0, 0.7), (0.14, 0.9), (0.32, 0.84), (0.34, 0.68)], (200, 150, 90), 1.4)
    angles = [math.pi * (1 + k / 12) for k in range(13)]
    dome = [(0.96 * math.cos(a), 0.12 + 0.92 * math.sin(a)) for a in angles]
    hem = [(0.64, -0.02), (0.32, 0.12), (0, -0.02), (-0.32, 0.12), (-0.64, -0.02)]
    pen.polygon(dome + hem, color)
    pen.polygon([(0, -0.8), (0.32, 0.12), (0, -0.02), (-0.32, 0.12)], lighter(color, 0.4), 0.8)
    pen.polygon([(0.1, -0.78), (0.78, -0.4), (0.94, 0.1), (0.64, -0.02)], darker(color), 0.8)


def flower(pen: Pen, color: Color) -> None:
    pen.outlined_stroke([(0, 0), (0.05, 0.5), (0, 0.98)], HUES["green"], 0.1)
    pen.blob([(0.03, 0.75), (0.3, 0.4), (0.66, 0.4), (0.4, 0.72)], HUES["green"])
    for k in range(6):
        a = math.tau * k / 6 + 0.3
        pen.ellipse(0.38 * math.cos(a), -0.3 + 0.38 * math.sin(a), 0.28, 0.28, color)
    pen.ellipse(0, -0.3, 0.24, 0.24, (255, 222, 80) if color != HUES["yellow"] else (150, 90, 40))


def fish(pen: Pen, color: Color) -> None:
    pen.polygon([(0.5, 0), (0.98, -0.5), (0.86, 0), (0.98, 0.5)], darker(color))
    pen.polygon([(-0.2, -0.4), (0.2, -0.78), (0.35, -0.3)], darker(color))
    pen.blob([(-0.95, 0.05), (-0.5, -0.45), (0.1, -0.48), (0.62, 0), (0.1, 0.48), (-0.5, 0.5)], color)
    for x in (-0.08, 0.2):
        pen.stroke([(x, -0.3), (x + 0.1, 0), (x, 0.3)], lighter(color, 0.45), 1.4)
    pen.ellipse(-0.55, -0.08, 0.14, 0.15, WHITE, 0.7)
    pen.ellipse(-0.57, -0.07, 0.07, 0.09, INK, 0)


def book(pen: Pen, color: Color) -> None:
    at = pen.placed(0, 0, 1.0, -12)
    at.polygon([(-0.62, -0.75), (0.55, -0.75), (0.7, -0.6), (0.7, 0.86), (-0.48, 0.86), (-0.62, 0.72)], WHITE)
    at.box(-0.7, -0.85, 0.5, 0.7, color)
    at.box(-0.7, -0.85, -0.5, 0.7, darker(color))
    at.box(-0.3, -0.5, 0.32, -0.2, lighter(color, 0.7), 0.7)
    at.stroke([(-0.22, 0.1), (0.26, 0.1)], lighter(color, 0.5), 1.2, smooth=False)


def mug(pen: Pen, color: Color) -> None:
    ring = [(0.5, -0.25), (0.95, -0.3), (0.95, 0.4), (0.5, 0.42)]
    pen.outlined_stroke(ring, color, 0.16)
    pen.polygon([(-0.62, -0.45), (0.58, -0.45), (0.52, 0.68), (0.42, 0.78), (-0.44, 0.78), (-0.54, 0.68)], color)
    pen.polygon([(0.2, -0.4), (0.54, -0.4), (0.46, 0.7), (0.26, 0.72)], darker(color), 0)
    pen.ellipse(-0.02, -0.45, 0.6, 0.16, (110, 66, 40))
    for x in (-0.25, 0.15):
        pen.stroke([(x, -0.68), (x + 0.08, -0.8), (x, -0.9), (x + 0.06, -1.0)], (170, 170, 180), 1.2)


def heart(pen: Pen, color: Color) -> None:
    lobe: list[Point] = [(0, -0.38), (0.2, -0.7), (0.56, -0.8), (0.9, -0.5), (0.86, -0.06), (0.5, 0.44), (0, 0.86)]
    half = spline(lobe, closed=False)
    pen.polygon(half + [(-x, y) for x, y in reversed(half[1:-1])], color)
    _shine(pen, [(-0.66, -0.2), (-0.62, -0.46), (-0.42, -0.58)], 2.2)


def star(pen: Pen, color: Color) -> None:
    points = [
        ((0.98, 0.44)[k % 2] * math.sin(math.pi * k / 5), -(0.98, 0.44)[k % 2] * math.cos(math.pi * k / 5))
        for k in range(10)
    ]
    pen.polygon(points, color)
    pen.polygon([points[0], points[1], points[2], points[3], (0, 0)], lighter(color, 0.35), 0)


def house(pen: Pen, color: Color) -> None:
    pen.box(0.3, -0.85, 0.52, -0.3, (170, 110, 90))
    pen.box(-0.7, -0.15, 0.7, 0.85, (252, 240, 214))
    pen.polygon([(-0.95, -0.12), (0, -0.95), (0.95, -0.12)], color)
    pen.box(-0.18, 0.3, 0.18, 0.85, (150, 96, 60))
    for x in (-0.5, 0.3):
        pen.box(x, 0.05, x + 0.24, 0.3, (170, 216, 244))


def tree(pen: Pen, color: Color) -> None:
    pen.box(-0.14, 0.2, 0.14, 0.98, (128, 82, 50))
    pen.blob([(-0.82, 0.0), (-0.6, -0.6), (0, -0.95), (0.6, -0.6), (0.82, 0.0), (0.4, 0.36), (-0.4, 0.36)], color)
    pen.blob([(0.2, 0.25), (0.7, 0.0), (0.58, -0.4), (0.4, -0.05)], darker(color), 0)
    pen.ellipse(-0.25, -0.5, 0.24, 0.16, lighter(color, 0.35), 0)


def mushroom(pen: Pen, color: Color) -> None:
    pen.blob([(-0.28, 0.0), (0.28, 0.0), (0.38, 0.85), (-0.38, 0.85)], (250, 238, 216))
    pen.blob([(-0.92, 0.1), (-0.7, -0.55), (0, -0.85), (0.7, -0.55), (0.92, 0.1), (0, 0.22)], color)
    for x, y, r in ((-0.45, -0.25, 0.16), (0.1, -0.5, 0.17), (0.5, -0.1, 0.14)):
        pen.ellipse(x, y, r, r * 0.85, WHITE, 0)


def balloon(pen: Pen, color: Color) -> None:
    pen.stroke([(0, 0.4), (0.12, 0.65), (-0.06, 0.98)], INK, 1)
    pen.polygon([(-0.1, 0.5), (0, 0.32), (0.1, 0.5)], color)
    pen.ellipse(0, -0.28, 0.58, 0.68, color)
    _shine(pen, [(-0.34, -0.3), (-0.3, -0.6), (-0.14, -0.74)], 2)


def cake(pen: Pen, color: Color) -> None:
    pen.box(-0.8, 0.0, 0.8, 0.8, (240, 206, 150))
    pen.box(-0.8, 0.36, 0.8, 0.5, color, 0.6)
    icing = [(-0.84, -0.2), (0.84, -0.2), (0.84, 0.1), (0.6, 0.24), (0.36, 0.06), (0.1, 0.26), (-0.16, 0.06),
             (-0.42, 0.24), (-0.64, 0.06), (-0.84, 0.16)]  # fmt: skip
    pen.polygon(icing, lighter(color, 0.55))
    pen.blob([(-0.18, -0.3), (0, -0.62), (0.2, -0.3), (0, -0.12)], HUES["red"])
    pen.blob([(-0.12, -0.5), (0, -0.72), (0.14, -0.5), (0, -0.46)], HUES["green"], 0.7)


Painter = Callable[[Pen, Color], None]

OBJECTS: dict[Painter, tuple[str, ...]] = {
    apple: ("red", "green", "yellow"),
    cat: ("black", "white", "orange", "grey"),
    car: ("red", "blue", "yellow", "green", "black"),
    sword: ("red", "blue", "purple"),
    umbrella: ("red", "blue", "yellow", "pink"),
    flower: ("red", "yellow", "pink", "blue", "white"),
    fish: ("orange", "blue", "red", "aqua"),
    book: ("red", "blue", "green", "brown"),
    mug: ("white", "red", "blue", "green"),
    heart: ("red", "pink", "blue", "black"),
    star: ("yellow", "blue", "red"),
    house: ("red", "blue", "brown"),
    tree: ("green", "pink", "orange"),
    mushroom: ("red", "purple", "brown"),
    balloon: ("red", "blue", "yellow", "green", "pink"),
    cake: ("pink", "brown", "yellow"),
}
"""Painter → the colours that the thing comes in. The tag is the painter's name."""


def draw_object(pen: Pen, rng: Random) -> list[str]:
    """Fills a fresh pen's canvas with one thing on a plain background and returns its tags."""
    painter = rng.choice(list(OBJECTS))
    name = rng.choice(OBJECTS[painter])
    background = plain_backdrop(pen, rng)
    if f"{name} background" in background:
        background = plain_backdrop(pen, rng, "white" if name != "white" else "blue")
    w, h = pen.size
    at = pen.placed(
        w / 2 + rng.uniform(-0.05, 0.05), h / 2 + rng.uniform(-0.04, 0.04), rng.uniform(0.34, 0.42), rng.uniform(-9, 9)
    )
    if painter is not cat or name != "black" or "black background" not in background:
        painter(at, HUES[name])
    what = painter.__name__
    genre = "animal focus" if painter in (cat, fish) else "still life"
    return ["no humans", what, f"{name} {what}", genre, *background]
