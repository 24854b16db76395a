"""Chibi characters in the style of Japanese animation: big eyes, bold hair, readable at 64 pixels.

A `Character` is what was decided (and so what can be tagged); `draw_character` paints it and `character_tags` names it
in the order of booru collections. Frame: head at the origin, its radius 1, chin at y = 1, feet at y = 3.55.
"""

import math
from dataclasses import dataclass
from random import Random

from .pen import HUES, INK, Color, Pen, Point, darker, lighter, mix, spline

__all__ = ["Character", "character_tags", "draw_character", "random_character"]

HAIR: dict[str, Color] = {
    "blonde": (252, 214, 98),
    "brown": (142, 88, 56),
    "black": (58, 54, 72),
    "red": (206, 52, 50),
    "blue": (70, 124, 226),
    "green": (74, 178, 104),
    "pink": (250, 152, 188),
    "white": (236, 238, 246),
}
EYES: dict[str, Color] = {
    "blue": (48, 110, 230),
    "red": (220, 36, 52),
    "green": (32, 160, 84),
    "yellow": (240, 178, 24),
    "purple": (144, 66, 206),
    "brown": (132, 78, 40),
}
CLOTH: dict[str, Color] = {
    name: HUES[name] for name in ("red", "blue", "green", "yellow", "pink", "purple", "white", "black")
}
SKIN: tuple[Color, ...] = ((255, 228, 208), (255, 218, 190), (226, 172, 132))
GIRL_STYLES = ("long hair", "short hair", "twintails", "ponytail")
BOY_STYLES = ("short hair", "spiked hair")
FACES = ("smile", "open mouth", "closed mouth", "frown", ">_<", "^_^")
OUTFITS = ("school uniform", "dress", "hoodie", "kimono", "sweater")
HEADWEAR = ("hair ribbon", "hair flower", "cat ears", "witch hat", "beret", "headphones", "crown")


@dataclass(frozen=True)
class Character:
    """Everything about a character that shows."""

    girl: bool
    hair_style: str
    hair: str
    eyes: str
    outfit: str
    cloth: str
    face: str
    blush: bool
    bangs: str
    headwear: str | None
    headwear_color: str
    glasses: bool
    waving: bool
    skin: Color


def random_character(rng: Random) -> Character:
    """One character; every combination occurs, some more often, as in real collections."""
    girl = rng.random() < 0.75
    outfit = rng.choices(OUTFITS, weights=[4, 3, 2, 2, 1.5])[0]
    if not girl and outfit == "dress":
        outfit = "hoodie"
    headwear = rng.choice(HEADWEAR) if rng.random() < (0.2 if girl else 0.1) else None
    if not girl and headwear in ("hair ribbon", "hair flower"):
        headwear = "headphones"
    return Character(
        girl=girl,
        hair_style=rng.choices(GIRL_STYLES, weights=[4, 3, 2.5, 2])[0] if girl else rng.choice(BOY_STYLES),
        hair=rng.choice(list(HAIR)),
        eyes=rng.choice(list(EYES)),
        outfit=outfit,
        cloth=rng.choice(list(CLOTH)),
        face=rng.choices(FACES, weights=[6, 3, 2, 0.4, 0.3, 0.5])[0],
        blush=rng.random() < (0.4 if girl else 0.1),
        bangs=rng.choice(("blunt bangs", "parted bangs", "swept bangs")),
        headwear=headwear,
        headwear_color=rng.choice(("red", "blue", "pink", "yellow", "purple", "black")),
        glasses=rng.random() < 0.06,
        waving=rng.random() < 0.06,
        skin=rng.choices(SKIN, weights=[8, 1.5, 0.6])[0],
    )


