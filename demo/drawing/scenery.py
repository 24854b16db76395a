"""Landscapes and rooms, as pictures of their own and as what stands behind a character.

Each painter fills the whole canvas of a fresh pen (unit = the shorter side) and returns the tags of what it drew, place
first. `SCENES` are pictures of their own; `BACKDROPS` are quiet enough to stand behind somebody.
"""

import math
from collections.abc import Callable
from random import Random

from .pen import HUES, INK, Color, Pen, darker, lighter, mix

__all__ = ["BACKDROPS", "SCENES", "plain_backdrop"]

Painter = Callable[[Pen, Random], list[str]]

DAY_SKY: tuple[Color, Color] = ((86, 170, 240), (196, 230, 250))
NIGHT_SKY: tuple[Color, Color] = ((10, 14, 44), (40, 52, 110))
SUNSET_SKY: tuple[Color, Color] = ((120, 60, 140), (255, 170, 80))

PLAIN: dict[str, Color] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (150, 150, 156),
    "pink": (252, 206, 220),
    "blue": (150, 196, 240),
    "yellow": (252, 232, 150),
    "green": (174, 222, 168),
    "red": (208, 60, 66),
    "purple": (188, 160, 222),
}


def plain_backdrop(pen: Pen, rng: Random, color: str | None = None) -> list[str]:
    """One flat colour, white most often, as in tagged collections."""
    names = list(PLAIN)
    name = color or rng.choices(names, weights=[6, 2.4, 1.4, 1.3, 1.6, 1.2, 1.2, 0.8, 1.1])[0]
    pen.backdrop(PLAIN[name])
    return ["simple background", f"{name} background"]


# -- pieces of a landscape ------------------------------------------------------------------------------------------


def _cloud(pen: Pen, x: float, y: float, scale: float, color: Color = (255, 255, 255)) -> None:
    at = pen.placed(x, y, scale)
    for dx, dy, r in ((-0.55, 0.05, 0.32), (0.55, 0.05, 0.34), (-0.15, -0.2, 0.42), (0.25, -0.1, 0.36)):
        at.ellipse(dx, dy, r, r * 0.8, color, 0)
    at.box(-0.6, 0.05, 0.6, 0.33, color, 0)


def _clouds(pen: Pen, rng: Random, low: float, count: int, color: Color = (255, 255, 255)) -> None:
    w, h = pen.size
    for _ in range(count):
        _cloud(pen, rng.uniform(0, w), rng.uniform(0.06, low) * h, rng.uniform(0.13, 0.24), color)


def _stars(pen: Pen, rng: Random, low: float = 0.6, count: int = 22) -> None:
    w, h = pen.size
    for _ in range(count):
        x, y, r = rng.uniform(0, w), rng.uniform(0, low) * h, rng.choice((0.008, 0.011, 0.017))
        pen.ellipse(x, y, r, r, (255, 250, 214), 0)


def _moon(pen: Pen, rng: Random, crescent: bool | None = None) -> list[str]:
    w, h = pen.size
    x, y, r = w * rng.choice((0.22, 0.5, 0.78)), h * rng.uniform(0.16, 0.24), rng.uniform(0.1, 0.14)
    pen.ellipse(x, y, r * 1.35, r * 1.35, mix(NIGHT_SKY[0], (250, 236, 170), 0.18), 0)
    pen.ellipse(x, y, r, r, (252, 240, 186), 0)
    if crescent if crescent is not None else rng.random() < 0.5:
        pen.ellipse(x + r * 0.45, y - r * 0.15, r * 0.86, r * 0.86, mix(*NIGHT_SKY, 0.25), 0)
        return ["moon", "crescent moon"]
    pen.ellipse(x - r * 0.3, y + r * 0.2, r * 0.22, r * 0.22, (232, 214, 150), 0)
    return ["moon", "full moon"]


