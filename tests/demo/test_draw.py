"""The drawn set: the same bytes every time, the promised shares, and tags that tell the truth about the pixels."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from draw import SHARES, SOLIDS, draw_picture, plan, write_folder
from drawing.characters import EYES, HAIR, character_tags, draw_character, random_character
from drawing.objects import OBJECTS
from drawing.pen import HUES, blank_pen
from drawing.scenery import BACKDROPS, SCENES
from PIL import Image

COUNT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn")
    write_folder(out, COUNT, seed=3, processes=2)
    return out


def test_same_seed_same_bytes_on_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, COUNT, seed=3, processes=1)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_another_seed_draws_other_pictures(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, COUNT, seed=4, processes=1)
    same = sum(path.read_bytes() == (tmp_path / path.name).read_bytes() for path in folder.glob("*.png"))
    assert same < COUNT * 0.05  # flat colours may coincide


def test_every_picture_has_tags_and_the_set_has_three_aspects(folder: Path) -> None:
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == COUNT
    aspects = set()
    for path in pictures:
        tags = path.with_suffix(".txt").read_text(encoding="utf-8").strip().split(", ")
        assert all(tags), path
        assert len(tags) == len(set(tags)), tags
        with Image.open(path) as image:
            assert image.mode == "RGB"
            aspects.add(round(np.log2(image.height / image.width)))
    assert aspects == {-1, 0, 1}


def test_plan_meets_the_shares_exactly() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    counts = Counter(plan(4000, seed=0))
    assert counts.total() == 4000
    for kind, share in SHARES.items():
        assert abs(counts[kind] - 4000 * share) <= 1, kind
    assert counts["solid:black"] == counts["solid:white"] == 120


@pytest.mark.parametrize("name", list(SOLIDS))
def test_solid_colours_are_exact(name: str) -> None:
    image, tags = draw_picture(f"solid:{name}", Random(0))
    assert tags == [f"completely {name}"]
    assert image.getcolors() == [(image.width * image.height, SOLIDS[name])]


@pytest.mark.parametrize("hair", list(HAIR))
@pytest.mark.parametrize("full_body", [False, True])
def test_hair_and_eyes_have_the_colour_that_the_tags_name(hair: str, full_body: bool) -> None:
    rng = Random(hair)
    for eyes in EYES:
        who = replace(random_character(rng), hair=hair, eyes=eyes, face="smile", glasses=False)
        pen = blank_pen(144, 88) if full_body else blank_pen(96, 96)
        head = pen.placed(0.5, 0.58) if full_body else pen.placed(0.5, 0.51)
        draw_character(head.placed(0, 0, 0.28), who, full_body)
        tags = character_tags(who, full_body)
        assert f"{hair} hair" in tags and f"{eyes} eyes" in tags
        pixels = np.asarray(pen.finished()).reshape(-1, 3).astype(int)
        assert (np.abs(pixels - HAIR[hair]).max(axis=1) < 6).sum() > 60
        assert (np.abs(pixels - EYES[eyes]).max(axis=1) < 40).sum() >= 4


def test_closed_eyes_have_no_colour_tag() -> None:
    who = replace(random_character(Random(1)), face=">_<")
    tags = character_tags(who, full_body=False)
    assert ">_<" in tags and "closed eyes" in tags
    assert not any(tag.endswith(" eyes") for tag in tags if tag != "closed eyes")


@pytest.mark.parametrize("painter", [*SCENES, *BACKDROPS], ids=lambda painter: painter.__name__)
def test_scenery_fills_every_canvas_and_is_as_bright_as_its_time_of_day(painter) -> None:  # type: ignore[no-untyped-def]
    unpainted = (1, 2, 3)
    for seed, size in enumerate(((96, 96), (128, 80), (80, 128)) * 3):
        pen = blank_pen(*size, paper=unpainted)
        tags = painter(pen, Random(seed))
        pixels = np.asarray(pen.finished())
        assert not (pixels == unpainted).all(axis=-1).any()
        if "night" in tags:
            assert pixels.mean() < 90
        if "bright" in tags:
            assert pixels.mean() > 215


@pytest.mark.parametrize("painter", list(OBJECTS), ids=lambda painter: painter.__name__)
def test_objects_differ_by_colour_and_leave_room_around_them(painter) -> None:  # type: ignore[no-untyped-def]
    drawings = []
    for name in OBJECTS[painter]:
        pen = blank_pen(96, 96)
        painter(pen.placed(0.5, 0.5, 0.42), HUES[name])
        drawings.append(np.asarray(pen.finished()))
        corners = drawings[-1][[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == 255).all()
    assert all((a != b).any() for a, b in pairwise(drawings))


def test_some_tag_files_use_underscores(tmp_path: Path) -> None:
    write_folder(tmp_path, 200, seed=0, processes=1)
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.glob("*.txt")]
    spelled = sum("_hair" in text or "_background" in text or "_sky" in text or "_humans" in text for text in texts)
    assert 1 <= spelled <= 40
