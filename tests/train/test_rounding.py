"""Stochastic rounding: unbiased, one of the two neighbours, repeatable; and what it is for, small steps that add up."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sumizome.train.optim import OptimConfig, build_optimizer
from sumizome.train.rounding import RoundedAdamW, round_stochastically


def _source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.floats(width=32), st.integers(0, 2**31))
def test_a_value_becomes_one_of_its_neighbours(value: float, seed: int) -> None:
    exact = torch.tensor([value], dtype=torch.float32)
    rounded = round_stochastically(exact, _source(seed)).float()
    if not exact.isfinite():
        torch.testing.assert_close(rounded, exact, equal_nan=True)
        return
    assert rounded.isfinite() or exact.to(torch.bfloat16).isinf()
    if rounded.isfinite():
        # Two neighbours differ by one unit in the last of eight places: 2^-7 of the value, less for denormal ones.
        assert abs(float(rounded - exact)) <= max(abs(value) * 2**-7, 2.0**-133)
        assert float(rounded) == 0 or (float(rounded) > 0) == (value > 0)


def test_the_mean_of_many_draws_is_the_value() -> None:
    value = 1 + 2**-7 * 0.3  # three tenths of the way to the next bfloat16
    draws = round_stochastically(torch.full((200_000,), value), _source()).double()
    assert set(draws.tolist()) == {1.0, 1 + 2**-7}
    # The mean of n draws of which 0.3 are above has a deviation of 2^-7 · √(0.21 / n).
    assert abs(float(draws.mean()) - value) < 5 * 2**-7 * (0.21 / 200_000) ** 0.5


def test_what_bfloat16_holds_exactly_is_not_moved() -> None:
    exact = torch.randn(1000, generator=_source()).to(torch.bfloat16)
    torch.testing.assert_close(round_stochastically(exact.float(), _source(1)), exact, rtol=0, atol=0)


def _after(steps: int, dtype: torch.dtype, seed: int = 0) -> nn.Parameter:
    weight = nn.Parameter(torch.ones(4096, 1, dtype=dtype))
    optimizer = build_optimizer(OptimConfig(lr=1e-5, weight_decay=0.0), {"unet.w": weight}, seed)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight


def test_steps_too_small_for_bfloat16_add_up() -> None:
    # Adam's step under a constant gradient is the learning rate: 200 of 1e-5 are 0.002, half of bfloat16's unit at 1.
    full, half = _after(200, torch.float32), _after(200, torch.bfloat16)
    assert abs(float(full.detach().mean()) - 0.998) < 1e-5
    assert abs(float(half.detach().float().mean()) - 0.998) < 2e-4
    assert float((half == 1).float().mean()) < 0.9  # rounding to the nearest would have left every one at 1


def test_a_closure_makes_the_gradients_and_its_loss_comes_back() -> None:
    weight = nn.Parameter(torch.ones(4096, 1, dtype=torch.bfloat16))
    optimizer = build_optimizer(OptimConfig(lr=1e-2, weight_decay=0.0), {"unet.w": weight}, seed=0)
    assert isinstance(optimizer, RoundedAdamW)

    def closure() -> float:
        loss = weight.float().square().mean()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 1.0
    assert abs(float(weight.detach().float().mean()) - 0.99) < 1e-3


def test_the_same_seed_rounds_the_same_and_another_does_not() -> None:
    first, again, other = _after(3, torch.bfloat16), _after(3, torch.bfloat16), _after(3, torch.bfloat16, seed=1)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)
