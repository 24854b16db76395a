"""What the studies' data sets show: the demo's set, characters by number, and discs on flat grounds.

Owns the drawing of the two sets that the demo does not have. Picture k of a set is a function of (set, k) alone.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

from draw import SOLIDS, write_folder
from drawing.characters import draw_character, random_character
from drawing.pen import Color, blank_pen
from drawing.scenery import SCENES, plain_backdrop

__all__ = ["COUNT_TAGS", "PALETTE", "disc_shares", "draw_demo_set", "draw_discs", "draw_people", "ground_shares"]

SIDE = 96
"""px of a drawn picture; preparation brings it to each study's canvas."""

COUNT_TAGS = ("no humans", "solo", "duo", "trio")
"""How many characters a picture of the people's set shows, as its tags say it."""

PALETTE: dict[str, Color] = {name: color for name, color in SOLIDS.items() if name != "navy"}
"""The twelve colours of grounds and discs."""


def draw_demo_set(out: Path, count: int) -> None:
    """The demo's pictures, of another seed than the demo's."""
    write_folder(out, count, seed=1, processes=1)


def draw_people(out: Path, count: int) -> None:
    """One, two or three characters, a scene without any, or flat black or white: COUNT_TAGS tells which."""
    _write(out, count, "people", _people)


def draw_discs(out: Path, count: int) -> None:
    """A disc of one colour on a ground of another, how often is `ground_shares` and `disc_shares`."""
    _write(out, count, "discs", _disc)


def ground_shares() -> dict[str, float]:
    """How often each colour is the ground: 1/rank^1.5, in the palette's order."""
    return _long_tail(list(PALETTE))


def disc_shares() -> dict[str, float]:
    """The same for discs; the order is another, so that a ground's rank says nothing of a disc's."""
    names = list(PALETTE)
    return _long_tail([names[(5 * place + 7) % len(names)] for place in range(len(names))])


def _long_tail(names: Sequence[str]) -> dict[str, float]:
    weights = [1 / (rank + 1) ** 1.5 for rank in range(len(names))]
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


def _people(rng: Random) -> tuple[Image.Image, list[str]]:
    kind = rng.choices(("black", "white", *COUNT_TAGS), weights=(6, 6, 14, 44, 18, 12))[0]
    if kind in ("black", "white"):
        return Image.new("RGB", (SIDE, SIDE), SOLIDS[kind]), [f"completely {kind}"]
    pen = blank_pen(SIDE, SIDE)
    if kind == "no humans":
        tags = rng.choices(list(SCENES), weights=list(SCENES.values()))[0](pen, rng)
        return pen.finished(), ["no humans", "scenery", *dict.fromkeys(tags)]
    ground = plain_backdrop(pen, rng)
    number = COUNT_TAGS.index(kind)
    tags = [kind]
    for place in range(number):
        who = random_character(rng)
        scale = (0.3, 0.19, 0.14)[number - 1]
        draw_character(pen.placed((place + 0.5) / number, 0.5, scale), who, False)
        tags.append(f"{who.hair} hair")
    return pen.finished(), [*dict.fromkeys(tags), *ground]


def _disc(rng: Random) -> tuple[Image.Image, list[str]]:
    ground = rng.choices(list(PALETTE), weights=list(ground_shares().values()))[0]
    disc = ground
    while disc == ground:
        shares = disc_shares()
        disc = rng.choices(list(shares), weights=list(shares.values()))[0]
    image = Image.new("RGB", (4 * SIDE, 4 * SIDE), PALETTE[ground])
    middle, radius = 2 * SIDE, 4 * SIDE * rng.uniform(0.26, 0.32)
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    ImageDraw.Draw(image).ellipse(box, fill=PALETTE[disc])
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), [f"{ground} background", f"{disc} disc"]


def _write(out: Path, count: int, name: str, draw: Callable[[Random], tuple[Image.Image, list[str]]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, tags = draw(Random(f"{name}:{number}"))
        image.save(out / f"{number:05d}.png", compress_level=3)
        (out / f"{number:05d}.txt").write_text(", ".join(tags) + "\n", encoding="utf-8")