def _sun(pen: Pen, x: float, y: float, r: float, color: Color = (255, 226, 92)) -> None:
    for k in range(12):
        a = math.pi * k / 6
        pen.stroke([(x + math.cos(a) * r * f, y + math.sin(a) * r * f) for f in (1.3, 1.65)], color, 1.1, smooth=False)
    pen.ellipse(x, y, r, r, color, 0)


def _hill(pen: Pen, rng: Random, y: float, amplitude: float, color: Color, outline: float = 0.8) -> None:
    w, h = pen.size
    phase, waves = rng.uniform(0, 6.28), rng.uniform(0.7, 1.3)
    top = [(w * k / 16, (y + amplitude * math.sin(phase + waves * 6.28 * k / 16)) * h) for k in range(-1, 18)]
    pen.polygon([*top, (w * 1.1, h * 1.1), (-w * 0.1, h * 1.1)], color, outline)


def _mountain(pen: Pen, x: float, base: float, width: float, height: float, rock: Color, snow: Color) -> None:
    at = pen.placed(x, base)
    at.polygon([(-width, 0), (0, -height), (width, 0)], rock)
    at.polygon([(0, -height), (width, 0), (width * 0.25, 0), (width * 0.1, -height * 0.5)], darker(rock), 0)
    cap = [(0, -1), (0.36, -0.64), (0.18, -0.7), (0.04, -0.58), (-0.14, -0.7), (-0.36, -0.64)]
    at.polygon([(px * width, py * height) for px, py in cap], snow)


def _round_tree(pen: Pen, x: float, y: float, scale: float, leaf: Color, trunk: Color = (122, 78, 48)) -> None:
    at = pen.placed(x, y, scale)
    at.box(-0.1, -0.6, 0.1, 0.02, trunk)
    crown = [(-0.5, -0.72), (-0.42, -1.1), (0, -1.35), (0.42, -1.1), (0.5, -0.72), (0.2, -0.5), (-0.2, -0.5)]
    at.blob(crown, leaf)
    at.ellipse(-0.12, -1.05, 0.2, 0.14, lighter(leaf, 0.3), 0)


def _fir(pen: Pen, x: float, y: float, scale: float, leaf: Color, trunk: Color = (104, 66, 44)) -> None:
    at = pen.placed(x, y, scale)
    at.box(-0.08, -0.3, 0.08, 0.02, trunk)
    for level, half in ((-0.25, 0.46), (-0.62, 0.37), (-0.98, 0.27)):
        at.polygon([(-half, level), (0, level - 0.62), (half, level)], leaf)
        at.polygon([(half, level), (0, level - 0.62), (half * 0.25, level)], darker(leaf, 0.2), 0)


def _building(
    pen: Pen, rng: Random, x: float, base: float, width: float, height: float, wall: Color, lit: bool
) -> None:
    pen.box(x, base - height, x + width, base + 0.05, wall)
    columns, rows = max(2, round(width / 0.085)), max(2, round(height / 0.11))
    for row in range(rows):
        for column in range(columns):
            on = rng.random() < (0.55 if lit else 1.0)
            glass = ((255, 222, 110) if on else darker(wall, 0.4)) if lit else (186, 224, 244)
            left = x + width * (column + 0.24) / columns
            top = base - height + height * (row + 0.25) / rows
            pen.box(left, top, left + width * 0.52 / columns, top + height * 0.5 / rows, glass, 0)


# -- scenes ---------------------------------------------------------------------------------------------------------


