"""Duplicates: the hash under scaling and recompression, the search against all pairs, and the choice of what stays."""

import csv
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from test_ingest import draw, reasons, rows

from sumizome.data.duplicates import FLAT, find_copies, near_pairs, perceptual_hash
from sumizome.data.ingest import ingest_to
from sumizome.data.ingest_tables import copies_path
from sumizome.data.manifest import load_manifest
from sumizome.data.source_config import DuplicateConfig
from sumizome.errors import ConfigError

NEAR = DuplicateConfig("drop", "drop", 4)


def drawing(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Flat colours with outlines, as in a drawing."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(15):
        (x, y), (w, h) = rng.uniform(0, 1, 2), rng.uniform(0.1, 0.4, 2)
        box = [(x - w) * size[0], (y - h) * size[1], (x + w) * size[0], (y + h) * size[1]]
        pen.ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()), outline=(0, 0, 0), width=size[0] // 80)
    return image


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


# --- the hash ---------------------------------------------------------------------------------------------------------


def test_scaled_and_recompressed_copies_are_near_and_other_pictures_are_far() -> None:
    originals = [drawing(seed) for seed in range(40)]
    hashes = [perceptual_hash(image) for image in originals]
    assert all(0 < each < 1 << 63 for each in hashes)
    copies = [
        [image.resize((120, 90), Image.Resampling.LANCZOS) for image in originals],
        [image.resize((777, 600), Image.Resampling.BICUBIC) for image in originals],
        [recompressed(image, 40) for image in originals],
    ]
    for kind in copies:
        found = [bits(perceptual_hash(copy), mine) for copy, mine in zip(kind, hashes, strict=True)]
        assert np.mean(np.array(found) <= 4) >= 0.95
        assert max(found) <= 8
    apart = [bits(one, other) for at, one in enumerate(hashes) for other in hashes[:at]]
    assert min(apart) > 8
    assert abs(np.mean(apart) - 31.5) < 2  # of 63 independent bits half differ


def test_flat_pictures_resemble_nothing() -> None:
    black, white = (Image.new("RGB", (64, 64), colour) for colour in ("black", "white"))
    nearly = Image.fromarray(np.random.default_rng(0).integers(100, 103, (64, 64, 3), dtype=np.uint8))
    assert {perceptual_hash(image) for image in (black, white, nearly)} == {FLAT}
    digests, pixels = list("abc"), np.full(3, 4096)
    assert find_copies(digests, np.zeros(3, np.uint64), pixels, NEAR) == []


# --- the search -------------------------------------------------------------------------------------------------------


def all_pairs(hashes: np.ndarray, limit: int) -> list[list[int]]:
    values, count = hashes.tolist(), len(hashes)
    return [[i, j] for i in range(count) for j in range(i + 1, count) if bits(values[i], values[j]) <= limit]


@pytest.mark.parametrize("limit", [0, 1, 4, 8])
def test_every_near_pair_is_found_and_no_other(limit: int) -> None:
    rng = np.random.default_rng(limit)
    base = rng.integers(1, 1 << 63, 60, dtype=np.uint64)
    flipped = base.repeat(4)
    for _ in range(9):  # up to nine flips, so pairs lie on both sides of each limit
        flips = rng.random(len(flipped)) < 0.5
        flipped[flips] ^= np.uint64(1) << rng.integers(0, 63, flips.sum()).astype(np.uint64)
    hashes = np.unique(flipped)
    found = near_pairs(hashes, limit).tolist()
    assert found == all_pairs(hashes, limit)
    assert (len(found) > 0) == (limit > 0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 255), unique=True, max_size=40), st.integers(0, 3))
def test_crowded_hashes_too(values: list[int], limit: int) -> None:
    hashes = np.array(sorted(values), np.uint64)
    assert near_pairs(hashes, limit).tolist() == all_pairs(hashes, limit)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 5), st.integers(0, 9)), max_size=25), st.integers(0, 2))
