"""Draws the demo's data: a folder of tagged illustrations, PNG beside .txt, as a user would have collected them.

    python demo/draw.py --out DIR --count 4000 --seed 0

Owns what the set is made of, in which share and at which sizes; the pictures themselves are in `drawing/`. Picture k is
a function of (seed, k, count) alone, so the same call writes the same bytes with any number of processes.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from random import Random

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from drawing.characters import character_tags, draw_character, random_character
from drawing.objects import draw_object
from drawing.pen import Color, Pen, blank_pen
from drawing.scenery import BACKDROPS, SCENES

__all__ = ["SOLIDS", "draw_picture", "main", "write_folder"]

Size = tuple[int, int]
"""(height, width) in pixels."""

SQUARE: tuple[Size, ...] = ((96, 96), (112, 112), (104, 100), (100, 108))
TALL: tuple[Size, ...] = ((128, 80), (136, 84), (144, 88), (120, 72))
WIDE: tuple[Size, ...] = ((80, 128), (84, 136), (88, 144), (72, 120))

SOLIDS: dict[str, Color] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (220, 24, 32),
    "orange": (250, 140, 20),
    "yellow": (255, 225, 30),
    "green": (24, 160, 60),
    "aqua": (40, 210, 210),
    "blue": (24, 60, 220),
    "purple": (130, 40, 190),
    "pink": (255, 140, 190),
    "brown": (120, 70, 36),
    "navy": (16, 22, 80),
}
"""Colour name → the one colour that fills the picture. Black and white are exact: the demo measures them."""

SHARES: dict[str, float] = {
    "character": 0.6,
    "object": 0.1,
    "scene": 0.17,
    "solid:black": 0.03,
    "solid:white": 0.03,
    **{f"solid:{name}": 0.07 / (len(SOLIDS) - 2) for name in list(SOLIDS)[2:]},
}
"""What the set is made of."""


def plan(count: int, seed: int) -> list[str]:
    """What each of `count` pictures is: shares met to within one picture each, order shuffled."""
    kinds: list[str] = []
    total = 0.0
    for kind, share in SHARES.items():
        total += share
        kinds += [kind] * (round(total * count) - len(kinds))
    Random(f"plan:{seed}").shuffle(kinds)
    return kinds


def _character(rng: Random) -> tuple[Pen, list[str]]:
    """A bust on a square or wide canvas, the whole figure on a tall one."""
    sizes = rng.choices((SQUARE, TALL, WIDE), weights=[7, 2.4, 0.6])[0]
    height, width = rng.choice(sizes)
    full_body = sizes is TALL
    pen = blank_pen(height, width)
    background = rng.choices(list(BACKDROPS), weights=list(BACKDROPS.values()))[0](pen, rng)
    who = random_character(rng)
    w, h = pen.size
    x = w / 2
    if full_body:
        figure = pen.placed(x, h * 0.355, 0.272)
    else:
        tall_hat = who.headwear in ("witch hat", "crown", "cat ears")
        figure = pen.placed(x, 0.51 + 0.07 * tall_hat, 0.272 if tall_hat else 0.3)
    draw_character(figure, who, full_body)
    return pen, character_tags(who, full_body) + background


def _object(rng: Random) -> tuple[Pen, list[str]]:
    pen = blank_pen(*rng.choice(rng.choices((SQUARE, TALL, WIDE), weights=[8, 1, 1])[0]))
    return pen, draw_object(pen, rng)


def _scene(rng: Random) -> tuple[Pen, list[str]]:
    pen = blank_pen(*rng.choice(rng.choices((SQUARE, TALL, WIDE), weights=[3, 2, 5])[0]))
    tags = rng.choices(list(SCENES), weights=list(SCENES.values()))[0](pen, rng)
    return pen, ["no humans", "scenery", *dict.fromkeys(tags), "outdoors"]


DRAWN: dict[str, Callable[[Random], tuple[Pen, list[str]]]] = {
    "character": _character,
    "object": _object,
    "scene": _scene,
}


def draw_picture(kind: str, rng: Random) -> tuple[Image.Image, list[str]]:
    """One picture of that kind and its tags, most telling first."""
    if kind.startswith("solid:"):
        name = kind.removeprefix("solid:")
        height, width = rng.choice(rng.choice((SQUARE, TALL, WIDE)))
        return Image.new("RGB", (width, height), SOLIDS[name]), [f"completely {name}"]
    pen, tags = DRAWN[kind](rng)
    return pen.finished(), tags


def _write(job: tuple[int, str], out: Path, seed: int) -> None:
    index, kind = job
    rng = Random(f"picture:{seed}:{index}")
    image, tags = draw_picture(kind, rng)
    # Some collections keep the booru's underscores; the tag parser must see both spellings as one tag.
    underscores = rng.random() < 0.06
    text = ", ".join(tag.replace(" ", "_") if underscores else tag for tag in tags)
    image.save(out / f"{index:05d}.png", compress_level=3)
    (out / f"{index:05d}.txt").write_text(text + "\n", encoding="utf-8")


def write_folder(out: Path, count: int, seed: int, processes: int | None = None) -> None:
    """Writes `count` pictures and their tag files into `out`, which is created if need be."""
    out.mkdir(parents=True, exist_ok=True)
    jobs = list(enumerate(plan(count, seed)))
    work = partial(_write, out=out, seed=seed)
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        for job in jobs:
            work(job)
        return
    with Pool(processes) as pool:
        for _ in pool.imap_unordered(work, jobs, chunksize=50):
            pass


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw a folder of tagged illustrations.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; created if missing")
    parser.add_argument("--count", type=int, default=4000, help="number of pictures (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same set (default: 0)")
    options = parser.parse_args()
    start = time.perf_counter()
    write_folder(options.out, options.count, options.seed)
    print(f"{options.count} pictures with tags in {options.out} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
