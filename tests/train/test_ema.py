"""The average against its closed form, and the weights untouched after it was looked at."""

import pytest
import torch
from torch import nn

from sumizome.errors import ConfigError
from sumizome.train.ema import Ema, EmaConfig


def test_the_average_follows_the_recursion() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = Ema(EmaConfig(decay=0.5), {"w": parameter})
    expected = 0.0
    for step in range(1, 8):
        parameter.data.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.average["w"], torch.full((3,), expected))


def test_a_constant_weight_is_its_own_average() -> None:
    parameter = nn.Parameter(torch.full((2,), 1.25))
    ema = Ema(EmaConfig(), {"w": parameter})
    for step in range(1, 100):
        ema.update(step)
    torch.testing.assert_close(ema.average["w"], parameter.data)


def test_applied_shows_the_average_and_gives_the_same_tensors_back() -> None:
    layer = nn.Linear(2, 2)
    parameters = dict(layer.named_parameters())
    ema = Ema(EmaConfig(), parameters)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in parameters.items()}
    for average in ema.average.values():
        average.zero_()
    with pytest.raises(ZeroDivisionError), ema.applied():
        assert layer(torch.ones(1, 2)).abs().sum() == 0
        raise ZeroDivisionError  # the weights come back however the block ends
    for name, (pointer, value) in before.items():
        assert parameters[name].data_ptr() == pointer
        torch.testing.assert_close(parameters[name].data, value, rtol=0, atol=0)


def test_decay_of_one_would_never_learn() -> None:
    with pytest.raises(ConfigError):
        EmaConfig(decay=1.0)
