"""Samplers against k-diffusion step by step, closed forms of Gaussian data, and a network that knows the picture."""

import math
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import Tensor

from sumizome.diffusion.denoiser import Denoiser
from sumizome.diffusion.guidance import GuidanceConfig, build_guided_denoiser
from sumizome.diffusion.prediction import training_target
from sumizome.diffusion.samplers import HEUN_SIGMA_MAX, SAMPLERS, SamplerName, SamplerState
from sumizome.diffusion.schedule import TERMINAL_SIGMA, NoiseSchedule
from sumizome.diffusion.sigmas import Grid, build_sigmas
from sumizome.errors import ConfigError

NAMES: tuple[SamplerName, ...] = get_args(SamplerName)
STOCHASTIC: tuple[SamplerName, ...] = (
    "euler_ancestral",
    "dpm2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_sde",
)
DETERMINISTIC = tuple(name for name in NAMES if name not in STOCHASTIC)
TWO_FIRST: tuple[SamplerName, ...] = ("dpmpp_sde", "dpmpp_2s_ancestral")
"""Samplers that evaluate twice in the step from pure noise."""
K_DIFFUSION_NAMES = {"dpm2": "dpm_2", "dpm2_ancestral": "dpm_2_ancestral"}
IN_K_DIFFUSION = tuple(name for name in NAMES if name not in ("ddim", "unipc", "euler_cfg_pp"))

Denoise = Callable[[Tensor, float], Tensor]
Gaussian = Callable[[float, float], Denoise]
LogGrid = Callable[[float, float, int], Tensor]


def _last(states: Iterator[SamplerState]) -> Tensor:
    *_, state = states
    return state.x


