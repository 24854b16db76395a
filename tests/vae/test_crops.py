"""Where crops lie, what they favour, how often shapes are shown, and what pixels weigh."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sumizome.errors import ConfigError
from sumizome.vae.crops import CropConfig, balanced_repeats, choose_corner, detail_of
from sumizome.vae.regions import Masks, open_masks, tag_weight


def half_detailed(side: int = 128) -> np.ndarray:
    """Left half flat, right half a chequerboard."""
    picture = np.full((side, side, 3), 128, np.uint8)
    picture[:, side // 2 :] = (np.indices((side, side // 2)).sum(axis=0) % 2 * 255)[..., None]
    return picture


@given(st.integers(32, 90), st.integers(32, 90), st.integers(0, 2**40), st.sampled_from([1, 4, 8]))
def test_a_crop_lies_inside_on_its_grid_and_is_the_same_again(height: int, width: int, seed: int, align: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    config = CropConfig(side=32, candidates=3)
    top, left = choose_corner(picture, None, 32, config, align, seed)
    assert 0 <= top <= height - 32 and 0 <= left <= width - 32
    assert top % align == left % align == 0
    assert choose_corner(picture, None, 32, config, align, seed) == (top, left)


def test_detail_is_favoured_as_much_as_is_asked() -> None:
    picture = half_detailed()

    def share(**settings: float | int) -> float:
        config = CropConfig(side=32, **settings)
        energies = []
        for seed in range(300):
            top, left = choose_corner(picture, None, 32, config, 8, seed)
            energies.append(detail_of(picture[top : top + 32, left : left + 32]) > 0)
        return float(np.mean(energies))

    none, some, always = share(detail=0.0), share(detail=0.75), share(detail=1.0, candidates=8)
    assert none < some < always
    # Corners 0, 8, …, 96; those from 40 on see the right half: 8 of 13.
    assert none == pytest.approx(8 / 13, abs=0.1)
    assert always > 0.97


def test_of_equally_detailed_places_the_one_in_the_mask_is_taken() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    region = np.ones((128, 128), np.float32)
    region[:, 64:] = 5
    config = CropConfig(side=32, candidates=6, detail=1.0)
    inside = [choose_corner(picture, region, 32, config, 8, seed)[1] >= 64 for seed in range(200)]
    assert np.mean(inside) > 0.9


def test_rare_shapes_are_shown_more_often() -> None:
    bucket = np.array([0] * 64 + [1] * 4 + [2] * 1)
    repeats = np.ones(69, np.int64)
    repeats[0] = 0  # held out
    even = balanced_repeats(bucket, repeats, 1.0)
    assert np.bincount(bucket, even).tolist() == [63, 64, 16]  # a factor of 16 at most
    half = balanced_repeats(bucket, repeats, 0.5)
    assert half[64] == 4 and half[68] == 8 and half[0] == 0
    assert balanced_repeats(bucket, repeats, 0.0).tolist() == repeats.tolist()


def test_masks_are_found_by_path_and_fitted_to_the_picture(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mask = np.zeros((10, 20), np.uint8)
    mask[:, 10:] = 255
    Image.fromarray(mask).resize((40, 20), Image.Resampling.NEAREST).save(tmp_path / "a" / "b.png")
    masks = open_masks(tmp_path)
    assert isinstance(masks, Masks)
    assert "a/b.jpg" in masks and "b.jpg" not in masks
    found = masks.read("a/b.jpg", (20, 40))
    assert found.shape == (20, 40) and found[:, :20].max() == 0 and found[:, 20:].min() == 1
    assert masks.read("a/b.jpg", (10, 20)).shape == (10, 20)
    assert masks.read("a/c.jpg", (10, 20)) is None


def test_a_folder_of_masks_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found none"):
        open_masks(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no \.png"):
        open_masks(tmp_path)


def test_the_greatest_weight_of_a_pictures_tags_counts() -> None:
    weights = {"eyes": 2.0, "close-up": 3.0, "blurry": 0.5}
    assert tag_weight(["1girl", "eyes", "close-up"], weights) == 3
    assert tag_weight(["blurry"], weights) == 0.5
    assert tag_weight(["1girl"], weights) == 1