def character_tags(who: Character, full_body: bool) -> list[str]:
    """Booru order: subject, hair, eyes, clothes, expression; the background's tags come after."""
    tags = ["1girl" if who.girl else "1boy", "solo", who.hair_style, f"{who.hair} hair"]
    if who.bangs == "blunt bangs" and who.hair_style != "spiked hair":
        tags.append("blunt bangs")
    if who.face not in (">_<", "^_^"):
        tags.append(f"{who.eyes} eyes")
    tags.append(who.outfit)
    if who.outfit == "school uniform":
        tags += ["serafuku", "pleated skirt"] if who.girl else ["gakuran"]
    else:
        tags.append(f"{who.cloth} {who.outfit}")
    if who.headwear:
        plain = who.headwear in ("cat ears", "crown")
        tags += [who.headwear] if plain else [who.headwear, f"{who.headwear_color} {who.headwear.split()[-1]}"]
        tags += ["hat"] if who.headwear in ("witch hat", "beret") else []
    tags += ["glasses"] if who.glasses else []
    tags += ["waving"] if who.waving else []
    tags += {"open mouth": ["smile", "open mouth"], "^_^": ["^_^", "closed eyes", "smile"]}.get(who.face, [who.face])
    tags += ["closed eyes"] if who.face == ">_<" else []
    tags += ["blush"] if who.blush else []
    return [*tags, "chibi", "full body"] if full_body else [*tags, "upper body"]


def draw_character(pen: Pen, who: Character, full_body: bool) -> None:
    """Paints from back to front; the hair behind first, the fringe and what is worn on the head last."""
    _hair_behind(pen, who)
    if full_body:
        _legs(pen, who)
    _body(pen, who, full_body)
    _head(pen, who)
    _eyes(pen, who)
    _mouth(pen, who)
    _fringe(pen, who)
    _brows(pen, who)
    if who.glasses:
        _glasses(pen)
    _headwear(pen, who)


def _mirrored(points: list[Point]) -> list[Point]:
    """A right half from the top down, closed by its mirror image."""
    return points + [(-x, y) for x, y in reversed(points) if x]


# -- hair -----------------------------------------------------------------------------------------------------------


def _hair_behind(pen: Pen, who: Character) -> None:
    color = HAIR[who.hair]
    shade = darker(color, 0.3)
    if who.hair_style == "long hair":
        pen.blob(_mirrored([(0, -1.1), (1.05, -0.6), (1.22, 0.5), (1.36, 1.6), (1.18, 2.25), (0.5, 2.1)]), shade)
    elif who.hair_style == "twintails":
        pen.blob(_mirrored([(0, -1), (0.95, -0.6), (1.05, 0.4), (0.7, 0.9)]), shade)
        for side in (-1, 1):
            tail = [(0.85, -0.72), (1.4, -0.85), (1.82, -0.2), (1.85, 0.8), (1.55, 1.75), (1.35, 1.0), (1.15, 0.1)]
            pen.blob([(side * x, y) for x, y in tail], color)
            inner = [(1.5, 0.0), (1.72, 0.5), (1.55, 1.5), (1.42, 0.8)]
            pen.blob([(side * x, y) for x, y in inner], shade, 0)
    elif who.hair_style == "ponytail":
        pen.blob(_mirrored([(0, -1), (0.95, -0.6), (1.02, 0.4), (0.6, 0.8)]), shade)
        tail = [(0.3, -1.0), (0.9, -1.42), (1.6, -1.05), (1.82, 0.0), (1.5, 1.15), (1.3, 1.5), (1.3, 0.3), (0.9, -0.5)]
        pen.blob(tail, color)
        pen.blob([(1.45, -0.5), (1.62, 0.2), (1.42, 1.0), (1.38, 0.1)], shade, 0)
    elif who.girl:
        pen.blob(_mirrored([(0, -1.1), (1.0, -0.7), (1.18, 0.1), (1.12, 0.85), (0.7, 1.05)]), shade)
    else:
        pen.blob(_mirrored([(0, -1.1), (0.95, -0.7), (1.05, 0.05), (0.9, 0.55), (0.4, 0.7)]), shade)