def _sky(pen: Pen, rng: Random, horizon: float) -> tuple[str, list[str]]:
    """Paints a sky at a time of day: (time, tags)."""
    time = rng.choice(("day", "day", "night", "night", "sunset"))
    w, h = pen.size
    if time == "day":
        pen.backdrop(*DAY_SKY, horizon=horizon)
        if rng.random() < 0.5:
            _sun(pen, w * rng.choice((0.2, 0.8)), h * 0.17, 0.09)
            _clouds(pen, rng, horizon * 0.6, 2)
            return time, ["day", "blue sky", "cloud", "sun"]
        _clouds(pen, rng, horizon * 0.7, 4)
        return time, ["day", "blue sky", "cloud"]
    if time == "night":
        pen.backdrop(*NIGHT_SKY, horizon=horizon)
        _stars(pen, rng, horizon)
        return time, ["night", "night sky", "star (sky)", *_moon(pen, rng)]
    pen.backdrop(*SUNSET_SKY, horizon=horizon)
    x = w * rng.uniform(0.3, 0.7)
    pen.ellipse(x, h * (horizon - 0.1), 0.2, 0.2, (255, 204, 110), 0)
    pen.ellipse(x, h * (horizon - 0.1), 0.15, 0.15, (255, 240, 190), 0)
    return time, ["sunset", "orange sky", "sun"]


def _in_light(color: Color, time: str) -> Color:
    """A colour as it looks at that time of day."""
    if time == "night":
        return mix(darker(color, 0.35), (16, 20, 60), 0.5)
    return mix(color, (150, 60, 80), 0.38) if time == "sunset" else color


def mountain(pen: Pen, rng: Random) -> list[str]:
    """Snow-capped peaks behind a meadow."""
    time, tags = _sky(pen, rng, 0.75)
    w, h = pen.size
    rock, snow = _in_light((112, 124, 158), time), _in_light((250, 250, 255), time)
    _mountain(pen, w * rng.uniform(0.1, 0.3), 0.8 * h, 0.4 * w, 0.34 * h, mix(rock, snow, 0.25), snow)
    _mountain(pen, w * rng.uniform(0.5, 0.75), 0.8 * h, 0.48 * w, 0.48 * h, rock, snow)
    _hill(pen, rng, 0.78, 0.03, _in_light((110, 186, 84), time))
    for _ in range(rng.randint(2, 5)):
        _fir(pen, rng.uniform(0.05, 0.95) * w, rng.uniform(0.86, 0.98) * h, 0.15, _in_light((44, 124, 78), time))
    return ["mountain", "nature", *tags]


def sea(pen: Pen, rng: Random) -> list[str]:
    """Open water, with a boat, an island or a beach."""
    time, tags = _sky(pen, rng, 0.56)
    w, h = pen.size
    water = _in_light((36, 132, 206), time)
    pen.box(-0.1, 0.55 * h, w + 0.1, h + 0.1, water, 0)
    pen.box(-0.1, 0.55 * h, w + 0.1, 0.6 * h, lighter(water, 0.2), 0)
    glint = {"day": (214, 240, 252), "night": (214, 206, 160), "sunset": (255, 206, 130)}[time]
    for _ in range(11):
        x, y = rng.uniform(0, w), h * rng.uniform(0.6, 0.97)
        pen.stroke([(x - 0.06, y), (x, y - 0.012), (x + 0.06, y)], mix(water, glint, 0.75), 0.8)
    what = rng.choice(("boat", "island", "beach", None))
    if what == "boat":
        at = pen.placed(w * rng.uniform(0.3, 0.7), 0.64 * h, 0.24)
        at.polygon([(0.04, -1.15), (0.04, -0.15), (0.62, -0.15)], _in_light((250, 248, 240), time))
        at.polygon([(-0.04, -0.95), (-0.04, -0.15), (-0.45, -0.15)], _in_light(HUES["red"], time))
        at.polygon([(-0.65, -0.1), (0.7, -0.1), (0.45, 0.25), (-0.45, 0.25)], _in_light(HUES["brown"], time))
    if what == "island":
        at = pen.placed(w * rng.uniform(0.3, 0.7), 0.62 * h, 0.4)
        at.blob([(-0.6, 0.05), (0, -0.2), (0.6, 0.05), (0, 0.14)], _in_light((242, 218, 150), time))
        at.outlined_stroke([(0, -0.1), (0.06, -0.4), (0.0, -0.75)], _in_light((140, 96, 60), time), 0.09)
        for dx, dy in ((-0.42, -0.62), (0.42, -0.62), (-0.3, -0.95), (0.32, -0.93)):
            leaf = _in_light((60, 160, 84), time)
            at.blob([(0, -0.8), (dx * 0.6, dy - 0.06), (dx, dy + 0.06), (dx * 0.5, dy + 0.06)], leaf)
    if what == "beach":
        _hill(pen, rng, 0.86, 0.025, _in_light((246, 224, 160), time))
    return ["ocean", "water", "horizon", *tags, *([what] if what else [])]


