"""The shuffle that is a formula: a bijection for every n, uniform, and the same for ever."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from sumizome.data.permutation import mixed, shuffled


def orders(n: int, keys: np.ndarray) -> np.ndarray:
    """[keys, n]: the whole order of 0 … n − 1 that each key chooses."""
    count = len(keys)
    return shuffled(np.tile(np.arange(n), count), np.full(n * count, n), np.repeat(keys, n)).reshape(count, n)


def some_keys(count: int) -> np.ndarray:
    return mixed(np.full(count, 42, np.uint64), np.arange(count))


@given(st.integers(0, 2**64 - 1), st.integers(1, 700))
def test_each_number_comes_once(key: int, n: int) -> None:
    assert sorted(orders(n, np.array([key], np.uint64))[0].tolist()) == list(range(n))


@given(st.integers(2**20, 2**50), st.integers(0, 2**64 - 1))
def test_a_stretch_of_a_great_order_has_no_number_twice(n: int, key: int) -> None:
    found = shuffled(np.arange(2000), np.full(2000, n), np.full(2000, key, np.uint64))
    assert len(np.unique(found)) == 2000 and found.min() >= 0 and found.max() < n


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 2**64 - 1)), min_size=1, max_size=20))
def test_each_element_has_its_own_n_and_key(pairs: list[tuple[int, int]]) -> None:
    n, keys = np.array([n for n, _ in pairs]), np.array([key for _, key in pairs], np.uint64)
    alone = [int(shuffled(np.array([size // 2]), np.array([size]), keys[i : i + 1])[0]) for i, size in enumerate(n)]
    assert shuffled(n // 2, n, keys).tolist() == alone


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_orders_of_few_are_equally_frequent(n: int) -> None:
    """χ² over all n! orders; the 99.99 % quantile."""
    draws = 40_000
    found = Counter(map(tuple, orders(n, some_keys(draws)).tolist()))
    expected = draws / math.factorial(n)
    statistic = sum((found[order] - expected) ** 2 / expected for order in itertools.permutations(range(n)))
    assert statistic < chi2.ppf(0.9999, math.factorial(n) - 1)


@pytest.mark.parametrize("n", [7, 64, 97, 1000, 1024])
def test_every_place_is_equally_likely_for_every_number(n: int) -> None:
    draws = 20_000
    for place in (0, n // 2, n - 1):
        found = shuffled(np.full(draws, place), np.full(draws, n), some_keys(draws))
        expected = draws / n
        assert ((np.bincount(found, minlength=n) - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, n - 1)


def test_neighbours_part(n: int = 50) -> None:
    """The distance from the number at a place to that at the next is uniform over 1 … n − 1 (mod n)."""
    found = orders(n, some_keys(2000))
    steps = np.bincount(((found[:, 1:] - found[:, :-1]) % n).ravel(), minlength=n)[1:]
    expected = steps.sum() / (n - 1)
    assert ((steps - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, n - 2)


def test_fixed_points_of_a_great_order_are_as_many_as_chance_makes() -> None:
    """Poisson with mean 1 a shuffle; over 40 shuffles of 10 000."""
    found = orders(10_000, some_keys(40))
    assert abs(int((found == np.arange(10_000)).sum()) - 40) < 4 * np.sqrt(40)


def test_the_mixing_is_the_published_splitmix64() -> None:
    """The first outputs of SplitMix64 from seed 1234567, as its authors publish them."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mixed(np.full(5, 1234567, np.uint64), np.arange(5)).tolist() == published


def test_the_order_never_changes() -> None:
    """A run goes on after an upgrade of anything: these numbers are fixed for ever."""
    assert orders(10, np.array([0, 2**64 - 1], np.uint64)).tolist() == [
        [8, 3, 2, 1, 4, 6, 0, 5, 7, 9],
        [8, 4, 2, 1, 6, 9, 0, 3, 5, 7],
    ]
