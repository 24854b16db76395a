"""The measures of decoded pictures: closed cases, and that they see what they are named after."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sumizome.vae.scores import MEASURES, blockiness_of_originals, compare, distance_of, score_pair, summarise


def drawing(seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    flats = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(flats).resize((96, 96), Image.Resampling.NEAREST))


def test_an_equal_picture_has_the_best_of_everything() -> None:
    pair = score_pair(drawing(), drawing())
    assert pair.values["psnr"] == 100  # a mean squared error of 1e-10, what stands for none
    assert pair.values["ssim"] == pytest.approx(1, abs=1e-5) and pair.values["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert pair.values["sharpness"] == 1
    assert [pair.values[name] for name in ("red", "green", "blue")] == [0, 0, 0]
    assert pair.grid == pair.grid_of_original


def test_psnr_of_one_level_everywhere() -> None:
    flat = np.full((32, 32, 3), 100, np.uint8)
    assert score_pair(flat, flat + 1).values["psnr"] == pytest.approx(10 * np.log10(255**2))


def test_a_tone_is_a_colour_error_of_its_channel_and_texture_is_none() -> None:
    original = np.full((32, 32, 3), 100, np.uint8)
    tinted = original.copy()
    tinted[..., 1] += 7
    values = score_pair(original, tinted).values
    assert (values["red"], values["green"], values["blue"]) == (0, 7, 0)
    texture = original.copy()
    texture[::2] += 10
    texture[1::2] -= 10
    assert score_pair(original, texture).values["red"] == 0


def test_blur_takes_edges_away_and_sharpening_adds_to_them() -> None:
    original = np.array(Image.fromarray(drawing()).filter(ImageFilter.GaussianBlur(1)))
    blurred = np.array(Image.fromarray(original).filter(ImageFilter.GaussianBlur(2)))
    sharpened = np.array(Image.fromarray(original).filter(ImageFilter.UnsharpMask(2, 100, 0)))
    assert score_pair(original, blurred).values["sharpness"] < 0.8
    assert score_pair(original, sharpened).values["sharpness"] > 1.1


def test_a_set_is_summed_up_and_compared_in_the_direction_of_each_measure() -> None:
    pictures = [drawing(seed) for seed in range(6)]
    noise = np.random.default_rng(0).integers(-20, 21, pictures[0].shape)
    noisy = [np.clip(picture + noise, 0, 255).astype(np.uint8) for picture in pictures]
    less = [np.clip(picture + noise // 2, 0, 255).astype(np.uint8) for picture in pictures]
    before = [score_pair(a, b) for a, b in zip(pictures, noisy, strict=True)]
    after = [score_pair(a, b) for a, b in zip(pictures, less, strict=True)]
    originals = blockiness_of_originals(before).value
    better = compare(summarise(before), summarise(after), originals)
    assert set(better) == set(MEASURES) - {"lpips"}
    assert better["psnr"] and better["ssim"] and better["ms_ssim"] and better["sharpness"]
    assert not any(compare(summarise(after), summarise(before), originals)[name] for name in ("psnr", "ssim"))
    interval = summarise(before)["psnr"]
    assert interval.low <= interval.value <= interval.high and interval.count == 6


def test_what_is_best_is_the_originals_own_where_a_measure_has_no_best() -> None:
    assert distance_of("blockiness", 1.4, 1.2) == pytest.approx(0.2)
    assert distance_of("sharpness", 1.3, 1.0) == pytest.approx(0.3)
    assert distance_of("psnr", 30.0, 1.0) < distance_of("psnr", 20.0, 1.0)