def city(pen: Pen, rng: Random) -> list[str]:
    """A skyline above a street."""
    time, tags = _sky(pen, rng, 0.9)
    w, h = pen.size
    walls: list[Color] = [(236, 208, 170), (214, 150, 130), (170, 186, 206), (206, 206, 214), (190, 214, 180)]
    far = mix(_in_light((150, 170, 200), time), NIGHT_SKY[1] if time == "night" else (210, 220, 240), 0.4)
    x = -0.05
    while x < w:
        width = rng.uniform(0.14, 0.22)
        pen.box(x, h * rng.uniform(0.36, 0.55), x + width, h, far, 0)
        x += width
    x = -0.08
    while x < w:
        width = rng.uniform(0.2, 0.3)
        wall = _in_light(rng.choice(walls), time)
        _building(pen, rng, x, 0.88 * h, width, h * rng.uniform(0.25, 0.5), wall, time != "day")
        x += width + 0.015
    pen.box(-0.1, 0.88 * h, w + 0.1, h + 0.1, _in_light((110, 112, 124), time))
    for k in range(6):
        pen.box(w * (k / 5 - 0.06), 0.935 * h, w * (k / 5 + 0.04), 0.955 * h, (236, 226, 170), 0)
    return ["city", "building", "cityscape", *tags]


def forest(pen: Pen, rng: Random) -> list[str]:
    """Trees in two rows and a path between them."""
    time, tags = _sky(pen, rng, 0.8)
    w, h = pen.size
    firs, autumn = rng.random() < 0.5, rng.random() < 0.25
    leaf: Color = (226, 130, 52) if autumn else rng.choice(((60, 150, 76), (92, 176, 72)))
    tree = _fir if firs else _round_tree
    _hill(pen, rng, 0.6, 0.02, _in_light(mix(leaf, (170, 210, 190), 0.4), time))
    for k in range(8):
        tree(pen, w * (k + rng.uniform(0.2, 0.8)) / 8, 0.7 * h, 0.25, _in_light(lighter(leaf, 0.18), time))
    ground = _in_light((196, 160, 84) if autumn else (120, 186, 88), time)
    _hill(pen, rng, 0.7, 0.015, ground)
    path = [(0.46, 0.7), (0.54, 0.7), (0.66, 1.05), (0.3, 1.05)]
    pen.polygon([(x * w, y * h) for x, y in path], _in_light((226, 200, 150), time), 0.7)
    for side, y in ((0.1, 0.92), (0.9, 0.9), (0.24, 0.82), (0.77, 0.8)):
        tree(pen, w * (side + rng.uniform(-0.05, 0.05)), h * y, rng.uniform(0.34, 0.42), _in_light(leaf, time))
    return ["forest", "tree", "nature", *(["autumn"] if autumn else []), *tags]