def _seeded(key: int) -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def _no_noise(key: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def _curved(x: Tensor, sigma: float) -> Tensor:
    """An arbitrary denoiser, neither linear nor constant."""
    return torch.tanh(x / (1 + sigma)) + 0.2 * x / (1 + sigma**2)


def _reference_noise(name: SamplerName) -> Callable[[Tensor, Tensor], Tensor]:
    """Our noises in k-diffusion's order. Its dpmpp_sde asks twice a step, for the half and for the whole of it."""
    if name != "dpmpp_sde":
        keys = iter(range(1000))
        return lambda sigma, sigma_next: _seeded(next(keys))
    calls = iter(range(1000))
    started: list[tuple[Tensor, Tensor]] = []

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        call = next(calls)
        if call % 2 == 0:
            started.append((_seeded(call), sigma_next))
            return started[-1][0]
        first, middle = started[-1]
        # The same Brownian path over the whole step, at unit variance.
        early = sigma_next**2 / middle * (1 - (middle / sigma) ** 2) ** 0.5
        late = sigma_next * (1 - (sigma_next / middle) ** 2) ** 0.5
        return (early * first + late * _seeded(call)) / (early**2 + late**2) ** 0.5

    return noise


@pytest.mark.parametrize("steps", [2, 12])
@pytest.mark.parametrize("name", IN_K_DIFFUSION)
def test_each_step_equals_k_diffusions(schedule: NoiseSchedule, k_diffusion, name: SamplerName, steps: int) -> None:  # type: ignore[no-untyped-def]
    sigmas = build_sigmas("native", steps, schedule, 14.6)
    x = _seeded(10_000) * 14.6
    theirs: list[tuple[Tensor, Tensor]] = []
    options = {"noise_sampler": _reference_noise(name)} if name in STOCHASTIC else {}
    final = getattr(k_diffusion.sampling, f"sample_{K_DIFFUSION_NAMES.get(name, name)}")(
        lambda x, sigma: _curved(x, float(sigma[0])),
        x,
        sigmas,
        callback=lambda state: theirs.append((state["x"], state["denoised"])),
        disable=True,
        **options,
    )
    ours = list(SAMPLERS[name](_curved, x, sigmas, _seeded if name in STOCHASTIC else _no_noise))
    assert [state.step for state in ours] == list(range(steps))
    assert [state.sigma for state in ours] == sigmas[:-1].tolist()
    assert [state.sigma_next for state in ours] == sigmas[1:].tolist()
    for state, (_, denoised) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(state.denoised, denoised)
    for state, (x_next, _) in zip(ours, theirs[1:], strict=False):
        torch.testing.assert_close(state.x, x_next)
    torch.testing.assert_close(ours[-1].x, final)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_step_is_the_denoiser(schedule: NoiseSchedule, name: SamplerName) -> None:
    x = _seeded(0) * TERMINAL_SIGMA
    sigmas = build_sigmas("native", 1, schedule)
    assert torch.equal(_last(SAMPLERS[name](_curved, x, sigmas, _no_noise)), _curved(x, TERMINAL_SIGMA))


def test_euler_is_ddim_of_diffusers(schedule: NoiseSchedule) -> None:
    """On the VP scale, from true infinity, with any velocity."""
    reference = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    reference.alphas_cumprod = schedule.alphas_cumprod
    reference.set_timesteps(10)
    sample = _seeded(0)

    def predict(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        return torch.tanh(noised_latents + timesteps.view(-1, 1, 1, 1) / 500)

    # DDIM goes from t to t − T/steps, which is where the trailing grid stands.
    expected = sample
    for timestep in reference.timesteps:
        output = predict(expected, timestep.expand(2))
        expected = reference.step(output, timestep, expected).prev_sample
    sigmas = build_sigmas("trailing", 10, schedule)
    denoise = Denoiser(schedule, "v_prediction", predict, torch.float64)
    ours = _last(SAMPLERS["euler"](denoise, sample * TERMINAL_SIGMA, sigmas, _no_noise))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)


def test_unipc_is_diffusers(schedule: NoiseSchedule) -> None:
    """On the VP scale, with a network that answers the picture itself; both end in the last evaluation."""
    sigmas = build_sigmas("native", 10, schedule, 14.6)
    reference = UniPCMultistepScheduler(
        solver_order=2, solver_type="bh2", prediction_type="sample", final_sigmas_type="zero", lower_order_final=True
    )
    reference.set_timesteps(10)
    reference.sigmas = sigmas
    start = _seeded(0) * 14.6
    sample = start / math.sqrt(1 + 14.6**2)
    for timestep, sigma in zip(reference.timesteps, sigmas[:-1].tolist(), strict=True):
        picture = _curved(sample * math.sqrt(1 + sigma**2), sigma)
        sample = reference.step(picture, timestep, sample).prev_sample
    ours = _last(SAMPLERS["unipc"](_curved, start, sigmas, _no_noise))
    torch.testing.assert_close(ours, sample, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_networks_stay_finite_from_20000(
    schedule: NoiseSchedule, name: SamplerName, dtype: torch.dtype
) -> None:
    """The network sees unit-sized input in its own dtype; the state of float32 reaches what float32 would within it."""

    def predict(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        return torch.tanh(noised_latents * 1.5 + timesteps.view(-1, 1, 1, 1).to(noised_latents.dtype) / 700)

    sigmas = build_sigmas("native", 8, schedule)
    start = _seeded(6).float() * TERMINAL_SIGMA
    finals = []
    for network_dtype in (dtype, torch.float32):
        denoise = Denoiser(schedule, "v_prediction", predict, network_dtype)
        states = list(SAMPLERS[name](denoise, start, sigmas, lambda key: _seeded(key).float()))
        assert all(state.x.isfinite().all() and state.x.dtype == torch.float32 for state in states)
        finals.append(states[-1].x)
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1.0 if dtype == torch.bfloat16 else 0.1)


def test_cfg_pp_renoises_with_the_unguided_picture(schedule: NoiseSchedule) -> None:
    """From x, guided picture g and unguided picture u: g + s'/s·(x − u), at every scale."""
    cond, uncond = _seeded(1), _seeded(2)
    for scale in (1.0, 1.5):
        guided = build_guided_denoiser(
            GuidanceConfig(scale), lambda x, sigma: cond, lambda x, sigma: torch.cat([cond, uncond])
        )
        x, sigmas = _seeded(0) * 14.6, torch.tensor([14.6, 5.0, 0.0], dtype=torch.float64)
        first = next(SAMPLERS["euler_cfg_pp"](guided, x, sigmas, _no_noise))
        picture = uncond + scale * (cond - uncond)
        torch.testing.assert_close(first.x, picture + 5.0 / 14.6 * (x - uncond))


def _variance(name: SamplerName, denoise: Denoise, sigmas: Tensor, initial_variance: float) -> float:
    """The exact variance of what a sampler makes of N(0, initial_variance), where `denoise` is linear.

    The result is a linear form in the first state and each noise: row i of the batch gets the i-th of them alone.
    """
    rows = 2 * len(sigmas)
    x = torch.zeros(rows, 1, 1, 1, dtype=torch.float64)
    x[-1] = math.sqrt(initial_variance)

    def noise(key: int) -> Tensor:
        unit = torch.zeros_like(x)
        unit[key] = 1
        return unit

    return float(_last(SAMPLERS[name](denoise, x, sigmas, noise)).square().sum())


@pytest.mark.parametrize(
    ("name", "order"),
    [("euler", 1), ("euler_ancestral", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2m_sde", 2), ("dpmpp_sde", 2)],
)
def test_gaussian_variance_converges_at_the_samplers_order(
    gaussian_denoiser: Gaussian, log_grid: LogGrid, name: SamplerName, order: int
) -> None:
    """Data N(0, 0.5²) have variance 0.25 + sigma² at each sigma: halving the steps must divide the error by 2^order."""
    errors = []
    for steps in (160, 320):
        sigmas = log_grid(10.0, 0.01, steps)
        variance = _variance(name, gaussian_denoiser(0.0, 0.5), sigmas, 0.25 + 10.0**2)
        errors.append(variance / (0.25 + 0.01**2) - 1)
    assert abs(errors[1]) < (0.03 if order == 1 else 0.001)
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_gaussian_mean_is_reached_exactly(gaussian_denoiser: Gaussian, log_grid: LogGrid, name: SamplerName) -> None:
    """Started at its own mean, nothing moves it but noise; the noise here is 0."""
    x = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    x = _last(
        SAMPLERS[name](gaussian_denoiser(0.7, 0.5), x, log_grid(20000.0, 0.03, 28), lambda _: torch.zeros_like(x))
    )
    assert float(x) == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_trajectory_follows_the_probability_flow(
    gaussian_denoiser: Gaussian, log_grid: LogGrid, name: SamplerName
) -> None:
    """For data N(μ, s²) the flow is x(σ) = μ + (x(σ₀) − μ)·√((s² + σ²)/(s² + σ₀²))."""
    x, mean, deviation = _seeded(3) * 14, 0.7, 0.4
    for state in SAMPLERS[name](gaussian_denoiser(mean, deviation), x, log_grid(14.0, 0.03, 800), _no_noise):
        shrunk = math.sqrt((deviation**2 + state.sigma_next**2) / (deviation**2 + 14.0**2))
        torch.testing.assert_close(state.x, mean + (x - mean) * shrunk, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("grid", get_args(Grid))
@pytest.mark.parametrize("name", NAMES)
def test_oracle_network_draws_its_picture_from_20000_in_float32(
    schedule: NoiseSchedule, name: SamplerName, grid: Grid
) -> None:
    """A network that always answers the velocity of one known picture, float32 throughout."""
    picture = _seeded(4).float()

    def predict(noised_latents: Tensor, timesteps: Tensor) -> Tensor:
        alphas_cumprod = 1 / (1 + sigma_now[-1] ** 2 * torch.ones(2, dtype=torch.float64))
        noise = (noised_latents - alphas_cumprod.sqrt().view(-1, 1, 1, 1) * picture) / (1 - alphas_cumprod).sqrt().view(
            -1, 1, 1, 1
        )
        return training_target("v_prediction", picture, noise.float(), alphas_cumprod)

    sigma_now: list[float] = []
    denoiser = Denoiser(schedule, "v_prediction", predict)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        sigma_now.append(sigma)
        return denoiser(x, sigma)

    x = _seeded(5).float() * TERMINAL_SIGMA
    states = list(SAMPLERS[name](denoise, x, build_sigmas(grid, 28, schedule), lambda key: _seeded(key).float()))
    assert all(state.x.dtype == torch.float32 and state.x.isfinite().all() for state in states)
    torch.testing.assert_close(states[-1].x, picture, rtol=0, atol=5e-6)


@pytest.mark.parametrize("steps", [2, 4, 28])
@pytest.mark.parametrize("name", NAMES)
def test_float32_state_loses_nothing_from_20000(schedule: NoiseSchedule, name: SamplerName, steps: int) -> None:
    """The whole path in float32 and in float64 must agree; float32 coefficients collapse here (interop.md §5)."""
    sigmas = build_sigmas("native", steps, schedule)
    single = _last(SAMPLERS[name](_curved, _seeded(6).float() * 20000, sigmas, lambda key: _seeded(key).float()))
    double = _last(SAMPLERS[name](_curved, _seeded(6) * 20000, sigmas, _seeded))
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_euler_from_infinity_is_the_reports_first_step() -> None:
    """Report §2.2: x₁ = D + σ₁·n."""
    noise, picture = _seeded(7).float(), _seeded(8).float()
    sigmas = torch.tensor([TERMINAL_SIGMA, 56.178, 0], dtype=torch.float64)
    first = next(SAMPLERS["euler"](lambda x, sigma: picture, noise * TERMINAL_SIGMA, sigmas, _no_noise))
    # 20000 is not quite infinite: 56.178/20000 of the step is still to go.
    expected = picture * (1 - 56.178 / TERMINAL_SIGMA) + 56.178 * noise
    torch.testing.assert_close(first.x, expected, rtol=1e-6, atol=2e-5)


def test_ancestral_noise_survives_few_steps(schedule: NoiseSchedule) -> None:
    """In float32 the lower level √(s'² − up²) collapses to 0 at 20000, and k-diffusion then adds no noise at all."""
    sigmas = build_sigmas("native", 4, schedule)
    zeros = torch.zeros(1, 1, 64, 64)
    unit = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    first = next(SAMPLERS["euler_ancestral"](lambda x, sigma: zeros, zeros + 20000, sigmas, lambda key: unit))
    s, s_next = sigmas[:2].tolist()
    torch.testing.assert_close(first.x, s_next**2 / s + unit * s_next, rtol=1e-4, atol=1e-4)


def test_heun_takes_an_euler_step_out_of_pure_noise(schedule: NoiseSchedule, gaussian_denoiser: Gaussian) -> None:
    """With the correction, ten steps from 20000 end with 3.6 times the deviation of N(0, 1)."""
    x = torch.full((1, 1, 1, 1), TERMINAL_SIGMA, dtype=torch.float64)
    final = _last(SAMPLERS["heun"](gaussian_denoiser(0.0, 1.0), x, build_sigmas("native", 10, schedule), _no_noise))
    assert float(final) == pytest.approx(1, abs=0.05)
    assert HEUN_SIGMA_MAX < TERMINAL_SIGMA


@pytest.mark.parametrize("name", STOCHASTIC)
def test_each_noise_is_asked_for_once(schedule: NoiseSchedule, name: SamplerName) -> None:
    keys: list[int] = []

    def noise(key: int) -> Tensor:
        keys.append(key)
        return _seeded(key)

    _last(SAMPLERS[name](_curved, _seeded(0) * 20000, build_sigmas("native", 28, schedule), noise))
    # The last step, to 0, is without noise.
    assert keys == list(range(27 if name != "dpmpp_sde" else 54))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch(schedule: NoiseSchedule, name: SamplerName) -> None:
    sigmas = build_sigmas("native", 6, schedule)
    both = _last(SAMPLERS[name](_curved, _seeded(0) * 20000, sigmas, _seeded))
    alone = _last(SAMPLERS[name](_curved, _seeded(0)[1:] * 20000, sigmas, lambda key: _seeded(key)[1:]))
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize("name", NAMES)
def test_samplers_are_lazy_and_leave_their_input_alone(schedule: NoiseSchedule, name: SamplerName) -> None:
    calls = 0

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return _curved(x, sigma)

    x = _seeded(0) * 20000
    before = x.clone()
    states = SAMPLERS[name](denoise, x, build_sigmas("native", 5, schedule), _seeded)
    assert calls == 0
    first = next(states)
    assert calls == (2 if name in TWO_FIRST else 1)
    kept = first.x.clone()
    next(states)
    assert torch.equal(first.x, kept), "a state that was handed out must not change"
    assert torch.equal(x, before)


@pytest.mark.parametrize("sigmas", [[1.0, 1.0, 0.0], [math.inf, 1.0], [1.0, 2.0], [1.0, -1.0], [1.0], [math.nan, 0.0]])
def test_impossible_grids_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ConfigError, match="strictly decreasing"):
        _last(SAMPLERS["euler"](_curved, _seeded(0), torch.tensor(sigmas, dtype=torch.float64), _no_noise))
