"""Each sampler's order of convergence on a Gaussian mixture, whose score is known.

Deterministic samplers are held pathwise to the probability flow's fine solution. Stochastic ones are held in
distribution: coarse and fine runs share one Brownian path, so that the difference of their moments is small noise.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sumizome.diffusion.sampler_steps import fresh_noise
from sumizome.diffusion.samplers import SAMPLERS, SamplerName, SamplerState

MEANS, DEVIATIONS, WEIGHTS = (-1.0, 0.3, 1.2), (0.3, 0.5, 0.4), (0.5, 0.2, 0.3)
LogGrid = Callable[[float, float, int], Tensor]


def _mixture(x: Tensor, sigma: float) -> Tensor:
    """The exact D(x, sigma): each component's own, weighted by how likely it is behind x."""
    likelihoods, pictures = [], []
    for mean, deviation, weight in zip(MEANS, DEVIATIONS, WEIGHTS, strict=True):
        variance = deviation**2 + sigma**2
        likelihoods.append(math.log(weight) - math.log(variance) / 2 - (x - mean) ** 2 / (2 * variance))
        pictures.append(mean + (x - mean) * (deviation**2 / variance))
    return (torch.softmax(torch.stack(likelihoods), 0) * torch.stack(pictures)).sum(0)


def _last(states: Iterator[SamplerState]) -> Tensor:
    *_, state = states
    return state.x


@pytest.fixture(scope="module")
def flow(log_grid: LogGrid) -> tuple[Tensor, Tensor]:
    """(starts at sigma 10, where the probability flow takes them at 0.05)."""
    quantiles = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    x = (10 * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).view(-1, 1, 1, 1)
    return x, _last(SAMPLERS["unipc"](_mixture, x, log_grid(10.0, 0.05, 1200), lambda key: x))


@pytest.mark.parametrize(
    ("name", "order"),
    [("euler", 1), ("ddim", 1), ("euler_cfg_pp", 1), ("heun", 2), ("dpm2", 2), ("dpmpp_2m", 2), ("unipc", 3)],
)
def test_deterministic_samplers_converge_at_their_order(
    flow: tuple[Tensor, Tensor], log_grid: LogGrid, name: SamplerName, order: int
) -> None:
    x, expected = flow
    errors = [
        float((_last(SAMPLERS[name](_mixture, x, log_grid(10.0, 0.05, steps), lambda key: x)) - expected).norm())
        for steps in (80, 160)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_lms_is_of_fourth_order_until_its_start_shows(flow: tuple[Tensor, Tensor], log_grid: LogGrid) -> None:
    """Its first step is Euler's, as in k-diffusion, whose error of second order is what remains on fine grids."""
    x, expected = flow
    errors = [
        float((_last(SAMPLERS["lms"](_mixture, x, log_grid(10.0, 0.05, steps), lambda key: x)) - expected).norm())
        for steps in (40, 80, 640, 1280)
    ]
    assert math.log2(errors[0] / errors[1]) > 3
    assert math.log2(errors[2] / errors[3]) == pytest.approx(2, abs=0.2)


class Paths:
    """Many reverse Brownian paths over a fine grid, with the antithetic of each."""

    def __init__(self, log_grid: LogGrid, steps: int = 160, count: int = 40_000) -> None:
        random = torch.Generator().manual_seed(0)
        self.steps = steps
        self._levels = log_grid(10.0, 0.05, 2 * steps).tolist()
        half = torch.randn(2 * steps, count // 2, 1, 1, 1, generator=random, dtype=torch.float64)
        self._noise = torch.cat([half, -half], 1)
        which = torch.multinomial(torch.tensor(WEIGHTS, dtype=torch.float64), count // 2, True, generator=random)
        means, deviations = (torch.tensor(v, dtype=torch.float64)[which] for v in (MEANS, DEVIATIONS))
        start = means + (deviations**2 + 100).sqrt() * torch.randn(count // 2, generator=random, dtype=torch.float64)
        self.start = torch.cat([start, start]).view(-1, 1, 1, 1)

    def unit_noise(self, first: int, last: int) -> Tensor:
        """What a step between two fine levels adds, at unit variance."""
        total = torch.zeros_like(self.start)
        for index in range(first, last):
            ratio = self._levels[index + 1] / self._levels[index]
            total = ratio**2 * total + fresh_noise(*self._levels[index : index + 2]) * self._noise[index]
        return total / fresh_noise(self._levels[first], self._levels[last])


def _sampled(name: SamplerName, paths: Paths, log_grid: LogGrid, steps: int) -> Tensor:
    length = 2 * paths.steps // steps

    def noise(key: int) -> Tensor:
        if name != "dpmpp_sde":
            return paths.unit_noise(key * length, (key + 1) * length)
        return paths.unit_noise(key * length // 2, (key + 1) * length // 2)

    return _last(SAMPLERS[name](_mixture, paths.start, log_grid(10.0, 0.05, steps), noise))


@pytest.fixture(scope="module")
def paths(log_grid: LogGrid) -> Paths:
    return Paths(log_grid)


@pytest.fixture(scope="module")
def second_moment(paths: Paths, log_grid: LogGrid) -> float:
    return float(_sampled("dpmpp_sde", paths, log_grid, paths.steps).square().mean())


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler_ancestral", 1),
        ("dpm2_ancestral", 2),
        ("dpmpp_2s_ancestral", 2),
        ("dpmpp_2m_sde", 2),
        ("dpmpp_sde", 2),
    ],
)
def test_stochastic_samplers_converge_at_their_weak_order(
    paths: Paths, second_moment: float, log_grid: LogGrid, name: SamplerName, order: int
) -> None:
    errors = [float(_sampled(name, paths, log_grid, steps).square().mean()) - second_moment for steps in (10, 20)]
    assert math.log2(abs(errors[0] / errors[1])) == pytest.approx(order, abs=0.4)


def test_third_order_sde_is_nearer_than_second(paths: Paths, second_moment: float, log_grid: LogGrid) -> None:
    """Its deterministic part is of third order; the noise within a step holds its moments to the second."""
    errors = {
        name: abs(float(_sampled(name, paths, log_grid, 10).square().mean()) - second_moment)
        for name in ("dpmpp_2m_sde", "dpmpp_3m_sde")
    }
    assert errors["dpmpp_3m_sde"] < 0.5 * errors["dpmpp_2m_sde"]