def field(pen: Pen, rng: Random) -> list[str]:
    """Rolling hills with a house or flowers."""
    time, tags = _sky(pen, rng, 0.75)
    w, h = pen.size
    winter = rng.random() < 0.25
    grass: Color = (240, 246, 252) if winter else (126, 200, 90)
    _hill(pen, rng, 0.62, 0.04, _in_light(darker(grass, 0.12), time))
    _hill(pen, rng, 0.74, 0.03, _in_light(grass, time))
    if rng.random() < 0.5:
        at = pen.placed(w * rng.uniform(0.25, 0.75), 0.8 * h, 0.3)
        at.box(-0.42, -0.5, 0.42, 0.06, _in_light((248, 236, 210), time))
        at.polygon([(-0.56, -0.48), (0, -1.0), (0.56, -0.48)], _in_light(HUES["red"], time))
        at.box(-0.1, -0.28, 0.12, 0.06, _in_light(HUES["brown"], time))
        window = (255, 224, 120) if time == "night" else (170, 216, 240)
        at.box(0.2, -0.36, 0.34, -0.2, window, 0.6)
        return ["field", "house", *(["snow", "winter"] if winter else ["grass"]), *tags]
    if winter:
        for _ in range(3):
            _fir(pen, w * rng.uniform(0.1, 0.9), h * rng.uniform(0.82, 0.95), 0.22, _in_light((70, 130, 110), time))
        return ["field", "snow", "winter", "tree", *tags]
    petals = [_in_light(HUES[name], time) for name in rng.sample(("red", "yellow", "pink", "white", "purple"), 2)]
    for _ in range(26):
        x, y = w * rng.random(), h * rng.uniform(0.8, 0.99)
        pen.ellipse(x, y, 0.028, 0.024, rng.choice(petals), 0.5)
    return ["field", "flower field", "flower", "grass", *tags]


def night_stars(pen: Pen, rng: Random) -> list[str]:
    """A dark sky over a dark hill, and hardly anything else: the low end of the brightness range."""
    pen.backdrop((2, 3, 12), (16, 20, 52))
    _stars(pen, rng, 0.8, 30)
    tags = _moon(pen, rng, crescent=True) if rng.random() < 0.5 else []
    _hill(pen, rng, 0.86, 0.03, (3, 4, 10), 0)
    return ["night", "night sky", "starry sky", "star (sky)", "dark", *tags]


def snow_day(pen: Pen, rng: Random) -> list[str]:
    """White ground under a white sky: the high end of the brightness range."""
    w, h = pen.size
    pen.backdrop((226, 238, 250), (252, 254, 255))
    _hill(pen, rng, 0.66, 0.03, (244, 249, 255), 0.5)
    _hill(pen, rng, 0.78, 0.03, (255, 255, 255), 0.5)
    for _ in range(rng.randint(1, 3)):
        _fir(pen, w * rng.uniform(0.12, 0.88), h * rng.uniform(0.8, 0.92), rng.uniform(0.2, 0.3), (196, 222, 224))
    if rng.random() < 0.5:
        at = pen.placed(w * rng.uniform(0.3, 0.7), h * 0.9, 0.3)
        at.ellipse(0, -0.25, 0.36, 0.33, (255, 255, 255))
        at.ellipse(0, -0.78, 0.26, 0.25, (255, 255, 255))
        at.ellipse(-0.09, -0.82, 0.035, 0.04, INK, 0)
        at.ellipse(0.09, -0.82, 0.035, 0.04, INK, 0)
        at.polygon([(0, -0.78), (0.22, -0.72), (0, -0.7)], HUES["orange"], 0.6)
        return ["snow", "winter", "snowman", "day", "bright", "white theme"]
    return ["snow", "winter", "tree", "day", "bright", "white theme"]


# -- quiet backdrops ------------------------------------------------------------------------------------------------


def day_sky(pen: Pen, rng: Random) -> list[str]:
    """A blue sky with clouds."""
    pen.backdrop(*DAY_SKY)
    _clouds(pen, rng, 0.75, 5)
    return ["outdoors", "day", "sky", "blue sky", "cloud"]


def night_sky(pen: Pen, rng: Random) -> list[str]:
    """A dark sky with the moon and stars."""
    pen.backdrop(*NIGHT_SKY)
    _stars(pen, rng, 0.9, 26)
    return ["outdoors", "night", "night sky", "star (sky)", *_moon(pen, rng)]


