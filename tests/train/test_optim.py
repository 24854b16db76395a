"""Learning rate as a function of the step, weight decay where it belongs, and an AdamW step in closed form."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_rex_is_its_closed_form_and_warms_up_too() -> None:
    config = OptimConfig(warmup_steps=10, lr_schedule="rex", final_lr_factor=0.0)
    assert lr_factor(config, 4, 110) == 0.5
    assert lr_factor(config, 10, 110) == 1
    assert lr_factor(config, 60, 110) == pytest.approx(0.5 / 0.75)  # above linear's half
    assert lr_factor(config, 110, 110) == 0


def test_parts_have_rates_of_their_own_and_the_longest_pattern_counts() -> None:
    names = ("unet.up_blocks.0.weight", "unet.up_blocks.1.weight", "unet.mid_block.attn2.weight", "unet.conv_in.weight")
    names += ("text_encoder.a.weight", "text_encoder_2.a.weight")
    parameters = {name: nn.Parameter(torch.ones(2, 2)) for name in names}
    lr_of = {"unet.up_blocks": 0.5, "unet.up_blocks.1": 0.25, "unet.*.attn2": 0.0, "text_encoder_2": 0.1}
    optimizer = build_optimizer(OptimConfig(lr=1e-3, text_encoder_lr=1e-4, lr_of=lr_of, weight_decay=0.1), parameters)
    assert apply_lr(optimizer, 0.5) == 5e-4  # what is told is the plain U-Net's
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = [rate[id(parameters[name])] for name in names]
    assert found == pytest.approx([2.5e-4, 1.25e-4, 0.0, 5e-4, 5e-5, 5e-6])
    for parameter in parameters.values():
        parameter.grad = torch.ones(2, 2)
    optimizer.step()
    # Adam's first step is lr times the gradient's sign; decay shrinks the weight by lr·decay first.
    expected = torch.tensor([1 - lr * 0.1 - lr for lr in found])
    torch.testing.assert_close(torch.stack([p.detach()[0, 0] for p in parameters.values()]), expected)


def test_a_part_that_is_not_trained_is_refused_with_the_nearest() -> None:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("unet.up_blocks.0.w", "unet.mid_block.w")}
    with pytest.raises(ConfigError, match=r'did you mean "unet\.up_blocks"'):
        build_optimizer(OptimConfig(lr_of={"unet.up_block": 0.5}), parameters)
    with pytest.raises(ConfigError, match=r"set optim\.text_encoder_lr above 0"):
        build_optimizer(OptimConfig(lr_of={"text_encoder_2": 0.5}), parameters)
    with pytest.raises(ConfigError, match="is -1"):
        OptimConfig(lr_of={"unet": -1.0})


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


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"lr": math.nan}, {"text_encoder_lr": -1.0}, {"text_encoder_lr": math.inf}, {"warmup_steps": -1}],
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        OptimConfig(**settings)


def test_no_factor_is_ever_negative_or_not_finite() -> None:
    for schedule in ("constant", "cosine", "linear", "rex"):
        config = OptimConfig(warmup_steps=0, lr_schedule=schedule)
        assert all(
            0 <= lr_factor(config, step, 10) <= 1 and math.isfinite(lr_factor(config, step, 10)) for step in range(15)
        )


def _trained(config: OptimConfig, steps: int = 40) -> tuple[float, float]:
    """The loss of a least-squares problem before and after some steps."""
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 80, generator=source, dtype=torch.float32)
    wanted = inputs @ torch.randn(80, 80, generator=source)
    # Not zeros: Adafactor's step is relative to the size of the weights.
    weight = nn.Parameter(torch.randn(80, 80, generator=source))
    optimizer = build_optimizer(config, {"unet.w": weight})
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = (inputs @ weight.float() - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("fused_backward", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
def test_every_optimizer_descends(name: str, fused_backward: bool) -> None:
    first, last = _trained(OptimConfig(name=name, lr=0.1, fused_backward=fused_backward))
    assert last < 0.3 * first


def test_eight_bit_moments_are_a_quarter_of_the_memory_and_nearly_the_same_descent() -> None:
    _, full = _trained(OptimConfig(name="adamw", lr=0.02))
    _, small = _trained(OptimConfig(name="adamw8bit", lr=0.02))
    assert small == pytest.approx(full, rel=0.05)


def test_a_missing_extra_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"sumizome\[8bit\]"):
        build_optimizer(OptimConfig(name="adamw8bit"), {"unet.w": nn.Parameter(torch.ones(2, 2))})


def test_inside_the_backward_pass_the_weights_move_as_outside_it() -> None:
    def weights(fused_backward: bool) -> list[torch.Tensor]:
        source = torch.Generator().manual_seed(2)
        layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        for parameter in layers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=source)
        named = {f"unet.{name}": p for name, p in layers.named_parameters()}
        optimizer = build_optimizer(
            OptimConfig(lr=0.01, max_grad_norm=0.0, fused_backward=fused_backward, warmup_steps=0), named
        )
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            layers(torch.randn(3, 6, generator=source)).square().sum().backward()
            optimizer.step()
        assert all(p.grad is None for p in named.values()) == fused_backward
        return [p.detach() for p in named.values()]

    for inside, outside in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_the_fused_norm_is_the_global_one_and_tells_what_is_not_finite() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        OptimConfig(lr=0.1, max_grad_norm=0.0, fused_backward=True), {"unet.a": first, "unet.b": second}
    )
    (3 * first.sum() + 4 * second.sum()).backward()
    assert float(optimizer.grad_norm()) == pytest.approx(math.sqrt(3 * 9 + 2 * 16))
    optimizer.zero_grad()
    (first.sum() + torch.nan * second.sum()).backward()
    assert not optimizer.grad_norm().isfinite()


class _Reads(TorchDispatchMode):
    """Counts the numbers that Python takes out of tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_update_inside_the_backward_pass_reads_no_number() -> None:
    """A GPU must have finished all that a number depends on before Python has it: it would rest once a parameter."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    build_optimizer(OptimConfig(lr=0.1, fused_backward=True), {"unet.a": first, "unet.b": second})
    with _Reads() as reads:
        (first.sum() + second.sum()).backward()
        assert reads.count == 0 and not torch.equal(first, torch.ones(3))
        first.sum().item()
    assert reads.count == 1, "the count counts"
