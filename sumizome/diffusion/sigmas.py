"""Which noise levels a sampler visits: grids over a schedule, from a largest sigma down to 0.

Owns where sampling starts (pure noise, a number, or the canvas's own) and how the levels are spaced. The invariant: a
grid is float64, finite, strictly decreasing and ends in 0; pure noise stands in it as TERMINAL_SIGMA.

Notation: `steps` is the number of network evaluations of a first-order sampler; a grid has steps + 1 entries.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, assert_never

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sumizome.diffusion.schedule import COMFYUI_TERMINAL_SIGMA, TERMINAL_SIGMA, NoiseSchedule
from sumizome.errors import ConfigError

__all__ = [
    "BASE_CANVAS",
    "BASE_SIGMA_MAX",
    "REMAINDER_SIGMA_MAX",
    "Grid",
    "SigmaMax",
    "Sigmas",
    "build_sigmas",
    "scaled_sigma_max",
    "starting_sigma",
]

Grid: TypeAlias = Literal[
    "native", "trailing", "sgm_uniform", "simple", "beta", "karras", "exponential", "polyexponential", "kl_optimal"
]
"""native: even in timesteps, the report's · trailing, simple, sgm_uniform: the same without timestep 0 at the end, as
diffusers and ComfyUI round it · beta: denser at both ends, ComfyUI's · karras, exponential: even in sigma^(1/7) or log
sigma, below one terminal step where there is pure noise · polyexponential: with k-diffusion's exponent of 1 the same as
exponential · kl_optimal: even in the angle atan(sigma)."""

SigmaMax: TypeAlias = float | Literal["pure", "ui", "canvas"]
"""pure: the schedule's last timestep · ui: 4518.76, the infinity of ComfyUI and A1111 · canvas: `scaled_sigma_max` of
the canvas · a number: that sigma."""

Sigmas: TypeAlias = Float[Tensor, " levels"]
"""A sampling grid, float64 [steps + 1]."""

BASE_SIGMA_MAX = 14.6146
"""Largest sigma of SDXL's own schedule, which it took over from models of BASE_CANVAS."""

BASE_CANVAS = (512, 512)
"""(height, width) in pixels, eight to a latent. At 1024² the rule gives 29.2, the report's 29 (§2.3)."""

REMAINDER_SIGMA_MAX = 56.178239
"""Where karras and exponential go on after the terminal step: the second sigma of the report's 28 steps. Spaced from
20000 itself, 21 of 28 karras steps would stay above 14.6, where almost nothing is decided."""

_KARRAS_RHO = 7.0
_BETA_SHAPE = 0.6


def build_sigmas(
    grid: Grid,
    steps: int,
    schedule: NoiseSchedule,
    sigma_max: SigmaMax = "pure",
    canvas: tuple[int, int] | None = None,
    base_sigma_max: float = BASE_SIGMA_MAX,
) -> Sigmas:
    """The grid of `steps` evaluations and the final 0, float64 on the CPU. `canvas`, `base_sigma_max`: for "canvas".

    Raises:
        ConfigError: too few or too many steps, or a sigma_max that is not on the schedule.
    Source: report §6 (native) and §2.3 (finite sigma_max); Karras et al. 2206.00364, eq. 5.
    """
    if steps < 1:
        raise ConfigError(f"steps must be 1 or more, found {steps}; 28 is usual")
    start = starting_sigma(sigma_max, schedule, canvas, base_sigma_max)
    match grid:
        case "native":
            levels = _native(steps, schedule, start)
        case "trailing":
            levels = _trailing(steps, schedule, start)
        case "sgm_uniform":
            levels = _native(steps + 1, schedule, start)[:-1]
        case "simple":
            levels = _simple(steps, schedule, start)
        case "beta":
            levels = _beta(steps, schedule, start)
        case "karras":
            levels = _below_terminal(_karras, steps, schedule, start)
        case "exponential" | "polyexponential":
            levels = _below_terminal(_exponential, steps, schedule, start)
        case "kl_optimal":
            # Every infinity is spaced as ComfyUI's, so that it changes the first level alone.
            widest = COMFYUI_TERMINAL_SIGMA if _is_terminal(schedule, start) else start
            levels = _kl_optimal(steps, widest, float(schedule.sigmas[0]))
        case _:
            assert_never(grid)
    # The table's own readings of the first level differ from it by rounding, or by infinity.
    levels[0] = start
    return torch.cat([levels, levels.new_zeros(1)])


