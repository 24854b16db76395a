"""Distances of sets against scipy, closed forms, and a mixture whose distance is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from sumizome.evaluate.distances import frechet_distance, frechet_of_moments, kernel_distance


def gaussian(seed: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    factor = random.normal(size=(dimensions, dimensions + 2))
    return random.normal(size=dimensions), factor @ factor.T / dimensions


@given(st.integers(0, 1000), st.integers(1, 12))
def test_frechet_is_that_of_scipy_s_matrix_root(seed: int, dimensions: int) -> None:
    (mean, covariance), (other, other_covariance) = gaussian(seed, dimensions), gaussian(seed + 5000, dimensions)
    root = np.trace(np.real(sqrtm(covariance @ other_covariance)))
    expected = np.square(mean - other).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * root
    assert frechet_of_moments(mean, covariance, other, other_covariance) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_frechet_of_one_dimension_is_of_means_and_deviations() -> None:
    """(μ₁ − μ₂)² + (s₁ − s₂)²."""
    first = np.array([[-3.0], [3.0]]) / np.sqrt(2)  # mean 0, s = 3
    second = 4 + np.array([[-1.0], [1.0]]) / np.sqrt(2)  # mean 4, s = 1
    assert frechet_distance(first, second) == pytest.approx(16 + 4)


def test_a_set_has_no_distance_from_itself_even_where_its_covariance_is_singular() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 20))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)


def test_of_a_known_mixture() -> None:
    """Half at −a and half at +a along one axis has that axis's variance raised by a²: distance (√(1+a²) − 1)²."""
    random, a = np.random.default_rng(3), 2.0
    plain, mixed = random.normal(size=(40_000, 3)), random.normal(size=(40_000, 3))
    mixed[:, 0] += random.choice([-a, a], len(mixed))
    assert frechet_distance(plain, mixed) == pytest.approx((np.sqrt(1 + a * a) - 1) ** 2, rel=0.05)


def test_the_kernel_distance_is_unbiased_where_frechet_is_not() -> None:
    random = np.random.default_rng(4)
    pairs = [(random.normal(size=(30, 16)), random.normal(size=(30, 16))) for _ in range(200)]
    kernel = np.array([kernel_distance(*pair) for pair in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(len(pairs))
    assert min(frechet_distance(*pair) for pair in pairs[:20]) > 1


def test_the_kernel_distance_by_hand() -> None:
    """One dimension, (x·y + 1)³: rows {0, 1} against {2, 3}."""
    within, other, between = (0 * 1 + 1) ** 3, (2 * 3 + 1) ** 3, np.mean([1, 1, 3**3, 4**3])
    distance = kernel_distance(np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]]))
    assert distance == pytest.approx(within + other - 2 * between)


def test_one_picture_is_no_set() -> None:
    with pytest.raises(ValueError, match="no covariance"):
        frechet_distance(np.ones((1, 3)), np.ones((4, 3)))