_OUTER: list[Point] = [(-0.96, 0.5), (-1.12, 0.0), (-1.06, -0.6), (-0.68, -1.08), (0.0, -1.27)]
_TIPS: dict[str, list[Point]] = {
    "blunt bangs": [(0.86, 0.5), (0.76, -0.02), (0.5, -0.12), (0.25, -0.02), (0, -0.12), (-0.25, -0.02),
                    (-0.5, -0.12), (-0.76, -0.02), (-0.86, 0.5)],
    "parted bangs": [(0.9, 0.55), (0.78, 0.05), (0.62, -0.12), (0.42, -0.38), (0.12, -0.66), (-0.05, -0.4),
                     (-0.35, -0.06), (-0.62, -0.14), (-0.78, 0.05), (-0.9, 0.55)],
    "swept bangs": [(0.88, 0.5), (0.8, -0.1), (0.55, -0.42), (0.4, -0.05), (0.15, -0.38), (-0.1, 0.02),
                    (-0.35, -0.34), (-0.6, 0.04), (-0.78, -0.15), (-0.88, 0.5)],
}  # fmt: skip


def _fringe(pen: Pen, who: Character) -> None:
    color = HAIR[who.hair]
    top = spline(_OUTER + [(-x, y) for x, y in reversed(_OUTER[:-1])], closed=False)
    if who.hair_style == "spiked hair":
        top = [
            (-1.0, 0.3), (-1.3, -0.15), (-1.08, -0.3), (-1.38, -0.72), (-0.95, -0.82), (-0.95, -1.3), (-0.5, -1.12),
            (-0.15, -1.55), (0.2, -1.18), (0.72, -1.42), (0.78, -0.98), (1.28, -0.95), (1.05, -0.5),
            (1.35, -0.2), (1.0, 0.3),
        ]  # fmt: skip
        tips = _TIPS["swept bangs"]
    else:
        tips = _TIPS[who.bangs]
    pen.polygon(top + tips, color)
    ring = darker(color, 0.22) if who.hair == "white" else lighter(color, 0.5)
    pen.stroke([(-0.72, -0.62), (-0.36, -0.72), (-0.1, -0.73)], ring, 1.9)
    pen.stroke([(0.18, -0.74), (0.4, -0.72)], ring, 1.7)


# -- face -----------------------------------------------------------------------------------------------------------


def _head(pen: Pen, who: Character) -> None:
    if who.girl or who.hair_style == "spiked hair":
        for side in (-1, 1):
            pen.ellipse(side * 0.95, 0.22, 0.14, 0.2, who.skin, 0.8)
    pen.blob(_mirrored([(0, -1.0), (0.8, -0.6), (0.96, 0.1), (0.72, 0.68), (0, 1.0)]), who.skin)
    shade = darker(who.skin, 0.16)
    pen.blob([(-0.82, -0.4), (0.82, -0.4), (0.84, 0.02), (0.3, -0.12), (-0.3, -0.12), (-0.84, 0.02)], shade, 0)
    if who.blush:
        for side in (-1, 1):
            pen.ellipse(side * 0.62, 0.56, 0.19, 0.11, mix(who.skin, (250, 110, 120), 0.55), 0)


def _eyes(pen: Pen, who: Character) -> None:
    for side in (-1, 1):
        x, y = side * 0.44, 0.22
        if who.face == "^_^":
            pen.stroke([(x - 0.24, y + 0.12), (x, y - 0.14), (x + 0.24, y + 0.12)], INK, 1.7)
        elif who.face == ">_<":
            arrow = [(x + side * 0.2, y - 0.2), (x - side * 0.18, y + 0.02), (x + side * 0.2, y + 0.24)]
            pen.stroke(arrow, INK, 1.6, smooth=False)
        else:
            _open_eye(pen, x, y, side, EYES[who.eyes])


def _brows(pen: Pen, who: Character) -> None:
    """Drawn over the fringe, as in animation: a mood must show through any hair."""
    color = darker(HAIR[who.hair], 0.6)
    inner, outer = (-0.4, -0.58) if who.face == "frown" else (-0.52, -0.47)
    for side in (-1, 1):
        x, y = side * 0.44, 0.22
        arc = [(x - side * 0.17, y + inner), (x + side * 0.04, y - 0.56), (x + side * 0.22, y + outer)]
        pen.stroke(arc, color, 0.9)