def sunset_sky(pen: Pen, rng: Random) -> list[str]:
    """Orange under violet, with the sun low."""
    pen.backdrop(*SUNSET_SKY)
    w, h = pen.size
    pen.ellipse(w * rng.choice((0.2, 0.8)), h * 0.62, 0.16, 0.16, (255, 236, 170), 0)
    return ["outdoors", "sunset", "orange sky"]


def classroom(pen: Pen, rng: Random) -> list[str]:
    """A chalkboard on a cream wall, desks below."""
    w, h = pen.size
    pen.backdrop((246, 232, 200))
    pen.box(0.06 * w, 0.1 * h, 0.94 * w, 0.5 * h, (196, 150, 96))
    pen.box(0.09 * w, 0.13 * h, 0.91 * w, 0.47 * h, (48, 112, 84), 0)
    for _ in range(4):
        x, y = w * rng.uniform(0.12, 0.7), h * rng.uniform(0.17, 0.42)
        pen.stroke([(x, y), (x + 0.06, y - 0.01), (x + 0.13, y)], (206, 230, 214), 0.7)
    pen.box(-0.1, 0.74 * h, w + 0.1, h + 0.1, (214, 172, 118))
    for x in (0.02, 0.72):
        pen.box(x * w, 0.68 * h, (x + 0.26) * w, 0.76 * h, (232, 192, 132))
    return ["indoors", "classroom", "chalkboard"]


def woods(pen: Pen, rng: Random) -> list[str]:
    """Tree trunks and leaves in green light."""
    w, h = pen.size
    pen.backdrop((190, 230, 160), (120, 190, 110))
    for k in range(5):
        x, half = w * (k + rng.uniform(0.3, 0.7)) / 5, rng.uniform(0.03, 0.055)
        pen.box(x - half, -0.1, x + half, 0.85 * h, (130, 92, 60), 0.7)
    for _ in range(9):
        pen.ellipse(w * rng.random(), h * rng.uniform(-0.02, 0.16), 0.16, 0.1, (66, 154, 78), 0)
    _hill(pen, rng, 0.82, 0.02, (92, 168, 80), 0.7)
    return ["outdoors", "day", "forest", "tree"]


def seaside(pen: Pen, rng: Random) -> list[str]:
    """Sky, sea and sand in three bands."""
    w, h = pen.size
    pen.backdrop(*DAY_SKY, horizon=0.55)
    _clouds(pen, rng, 0.4, 3)
    pen.box(-0.1, 0.52 * h, w + 0.1, 0.8 * h, (44, 140, 214), 0)
    pen.box(-0.1, 0.52 * h, w + 0.1, 0.57 * h, (96, 176, 232), 0)
    _hill(pen, rng, 0.79, 0.015, (246, 224, 160), 0.7)
    return ["outdoors", "day", "ocean", "beach", "blue sky"]


def petals(pen: Pen, rng: Random) -> list[str]:
    """Cherry petals on pink."""
    w, h = pen.size
    pen.backdrop((255, 226, 234), (250, 190, 210))
    for _ in range(26):
        at = pen.placed(w * rng.random(), h * rng.random(), 0.05, rng.uniform(0, 360))
        at.blob([(-0.7, 0), (0, -0.45), (0.8, 0), (0, 0.45)], rng.choice(((255, 250, 252), (238, 130, 166))), 0)
    return ["cherry blossoms", "petals", "pink background"]


SCENES: dict[Painter, float] = {
    mountain: 3, sea: 3, city: 3, forest: 2.5, field: 2.5, night_stars: 1.4, snow_day: 1.2,
}  # fmt: skip
"""Painter → how often."""

BACKDROPS: dict[Painter, float] = {
    plain_backdrop: 16,
    day_sky: 3,
    night_sky: 3,
    sunset_sky: 0.7,
    classroom: 0.8,
    woods: 0.7,
    seaside: 0.7,
    petals: 0.5,
}
"""Painter → how often."""
