"""Numbers of pictures in cases whose answer is known: flat colours, a checkerboard, coins of known mean."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from sumizome.evaluate.scores import (
    COLOURS,
    _expanded_tail,
    bootstrap,
    brightness,
    colour_error,
    jackknife,
    proportion,
    saturation,
    sharpness,
)


def flat(*colour: int, count: int = 2) -> np.ndarray:
    return np.full((count, 8, 12, 3), colour, np.uint8)


def test_an_all_black_and_an_all_white_picture() -> None:
    assert brightness(flat(0, 0, 0)).tolist() == [0, 0]
    assert brightness(flat(255, 255, 255)) == pytest.approx([1, 1])
    assert colour_error(flat(0, 0, 0), COLOURS["black"]).tolist() == [0, 0]
    assert colour_error(flat(0, 0, 0), COLOURS["white"]).tolist() == [1, 1]
    assert colour_error(flat(128, 128, 128), COLOURS["black"]) == pytest.approx([128 / 255] * 2)


def test_saturation_of_grey_is_none_and_of_pure_red_is_all() -> None:
    assert saturation(flat(90, 90, 90)).tolist() == [0, 0]
    assert saturation(flat(0, 0, 0)).tolist() == [0, 0]
    assert saturation(flat(255, 0, 0)).tolist() == [1, 1]
    assert saturation(flat(200, 100, 150)) == pytest.approx([0.5, 0.5])


def test_sharpness_of_a_flat_picture_is_none_and_of_a_checkerboard_is_eight() -> None:
    assert sharpness(flat(10, 200, 30)) == pytest.approx([0, 0], abs=1e-12)
    board = (np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)[None, :, :, None].repeat(3, axis=3)
    # Each inner pixel differs from its four neighbours by the whole range.
    assert sharpness(board) == pytest.approx([4.0])


def test_a_picture_s_number_does_not_depend_on_its_neighbours() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for score in (brightness, saturation, sharpness):
        assert score(pictures)[1] == score(pictures[1:2])[0]


def test_there_are_black_white_mid_grey_and_ten_colours() -> None:
    assert len(COLOURS) == 13 and {"black", "white", "grey"} < set(COLOURS)


@pytest.mark.parametrize("count", [8, 12, 40])
def test_the_bootstrap_covers_a_known_mean_as_often_as_it_says(count: int) -> None:
    """800 intervals: 95 % ± 1.5 %; plain percentiles of 8 values would hold it in 89 %."""
    random = np.random.default_rng(1)
    hits = [(i := bootstrap(random.normal(3.0, 1.0, count), draws=1000)).low <= 3.0 <= i.high for _ in range(800)]
    assert 0.925 <= np.mean(hits) <= 0.975


@pytest.mark.parametrize("count", [2, 3, 8, 400])
def test_percentiles_are_taken_as_far_out_as_student_s_t(count: int) -> None:
    far = student.ppf(0.975, count - 1) * np.sqrt(count / (count - 1))
    assert _expanded_tail(count) == pytest.approx(norm.cdf(-far), rel=1e-3, abs=1e-12)


def test_equal_values_have_no_interval() -> None:
    interval = bootstrap([0.25] * 7)
    assert (interval.low, interval.value, interval.high, interval.count) == (0.25, 0.25, 0.25, 7)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    rows = np.random.default_rng(2).normal(0, 2, (50, 1))
    interval = jackknife(lambda part: float(part.mean()), rows, groups=50)
    assert (interval.high - interval.value) / 1.96 == pytest.approx(rows.std(ddof=1) / np.sqrt(50))


def test_ten_misses_are_not_certainly_never() -> None:
    assert proportion([False] * 10).high == pytest.approx(0.2775, abs=1e-3)  # 1 − the same of ten hits
    assert proportion([True] * 10).low == pytest.approx(1 - 0.2775, abs=1e-3)
    half = proportion([True, False] * 500)
    assert (half.value, half.high - half.low) == (0.5, pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.01))
