"""Guidance against diffusers' formulas on the velocity, and against what each setting promises."""

import math

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from sumizome.diffusion.denoiser import Denoiser
from sumizome.diffusion.guidance import GuidanceConfig, build_guided_denoiser, guide
from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import TERMINAL_SIGMA, NoiseSchedule
from sumizome.errors import ConfigError


def _noise(seed: int) -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Network:
    """Answers the first b rows of 2b, or b rows, with one bias and the rest with another; counts rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        self.rows.append(len(noised_latents))
        cond, uncond = noised_latents[:3], noised_latents[3:]
        return torch.cat([torch.tanh(cond) + 0.3, torch.tanh(2 * uncond) - 0.1])


def _guided(schedule: NoiseSchedule, config: GuidanceConfig, kind: PredictionType = "v_prediction"):  # type: ignore[no-untyped-def]
    network = Network()
    denoiser = Denoiser(schedule, kind, network)
    return build_guided_denoiser(config, denoiser, denoiser), network


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_formula_equals_diffusers(rescale: float) -> None:
    cond, uncond = _noise(0), _noise(1)
    theirs = uncond + 5.0 * (cond - uncond)
    if rescale:
        theirs = rescale_noise_cfg(theirs, cond, guidance_rescale=rescale)
    torch.testing.assert_close(guide(cond, uncond, 5.0, rescale), theirs)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("sigma", [0.0292, 1.0, 56.178, TERMINAL_SIGMA])
def test_guided_denoiser_is_guidance_on_the_velocity(schedule: NoiseSchedule, sigma: float, rescale: float) -> None:
    """The denoised that comes back is that of the velocity which diffusers would hand to its scheduler."""
    guided, network = _guided(schedule, GuidanceConfig(5.0, rescale))
    x = _noise(2) * sigma
    velocities: list[Tensor] = []

    def from_velocities(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        both = network(torch.cat([noised_latents] * 2), torch.cat([timesteps] * 2))
        cond, uncond = both.chunk(2)
        velocities.append(uncond + 5.0 * (cond - uncond))
        return rescale_noise_cfg(velocities[0], cond, guidance_rescale=rescale) if rescale else velocities[0]

    expected = Denoiser(schedule, "v_prediction", from_velocities)(x, sigma)
    torch.testing.assert_close(guided(x, sigma), expected, rtol=1e-4, atol=2e-5)


def test_rescale_does_not_depend_on_what_the_network_predicts(schedule: NoiseSchedule) -> None:
    """The same two pictures, said as velocity or as sample, must be guided alike."""
    cond, uncond = _noise(3), _noise(4)
    config = GuidanceConfig(4.0, 0.7)
    x, sigma = _noise(5) * 2, 2.0
    pictures = torch.cat([cond, uncond])
    as_sample = Denoiser(schedule, "sample", lambda *_: pictures)
    c_in, both = 1 / math.sqrt(1 + sigma**2), torch.cat([x, x])
    velocities = (c_in * c_in * both - pictures) / (sigma * c_in)
    as_velocity = Denoiser(schedule, "v_prediction", lambda *_: velocities)
    results = [build_guided_denoiser(config, d, d)(x, sigma) for d in (as_sample, as_velocity)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_full_rescale_restores_the_conditional_deviation() -> None:
    cond, uncond = _noise(6), _noise(7)
    rescaled = guide(cond, uncond, 9.0, 1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


def test_scale_one_never_asks_for_the_unconditional_half(schedule: NoiseSchedule) -> None:
    guided, network = _guided(schedule, GuidanceConfig(1.0, 0.7))
    guided(_noise(8), 1.0)
    assert network.rows == [3]


def test_scale_zero_is_unconditional() -> None:
    cond, uncond = _noise(9), _noise(10)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)


def test_skipping_above_a_sigma_is_conditional_there_and_guided_below(schedule: NoiseSchedule) -> None:
    skipping, network = _guided(schedule, GuidanceConfig(5.0, skip_above_sigma=19.0))
    always, _ = _guided(schedule, GuidanceConfig(5.0))
    never, _ = _guided(schedule, GuidanceConfig(1.0))
    x = _noise(11)
    for sigma in (25.9, TERMINAL_SIGMA, math.inf):
        assert torch.equal(skipping(x, sigma), never(x, sigma))
    for sigma in (19.0, 15.96):
        assert torch.equal(skipping(x, sigma), always(x, sigma))
    assert network.rows == [3, 3, 3, 6, 6]


def test_rescale_of_a_flat_prediction_is_finite() -> None:
    flat = torch.ones(3, 4, 8, 8)
    assert guide(flat, flat, 5.0, 0.7).isfinite().all()


def test_guidance_is_finite_at_infinity(schedule: NoiseSchedule) -> None:
    guided, _ = _guided(schedule, GuidanceConfig(5.0, 0.7))
    assert guided(_noise(12), math.inf).isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        *({"guidance_scale": value} for value in (-1.0, math.nan, math.inf)),
        *({"guidance_rescale": value} for value in (1.5, -0.1, math.nan, math.inf)),
        *({"skip_above_sigma": value} for value in (math.nan, math.inf, -math.inf)),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, float]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        GuidanceConfig(**settings)  # type: ignore[arg-type]


def test_scale_follows_sigma(schedule: NoiseSchedule) -> None:
    """Piecewise constant; a part at scale 1 costs single rows."""
    config = GuidanceConfig(7.0, scale_by_sigma=(20.0, 5.0, 1.0, 1.0))
    assert [config.scale_at(sigma) for sigma in (TERMINAL_SIGMA, 20.0, 19.9, 1.0, 0.99)] == [7, 7, 5, 5, 1]
    guided, network = _guided(schedule, config)
    x = _noise(13)
    for sigma, scale in ((30.0, 7.0), (5.0, 5.0), (0.5, 1.0)):
        assert torch.equal(guided(x, sigma), _guided(schedule, GuidanceConfig(scale))[0](x, sigma))
    assert network.rows == [6, 6, 3]


@pytest.mark.parametrize(
    "pairs",
    [(20.0,), (20.0, 5.0, 20.0, 3.0), (-1.0, 5.0), (5.0, -1.0)]
    + [(bad, 5.0) for bad in (math.nan, math.inf)]
    + [(5.0, bad) for bad in (math.nan, math.inf)],
)
def test_impossible_scales_by_sigma_are_named(pairs: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="scale_by_sigma must be pairs"):
        GuidanceConfig(scale_by_sigma=pairs)