def _open_eye(pen: Pen, x: float, y: float, side: int, iris: Color) -> None:
    pen.ellipse(x, y, 0.27, 0.36, (255, 255, 255), 0.7)
    pen.ellipse(x, y + 0.02, 0.22, 0.33, darker(iris, 0.42), 0)
    pen.ellipse(x, y + 0.1, 0.2, 0.23, iris, 0)
    pen.ellipse(x, y + 0.2, 0.13, 0.1, lighter(iris, 0.5), 0)
    pen.ellipse(x, y + 0.02, 0.085, 0.13, mix(INK, iris, 0.15), 0)
    lash = [(x - side * 0.28, y - 0.16), (x, y - 0.37), (x + side * 0.28, y - 0.2), (x + side * 0.34, y - 0.06)]
    pen.stroke(lash, INK, 1.9)
    pen.ellipse(x - 0.08, y - 0.13, 0.095, 0.11, (255, 255, 255), 0)
    pen.ellipse(x + 0.09, y + 0.15, 0.05, 0.05, (255, 255, 255), 0)


def _mouth(pen: Pen, who: Character) -> None:
    if who.face == "open mouth":
        pen.blob([(-0.2, 0.63), (0.2, 0.63), (0.13, 0.83), (-0.13, 0.83)], (176, 42, 52), 0.7)
        pen.ellipse(0, 0.81, 0.09, 0.05, (246, 130, 130), 0)
    elif who.face == "frown":
        pen.stroke([(-0.15, 0.76), (0, 0.68), (0.15, 0.76)], INK, 1.0)
    elif who.face == "closed mouth":
        pen.stroke([(-0.09, 0.71), (0.09, 0.71)], INK, 1.0, smooth=False)
    elif who.face == ">_<":
        pen.stroke([(-0.2, 0.7), (-0.1, 0.77), (0, 0.7), (0.1, 0.77), (0.2, 0.7)], INK, 0.9)
    else:
        pen.stroke([(-0.2, 0.65), (0, 0.76), (0.2, 0.65)], INK, 1.1)


def _glasses(pen: Pen) -> None:
    for side in (-1, 1):
        angles = [math.pi * k / 8 for k in range(17)]
        rim = [(side * 0.46 + 0.36 * math.cos(a), 0.24 + 0.36 * math.sin(a)) for a in angles]
        pen.stroke(rim, (190, 40, 60), 1.0, smooth=False)
    pen.stroke([(-0.1, 0.22), (0.1, 0.22)], (190, 40, 60), 1.0, smooth=False)


# -- body -----------------------------------------------------------------------------------------------------------


def _legs(pen: Pen, who: Character) -> None:
    navy: Color = (40, 50, 96)
    trousers = None if who.girl else (navy if who.outfit == "school uniform" else (70, 84, 120))
    for side in (-1, 1):
        pen.outlined_stroke([(side * 0.3, 2.3), (side * 0.32, 3.2)], trousers or who.skin, 0.3, smooth=False)
        if who.girl and who.outfit in ("school uniform", "sweater"):
            pen.outlined_stroke([(side * 0.32, 2.95), (side * 0.32, 3.2)], (250, 250, 252), 0.3, smooth=False)
        pen.blob([(side * 0.12, 3.2), (side * 0.5, 3.15), (side * 0.62, 3.45), (side * 0.14, 3.48)], (110, 64, 48))


def _arms(pen: Pen, who: Character, sleeve: Color, full_body: bool) -> None:
    for side in (-1, 1):
        if who.waving and side == 1:
            path, hand = [(0.6, 1.4), (1.2, 1.35), (1.42, 0.85)], (1.46, 0.68)
        else:
            path, hand = [(0.58, 1.4), (0.9, 1.8), (0.98, 2.2)], (1.0, 2.34)
        pen.ellipse(side * hand[0], hand[1], 0.16, 0.17, who.skin, 0.9)
        pen.outlined_stroke([(side * x, y) for x, y in path], sleeve, 0.4 if who.outfit == "kimono" else 0.3)


