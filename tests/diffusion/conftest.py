"""References that the maths is held against: k-diffusion's own files, and a network that is right by construction."""

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sumizome.diffusion.schedule import NoiseSchedule, ScheduleConfig, build_noise_schedule


@pytest.fixture(scope="session")
def schedule() -> NoiseSchedule:
    """SDXL's, rescaled to zero terminal SNR."""
    return build_noise_schedule(ScheduleConfig())


@pytest.fixture(scope="session")
def plain_schedule() -> NoiseSchedule:
    """SDXL's own."""
    return build_noise_schedule(ScheduleConfig(zero_terminal_snr=False))


@pytest.fixture(scope="session")
def k_diffusion() -> types.SimpleNamespace:
    """k-diffusion's `sampling` and `external`, without its package `__init__`, which needs torchvision."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    folder = Path(next(iter(spec.submodule_search_locations)))
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(folder)]  # type: ignore[attr-defined]
    sys.modules["k_diffusion"] = package
    # `utils` is the part that imports torchvision; of it, the two modules use one function.
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, ndim: x.reshape(x.shape + (1,) * (ndim - x.ndim))  # type: ignore[attr-defined]
    sys.modules["k_diffusion.utils"] = package.utils = utils  # type: ignore[attr-defined]
    return types.SimpleNamespace(
        sampling=importlib.import_module("k_diffusion.sampling"),
        external=importlib.import_module("k_diffusion.external"),
    )


@pytest.fixture(scope="session")
def gaussian_denoiser() -> Callable[[float, float], Callable[[torch.Tensor, float], torch.Tensor]]:
    """(mean, deviation) → the exact D(x, sigma) of data N(mean, deviation²)."""

    def build(mean: float, deviation: float) -> Callable[[torch.Tensor, float], torch.Tensor]:
        return lambda x, sigma: mean + (x - mean) * (deviation**2 / (deviation**2 + sigma**2))

    return build


@pytest.fixture(scope="session")
def log_grid() -> Callable[[float, float, int], torch.Tensor]:
    """(first, last, steps) → float64 sigmas, even in log sigma, without a final 0."""

    def build(first: float, last: float, steps: int) -> torch.Tensor:
        return torch.linspace(math.log(first), math.log(last), steps + 1, dtype=torch.float64).exp()

    return build
