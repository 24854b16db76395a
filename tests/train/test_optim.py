"""Learning rate as a function of the step, weight decay where it belongs, and an AdamW step in closed form."""

import math

import pytest
import torch
from torch import nn

from sumizome.errors import ConfigError
from sumizome.train.optim import OptimConfig, apply_lr, build_optimizer, lr_factor


def test_the_warm_up_is_linear_and_starts_above_zero() -> None:
    config = OptimConfig(warmup_steps=4)
    assert [lr_factor(config, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_and_linear_fall_to_the_final_factor() -> None:
    cosine = OptimConfig(warmup_steps=10, lr_schedule="cosine", final_lr_factor=0.1)
    assert lr_factor(cosine, 10, 110) == 1
    assert lr_factor(cosine, 60, 110) == pytest.approx(0.55)
    assert lr_factor(cosine, 110, 110) == pytest.approx(0.1)
    linear = OptimConfig(warmup_steps=10, lr_schedule="linear")
    assert lr_factor(linear, 85, 110) == pytest.approx(0.25)


def test_text_encoders_have_their_own_rate_and_gains_are_not_decayed() -> None:
    parameters = {
        "unet.weight": nn.Parameter(torch.ones(2, 2)),
        "unet.bias": nn.Parameter(torch.ones(2)),
        "text_encoder.weight": nn.Parameter(torch.ones(2, 2)),
    }
    optimizer = build_optimizer(OptimConfig(lr=1e-3, text_encoder_lr=1e-4, weight_decay=0.1), parameters)
    assert apply_lr(optimizer, 0.5) == 5e-4
    found = {(g["lr"], g["weight_decay"], g["params"][0].ndim) for g in optimizer.param_groups}
    assert found == {(5e-4, 0.1, 2), (5e-4, 0.0, 1), (5e-5, 0.1, 2)}


def test_the_first_step_is_adams_closed_form() -> None:
    weight = nn.Parameter(torch.full((1, 2), 3.0))
    optimizer = build_optimizer(OptimConfig(lr=0.1, weight_decay=0.5), {"unet.w": weight})
    weight.grad = torch.tensor([[2.0, -7.0]])
    optimizer.step()
    # Bias-corrected, the first step of Adam is lr·sign(gradient); decoupled decay shrinks the weight by lr·decay first.
    expected = 3.0 * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(weight.data, expected)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"text_encoder_lr": -1.0}, {"warmup_steps": -1}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        OptimConfig(**settings)


def test_no_factor_is_ever_negative_or_not_finite() -> None:
    for schedule in ("constant", "cosine", "linear"):
        config = OptimConfig(warmup_steps=0, lr_schedule=schedule)
        assert all(
            0 <= lr_factor(config, step, 10) <= 1 and math.isfinite(lr_factor(config, step, 10)) for step in range(15)
        )