def test_every_copy_names_a_picture_that_stays_and_is_near(entries: list[tuple[int, int, int]], limit: int) -> None:
    hashes = np.array([entry[0] for entry in entries], np.uint64)
    pixels = np.array([entry[1] for entry in entries], np.int64)
    digests = [f"{entry[0]}-{entry[1]}-{entry[2]}" for entry in entries]  # equal bytes have an equal hash
    copies = find_copies(digests, hashes, pixels, DuplicateConfig("drop", "drop", limit))
    gone = {copy.row for copy in copies}
    assert len(gone) == len(copies)
    for copy in copies:
        if copy.kind == "exact":
            assert digests[copy.row] == digests[copy.kept]
        else:
            assert copy.kept not in gone
            assert copy.distance == bits(*hashes[[copy.row, copy.kept]].tolist()) <= limit
            assert (-pixels[copy.kept], copy.kept) < (-pixels[copy.row], copy.row)
    left = [row for row in range(len(entries)) if row not in gone and hashes[row] != FLAT]
    assert not all_pairs(np.array([hashes[row] for row in left], np.uint64), limit)


def slow_copies(hashes: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """By the definition: in turn, each follows the first leader that is near, or leads."""
    leaders: list[int] = []
    found = []
    for row, mine in enumerate(hashes.tolist()):
        near = [leader for leader in leaders if bits(mine, int(hashes[leader])) <= limit]
        if near:
            found.append((row, near[0]))
        else:
            leaders.append(row)
    return found


@pytest.mark.parametrize("layout", [0, 20, 40, 58])
def test_many_pictures_of_one_layout_follow_the_same_leaders(layout: int) -> None:
    """Hashes that agree in most bits stand in long runs of equal bands, of which not all pairs are made."""
    rng = np.random.default_rng(layout)
    hashes = rng.integers(1, 1 << (63 - layout), 700, dtype=np.uint64) | np.uint64(1 << 62)
    hashes[::3] = hashes[0]
    copies = find_copies([str(at) for at in range(700)], hashes, np.full(700, 9), DuplicateConfig(near="report"))
    assert [(copy.row, copy.kept) for copy in copies] == slow_copies(hashes, 4)


def test_a_chain_is_not_one_picture() -> None:
    hashes = np.array([0b0001, 0b0011, 0b0111, 0b1111], np.uint64)
    copies = find_copies(list("abcd"), hashes, np.array([9, 8, 7, 6]), DuplicateConfig("drop", "drop", 1))
    assert [(copy.row, copy.kept) for copy in copies] == [(1, 0), (3, 2)]


@pytest.mark.parametrize("changes", [{"max_distance": 9}, {"max_distance": -1}, {"near": "drop"}])
def test_settings_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        DuplicateConfig(**changes)  # type: ignore[arg-type]


# --- in ingest --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A drawing, its bytes again, smaller, and as a JPEG; a drawing with a copy; a broken picture; one of its own."""
    root = tmp_path / "pictures"
    root.mkdir()
    drawing(1).save(root / "b_large.png")
    (root / "c_again.png").write_bytes((root / "b_large.png").read_bytes())
    drawing(1).resize((160, 120), Image.Resampling.LANCZOS).save(root / "a_small.png")
    drawing(1).save(root / "z.jpg", quality=60)
    draw(root / "=own.png", 5)
    (root / "broken.png").write_bytes(b"")
    return root


def listed(manifest: Path) -> list[list[str]]:
    with copies_path(manifest).open(encoding="utf-8", newline="") as file:
        return [[line["path"], line["kind"], line["kept_path"], line["dropped"]] for line in csv.DictReader(file)]


def test_duplicates_are_reported_and_kept_unless_dropped(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "out" / "m.parquet"
    every = {"=own.png", "a_small.png", "b_large.png", "c_again.png", "z.jpg"}
    result = ingest_to(manifest, [folder], workers=0)
    assert rows(result).keys() == every
    assert listed(manifest) == [["c_again.png", "exact", "b_large.png", "False"]]

    result = ingest_to(manifest, [folder], duplicates=DuplicateConfig(near="report"), workers=1)
    assert rows(result).keys() == every
    assert listed(manifest) == [
        ["a_small.png", "near", "b_large.png", "False"],
        ["c_again.png", "exact", "b_large.png", "False"],
        ["z.jpg", "near", "b_large.png", "False"],
    ]

    result = ingest_to(manifest, [folder], duplicates=NEAR, workers=0)
    assert rows(result).keys() == {"=own.png", "b_large.png"}
    assert reasons(result) == {
        "a_small.png": "near_duplicate",
        "broken.png": "empty_file",
        "c_again.png": "duplicate",
        "z.jpg": "near_duplicate",
    }
    assert len(result.manifest) + len(result.rejects) == 6
    assert (result.captions_missing, result.duplicates) == (2, 0)
    assert all("-" not in row["id"] for row in load_manifest(manifest).table.to_pylist())