def starting_sigma(
    sigma_max: SigmaMax,
    schedule: NoiseSchedule,
    canvas: tuple[int, int] | None = None,
    base_sigma_max: float = BASE_SIGMA_MAX,
) -> float:
    """The first sigma of a grid: finite, and within the schedule.

    `canvas` (height, width) counts from BASE_CANVAS, whose sigma is `base_sigma_max`.

    Raises:
        ConfigError: the sigma is not above the schedule's smallest, or is above its largest; "canvas" without one.
    """
    smallest, largest = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    if sigma_max == "pure":
        return min(largest, TERMINAL_SIGMA)
    if sigma_max == "canvas":
        if canvas is None:
            raise ConfigError("sigma_max 'canvas' needs the canvas: give its height and width, or a number")
        sigma = scaled_sigma_max(base_sigma_max, canvas, BASE_CANVAS)
    elif sigma_max == "ui":
        # Where the schedule ends at a finite sigma, so does ComfyUI.
        sigma = min(largest, COMFYUI_TERMINAL_SIGMA)
    else:
        sigma = float(sigma_max)
    if not smallest < sigma <= largest or math.isinf(sigma):
        raise ConfigError(
            f"sigma_max must lie above {smallest:.4g} and be at most {largest:.4f}, found {sigma:.6g}"
            + ("" if schedule.zero_terminal_snr else "; a zero_terminal_snr schedule reaches any sigma")
        )
    return sigma


def scaled_sigma_max(base_sigma_max: float, canvas: tuple[int, int], base_canvas: tuple[int, int]) -> float:
    """base_sigma_max · √(area / base area): neighbouring pixels are redundant, so a larger canvas needs more noise
    to hide as much. An upper bound: it takes the extra pixels as fully redundant. Any unit, the same for both canvases.

    Source: report §2.3; simple diffusion 2301.11093, §3.1.
    """
    (height, width), (base_height, base_width) = canvas, base_canvas
    return base_sigma_max * math.sqrt(height * width / (base_height * base_width))


def _native(steps: int, schedule: NoiseSchedule, start: float) -> Sigmas:
    """Timesteps evenly from the start's to 0: the spacing of k-diffusion's discrete schedules and of the report."""
    return schedule.sigma_of(torch.linspace(_starting_timestep(schedule, start), 0, steps, dtype=torch.float64))


def _trailing(steps: int, schedule: NoiseSchedule, start: float) -> Sigmas:
    """round(T·(1 − i/steps)) − 1 for i = 0, 1, …: diffusers' "trailing", which writes and reads exported models."""
    length = round(_starting_timestep(schedule, start)) + 1
    if steps > length:
        raise ConfigError(f"the trailing grid has {length} timesteps here, found {steps} steps; take fewer, or native")
    timesteps = length * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    return schedule.sigma_of(timesteps.round() - 1)


def _simple(steps: int, schedule: NoiseSchedule, start: float) -> Sigmas:
    """Every (T/steps)-th entry of the table from its end, rounded down. Source: ComfyUI's "simple" scheduler."""
    length = round(_starting_timestep(schedule, start)) + 1
    if steps > length:
        raise ConfigError(f"the simple grid has {length} timesteps here, found {steps} steps; take fewer, or native")
    places = (torch.arange(steps, dtype=torch.float64) * (length / steps)).floor()
    return schedule.sigma_of(length - 1 - places)


