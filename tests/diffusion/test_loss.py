"""The weights against the report's numbers, each other's form and k-diffusion; the loss against arithmetic by hand."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sumizome.diffusion.loss import (
    LossConfig,
    WeightedLoss,
    Weighting,
    build_loss,
    build_loss_weights,
    min_snr_weight,
    snr_loss_weight,
    soft_min_snr_weight,
)
from sumizome.diffusion.prediction import PredictionType, training_target
from sumizome.diffusion.schedule import NoiseSchedule
from sumizome.errors import ConfigError

PLAIN = LossConfig(terminal_floor=0.0)


def test_min_snr_weights_are_the_reports(schedule: NoiseSchedule) -> None:
    """Report §4."""
    weights = build_loss_weights(PLAIN, schedule, "v_prediction")
    assert int(weights.argmax()) == 139
    for timestep, weight in {139: 0.832, 500: 0.241, 900: 0.0030, 962: 3.2e-4, 998: 2e-7}.items():
        assert float(weights[timestep]) == pytest.approx(weight, rel=0.02)
    assert weights[999] == 0


def test_plain_min_snr_gives_the_noisiest_tenth_almost_nothing(schedule: NoiseSchedule) -> None:
    weights = build_loss_weights(PLAIN, schedule, "v_prediction")
    assert float(weights[900:].sum() / weights.sum()) == pytest.approx(3.2e-4, rel=0.02)


def test_floor_reaches_the_noisy_side_only(schedule: NoiseSchedule) -> None:
    plain = build_loss_weights(PLAIN, schedule, "v_prediction")
    floored = build_loss_weights(LossConfig(terminal_floor=0.1), schedule, "v_prediction")
    raised = floored != plain
    assert floored[999] == 0.1
    assert torch.all(floored[raised] == 0.1)
    # MinSNR falls to 0.1 at snr = 1/9, sigma = 3; from there on, and nowhere else, the floor holds.
    assert torch.equal(raised, schedule.snr < 1 / 9)
    assert floored[0] == pytest.approx(5 / (1 / 0.0291672**2 + 1), rel=1e-4)


def test_default_floor_gives_the_terminal_step_a_weight(schedule: NoiseSchedule) -> None:
    assert build_loss_weights(LossConfig(), schedule, "v_prediction")[-1] > 0


@given(snr=st.floats(1e-6, 1e6), gamma=st.floats(0.1, 100))
def test_all_forms_weigh_the_same_error_alike(snr: float, gamma: float) -> None:
    """One x₀ error δ is δ·√snr in epsilon and δ·√(snr + 1) in velocity: the weighted squares must agree."""
    ratio = torch.tensor([snr], dtype=torch.float64)
    for weight in (min_snr_weight, soft_min_snr_weight):
        x0 = weight(ratio, gamma, "sample")
        torch.testing.assert_close(weight(ratio, gamma, "epsilon") * snr, x0)
        torch.testing.assert_close(weight(ratio, gamma, "v_prediction") * (snr + 1), x0)


def test_min_snr_matches_hang_et_al() -> None:
    """2303.09556 with γ = 5: min(SNR, γ) on x₀, min(SNR, γ)/SNR on epsilon, min(SNR, γ)/(SNR + 1) on velocity."""
    snr = torch.tensor([0.25, 5, 20], dtype=torch.float64)
    assert min_snr_weight(snr, 5.0, "sample").tolist() == [0.25, 5, 5]
    assert min_snr_weight(snr, 5.0, "epsilon").tolist() == [1, 1, 0.25]
    assert min_snr_weight(snr, 5.0, "v_prediction").tolist() == pytest.approx([0.2, 5 / 6, 5 / 21])


def test_soft_min_snr_equals_k_diffusions() -> None:
    """There γ = 1 is fixed and the weight is on velocity: sigma²/(sigma² + 1)²."""
    sigma = torch.logspace(-2, 3, 20, dtype=torch.float64)
    expected = sigma**2 / (sigma**2 + 1) ** 2
    torch.testing.assert_close(soft_min_snr_weight(sigma**-2, 1.0, "v_prediction"), expected)


@pytest.mark.parametrize("weight", [min_snr_weight, soft_min_snr_weight])
def test_weights_at_pure_noise_are_their_limits(weight) -> None:  # type: ignore[no-untyped-def]
    nothing = torch.zeros(1, dtype=torch.float64)
    assert weight(nothing, 5.0, "v_prediction").tolist() == [0]
    assert weight(nothing, 5.0, "sample").tolist() == [0]
    assert weight(nothing, 5.0, "epsilon").tolist() == [1], "0/0 elsewhere: a NaN that ends the run"


@given(
    weighting=st.sampled_from(get_args(Weighting)),
    prediction_type=st.sampled_from(get_args(PredictionType)),
    gamma=st.floats(0.01, 1000),
    terminal_floor=st.floats(0, 1),
    snr=st.floats(0, 1e9),
)
def test_every_weight_is_finite_and_bounded(
    weighting: Weighting, prediction_type: PredictionType, gamma: float, terminal_floor: float, snr: float
) -> None:
    ratio = torch.tensor([snr], dtype=torch.float64)
    weight = float(snr_loss_weight(LossConfig(weighting, gamma, terminal_floor), ratio, prediction_type))
    assert math.isfinite(weight)
    assert 0 <= weight <= max(1, gamma)
    assert snr >= 1 or weight >= terminal_floor


def test_uniform_is_one(plain_schedule: NoiseSchedule) -> None:
    weights = build_loss_weights(LossConfig("uniform"), plain_schedule, "epsilon")
    assert torch.equal(weights, torch.ones(1000, dtype=torch.float64))


def test_loss_is_the_weighted_mean_square() -> None:
    loss = WeightedLoss(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    model_output = torch.tensor([[[[3.0, 1.0]]], [[[0.0, 2.0]]]], requires_grad=True)
    target = torch.tensor([[[[1.0, 1.0]]], [[[0.0, 0.0]]]])
    result = loss(model_output, target, torch.tensor([2, 0]), torch.tensor([0.5, 3.0]))
    assert result.unweighted.tolist() == [2, 2]
    assert result.weighted.tolist() == [2 * 100 * 0.5, 2 * 1 * 3]
    assert not result.unweighted.requires_grad
    result.weighted.sum().backward()
    assert model_output.grad is not None
    assert model_output.grad.tolist() == [[[[100.0, 0.0]]], [[[0.0, 6.0]]]]


def test_perfect_network_has_no_loss(schedule: NoiseSchedule) -> None:
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    target = training_target("v_prediction", latents, noise, schedule.alphas_cumprod_of(timesteps))
    weighted, unweighted = build_loss(LossConfig(), schedule, "v_prediction")(target, target, timesteps)
    assert weighted.tolist() == unweighted.tolist() == [0, 0, 0]


def test_half_precision_outputs_are_compared_in_float32() -> None:
    loss = WeightedLoss(torch.ones(1, dtype=torch.float64))
    model_output, target = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16), torch.zeros(1, 1, 1, 1)
    assert loss(model_output, target, torch.tensor([0])).weighted.item() == 90000, "above float16's largest, 65504"


def test_nan_survives_a_weight_of_zero(schedule: NoiseSchedule) -> None:
    """peers.md, trap 7: NaN latents that are silently trained on."""
    loss = build_loss(PLAIN, schedule, "v_prediction")
    broken = torch.full((1, 4, 2, 2), math.nan)
    result = loss(broken, torch.zeros(1, 4, 2, 2), torch.tensor([999]))
    assert result.weighted.isnan().all()
    assert result.unweighted.isnan().all()


def test_epsilon_at_zero_terminal_snr_is_refused(schedule: NoiseSchedule) -> None:
    with pytest.raises(ConfigError, match="zero_terminal_snr"):
        build_loss(LossConfig(), schedule, "epsilon")


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"terminal_floor": -0.1}, {"terminal_floor": 1.5}])
def test_impossible_settings_are_named(settings: dict[str, float]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        LossConfig(**settings)  # type: ignore[arg-type]