def _body(pen: Pen, who: Character, full_body: bool) -> None:
    color = CLOTH[who.cloth]
    if who.outfit == "school uniform":
        _school_uniform(pen, who, full_body)
    elif who.outfit == "dress":
        _arms(pen, who, color, full_body)
        pen.blob(_mirrored([(0, 1.12), (0.5, 1.22), (0.52, 1.8), (1.05, 2.6), (0, 2.72)]), color)
        pen.polygon([(0.5, 1.85), (1.0, 2.6), (0.4, 2.66), (0.25, 1.9)], darker(color), 0)
        pen.blob([(-0.42, 1.18), (0, 1.42), (0.42, 1.18), (0, 1.06)], (255, 255, 255), 0.8)
        pen.box(-0.54, 1.78, 0.54, 1.92, darker(color, 0.45) if who.cloth != "black" else HUES["red"], 0.7)
    elif who.outfit == "kimono":
        _arms(pen, who, color, full_body)
        pen.blob(_mirrored([(0, 1.1), (0.62, 1.25), (0.62, 1.9), (0.72, 3.05), (0, 3.1)]), color)
        pen.polygon([(0.1, 2.1), (0.62, 2.1), (0.66, 3.0), (0.2, 3.05)], darker(color), 0)
        pen.polygon([(0.14, 1.06), (0.42, 1.14), (-0.1, 1.75), (-0.3, 1.66)], (255, 255, 255), 0.7)
        pen.polygon([(-0.14, 1.06), (-0.42, 1.14), (0.1, 1.75), (0.3, 1.66)], (255, 255, 255), 0.7)
        pen.box(-0.64, 1.7, 0.64, 2.08, (236, 96, 96) if who.cloth in ("yellow", "white", "green") else HUES["yellow"])
    else:
        _top(pen, who, color, full_body)


def _school_uniform(pen: Pen, who: Character, full_body: bool) -> None:
    navy: Color = (46, 62, 120)
    if not who.girl:
        _arms(pen, who, (50, 54, 78), full_body)
        pen.blob(_mirrored([(0, 1.1), (0.6, 1.24), (0.6, 2.0), (0.56, 2.5), (0, 2.52)]), (50, 54, 78))
        pen.stroke([(0, 1.25), (0, 2.45)], INK, 0.9, smooth=False)
        for y in (1.45, 1.8, 2.15):
            pen.ellipse(0.1, y, 0.06, 0.06, HUES["yellow"], 0)
        return
    white: Color = (252, 252, 255)
    _arms(pen, who, white, full_body)
    pen.blob(_mirrored([(0, 1.1), (0.56, 1.22), (0.54, 1.9), (0.5, 2.15), (0, 2.2)]), white)
    pen.polygon(_mirrored([(0, 2.0), (0.52, 2.0), (0.86, 2.66), (0, 2.74)]), navy)
    for x in (-0.36, 0, 0.36):
        pen.stroke([(x, 2.08), (x * 1.6, 2.64)], darker(navy, 0.5), 0.7, smooth=False)
    pen.polygon([(-0.1, 1.02), (-0.62, 1.24), (-0.5, 1.5), (0, 1.78), (0.5, 1.5), (0.62, 1.24), (0.1, 1.02)], navy)
    pen.polygon([(-0.2, 1.06), (0, 1.5), (0.2, 1.06)], who.skin, 0)
    ribbon = HUES["red"]
    pen.polygon([(0, 1.62), (-0.32, 1.48), (-0.3, 1.84)], ribbon, 0.7)
    pen.polygon([(0, 1.62), (0.32, 1.48), (0.3, 1.84)], ribbon, 0.7)
    pen.ellipse(0, 1.64, 0.09, 0.1, ribbon, 0.6)