def _beta(steps: int, schedule: NoiseSchedule, start: float) -> Sigmas:
    """Timesteps at even quantiles of the Beta(0.6, 0.6) distribution: denser at both ends.

    Source: Beta Sampling 2407.12173; shape and rounding as in ComfyUI.
    """
    last = round(_starting_timestep(schedule, start))
    quantiles = _beta_quantiles(1 - np.arange(steps) / steps)
    timesteps = torch.from_numpy(np.rint(quantiles * last))
    met = len(set(timesteps.tolist()))
    if met < steps:
        raise ConfigError(
            f"the beta grid of {steps} steps meets only {met} of {last + 1} timesteps; take fewer steps, or native"
        )
    return schedule.sigma_of(timesteps)


def _beta_quantiles(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantiles of Beta(a, a) to about 1e-8.

    With x = sin²θ its density is sin(2θ)^(2a−1) dθ, without poles; the distribution is symmetric, so one half is summed
    (midpoint rule in θ) and the other mirrored.
    """
    cells = 200_000
    edges = np.linspace(0, np.pi / 4, cells + 1)
    mass = np.cumsum(np.sin(2 * (edges[1:] + edges[:-1]) / 2) ** (2 * _BETA_SHAPE - 1))
    share = np.concatenate([[0.0], mass / mass[-1]]) / 2
    lower = np.sin(np.interp(np.minimum(shares, 1 - shares), share, edges)) ** 2
    return np.select([shares > 0.5, shares == 0.5], [1 - lower, 0.5], lower)


def _kl_optimal(count: int, sigma_max: float, sigma_min: float) -> Sigmas:
    """`count` levels, evenly spaced in atan(sigma), which pure noise does not stretch: infinity is π/2.

    Source: Align Your Steps 2404.14507, App. B (data N(0, 1)); the end points as in ComfyUI.
    """
    return torch.linspace(math.atan(sigma_max), math.atan(sigma_min), count, dtype=torch.float64).tan()


def _starting_timestep(schedule: NoiseSchedule, start: float) -> float:
    """The timestep of the first sigma; T−1 exactly where it is pure noise to the network."""
    sigma = torch.tensor([start], dtype=torch.float64)
    if _is_terminal(schedule, start):
        return float(schedule.num_timesteps - 1)
    return float(schedule.fractional_timestep_of(sigma))


def _is_terminal(schedule: NoiseSchedule, sigma: float) -> bool:
    """Whether the network sees this sigma as pure noise."""
    nearest = int(schedule.timestep_of(torch.tensor([sigma], dtype=torch.float64)))
    return schedule.zero_terminal_snr and nearest == schedule.num_timesteps - 1


def _below_terminal(
    spacing: Callable[[int, float, float], Sigmas], steps: int, schedule: NoiseSchedule, start: float
) -> Sigmas:
    """`spacing` from a finite start; from pure noise, one terminal step and `spacing` from REMAINDER_SIGMA_MAX."""
    smallest = float(schedule.sigmas[0])
    if not _is_terminal(schedule, start):
        return spacing(steps, start, smallest)
    terminal = torch.tensor([start], dtype=torch.float64)
    return torch.cat([terminal, spacing(steps - 1, REMAINDER_SIGMA_MAX, smallest)])


def _karras(count: int, sigma_max: float, sigma_min: float) -> Sigmas:
    """`count` levels, evenly spaced in sigma^(1/ρ)."""
    first, last = sigma_max ** (1 / _KARRAS_RHO), sigma_min ** (1 / _KARRAS_RHO)
    return torch.linspace(first, last, count, dtype=torch.float64).pow(_KARRAS_RHO)


def _exponential(count: int, sigma_max: float, sigma_min: float) -> Sigmas:
    """`count` levels, evenly spaced in log sigma."""
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), count, dtype=torch.float64).exp()