def _top(pen: Pen, who: Character, color: Color, full_body: bool) -> None:
    """Hoodie or sweater, with a skirt or shorts beneath."""
    lower = (84, 92, 126) if who.cloth != "blue" else (92, 70, 60)
    if who.girl:
        pen.polygon(_mirrored([(0, 2.2), (0.52, 2.2), (0.78, 2.72), (0, 2.78)]), lower)
    _arms(pen, who, color, full_body)
    pen.blob(_mirrored([(0, 1.1), (0.62, 1.25), (0.62, 2.0), (0.58, 2.4), (0, 2.46)]), color)
    pen.polygon([(0.24, 1.4), (0.58, 1.4), (0.55, 2.34), (0.3, 2.38)], darker(color, 0.2), 0)
    if who.outfit == "hoodie":
        pen.blob([(-0.62, 1.2), (0, 1.5), (0.62, 1.2), (0.5, 1.02), (-0.5, 1.02)], lighter(color, 0.25))
        for x in (-0.18, 0.18):
            pen.stroke([(x, 1.46), (x, 1.82)], (255, 255, 255), 1.1, smooth=False)
        pen.polygon([(-0.36, 2.3), (-0.28, 2.0), (0.28, 2.0), (0.36, 2.3)], darker(color, 0.25), 0.7)
        return
    for y in (1.65, 1.95):
        pen.box(-0.58, y, 0.58, y + 0.13, lighter(color, 0.55) if who.cloth != "white" else HUES["pink"], 0)
    pen.blob([(-0.36, 1.12), (0, 1.28), (0.36, 1.12), (0, 1.04)], darker(color, 0.25), 0.7)


# -- worn on the head -----------------------------------------------------------------------------------------------


def _headwear(pen: Pen, who: Character) -> None:
    color = HUES[who.headwear_color]
    if who.headwear == "hair ribbon":
        at = pen.placed(0.62, -1.0, 1.0, 14)
        for side in (-1, 1):
            at.blob([(0, 0), (side * 0.5, -0.34), (side * 0.6, 0.1), (side * 0.44, 0.28)], color)
        at.ellipse(0, 0, 0.13, 0.14, darker(color))
    elif who.headwear == "hair flower":
        for k in range(5):
            a = math.tau * k / 5
            pen.ellipse(-0.72 + 0.2 * math.cos(a), -0.72 + 0.2 * math.sin(a), 0.17, 0.17, lighter(color, 0.2), 0.7)
        pen.ellipse(-0.72, -0.72, 0.12, 0.12, (255, 232, 120), 0.5)
    elif who.headwear == "cat ears":
        hair = HAIR[who.hair]
        for side in (-1, 1):
            pen.polygon([(side * 0.35, -1.12), (side * 0.92, -1.68), (side * 1.0, -0.72)], hair)
            pen.polygon([(side * 0.55, -1.12), (side * 0.85, -1.4), (side * 0.88, -0.9)], (250, 176, 186), 0)
            pen.polygon([(side * 0.37, -1.1), (side * 0.99, -0.73), (side * 0.6, -0.7)], hair, 0)
    elif who.headwear == "witch hat":
        pen.polygon([(-0.82, -0.72), (0.05, -1.95), (0.5, -1.78), (0.82, -0.72)], color)
        pen.polygon([(0.2, -0.72), (0.2, -1.9), (0.5, -1.78), (0.82, -0.72)], darker(color), 0)
        pen.ellipse(0, -0.68, 1.36, 0.2, color)
        pen.polygon([(-0.78, -0.8), (-0.7, -0.98), (0.74, -0.98), (0.8, -0.8)], HUES["orange"], 0.7)
    elif who.headwear == "beret":
        pen.blob([(-1.15, -0.72), (-0.9, -1.25), (0.1, -1.52), (1.0, -1.15), (0.92, -0.8), (0, -0.86)], color)
        pen.blob([(0.2, -0.92), (0.95, -1.1), (0.86, -0.84), (0.3, -0.86)], darker(color), 0)
        pen.ellipse(0.05, -1.5, 0.08, 0.1, color, 0.8)
    elif who.headwear == "headphones":
        angles = [math.pi * (1 + k / 10) for k in range(11)]
        arc = [(1.12 * math.cos(a), -0.05 + 1.3 * math.sin(a)) for a in angles]
        pen.stroke(arc, color, 2.6)
        for side in (-1, 1):
            pen.ellipse(side * 1.08, 0.12, 0.22, 0.32, color)
    elif who.headwear == "crown":
        spikes = [(-0.5, -1.0), (-0.58, -1.52), (-0.26, -1.28), (0, -1.64), (0.26, -1.28), (0.58, -1.52), (0.5, -1.0)]
        pen.polygon(spikes, (255, 206, 60))
        pen.ellipse(0, -1.17, 0.09, 0.09, HUES["red"], 0.5)
