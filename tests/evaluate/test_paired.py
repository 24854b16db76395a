"""Models that share seeds and captions are compared pair by pair: what is hard for both hides no difference."""

from typing import Any

import numpy as np
import pytest

from sumizome.evaluate.evaluation_page import as_interval
from sumizome.evaluate.paired import beside_the_first, difference_in_words
from sumizome.evaluate.scores import Interval, bootstrap


def _model(name: str, errors: dict[str, np.ndarray], recalls: list[float | None] | None = None) -> dict[str, Any]:
    colours = [{"colour": colour, "errors": values.tolist()} for colour, values in errors.items()]
    return {"name": name, "colours": colours, "tags": None if recalls is None else {"by_picture": recalls}}


def test_a_difference_shows_that_intervals_of_each_model_alone_would_hide() -> None:
    random = np.random.default_rng(0)
    hard = random.uniform(0, 0.5, 8)  # seeds differ by far more than the models do
    first = {"black": hard, "red": hard[::-1]}
    second = {colour: values - 0.02 + random.normal(0, 0.005, 8) for colour, values in first.items()}
    alone = [bootstrap(np.mean(list(errors.values()), axis=0)) for errors in (first, second)]
    assert alone[1].high > alone[0].low  # they overlap
    (beside,) = beside_the_first([_model("a", first), _model("b", second)])
    assert beside["name"] == "b" and set(beside["differences"]) == {"colour_error", "colour_error_black"}
    for what in beside["differences"].values():
        assert what["count"] == 8 and what["low"] < what["value"] < what["high"] < 0
    mean = np.mean(list(second.values())) - np.mean(list(first.values()))
    assert beside["differences"]["colour_error"]["value"] == pytest.approx(mean)


def test_recalls_are_paired_by_caption_without_those_that_nothing_can_be_told_of() -> None:
    errors = {"white": np.zeros(6)}
    recalls: list[float | None] = [0.5, None, 1.0, 0.25] * 5
    better = [None if recall is None else min(1, recall + 0.25) for recall in recalls]
    models = [_model("a", errors, recalls), _model("b", errors, better), _model("c", errors)]
    b, c = beside_the_first(models)
    assert b["differences"]["recall"]["count"] == 15
    assert b["differences"]["recall"]["value"] == pytest.approx(0.5 / 3)
    assert (
        difference_in_words(as_interval(b["differences"]["recall"]), 0.01, 1, " points")[0] == "higher by 16.7 points"
    )
    assert set(c["differences"]) == {"colour_error", "colour_error_white"}


def test_one_model_has_nothing_beside_it() -> None:
    assert beside_the_first([_model("a", {"black": np.zeros(2)})]) == []


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [
        (-0.03, -0.02, -0.01, ("lower by 0.020", "0.010 to 0.030")),
        (0.01, 0.02, 0.03, ("higher by 0.020", "0.010 to 0.030")),
        (-0.01, 0.02, 0.05, ("not told apart", "\u22120.010 to 0.050")),
        (-5e-6, -3e-6, -1e-6, ("lower by less than 0.001", "0.000 to 0.000")),
        (-1e-5, 0.0, 1e-5, ("not told apart", "0.000 to 0.000")),
        (0.0, 0.0, 0.0, ("not told apart", "0.000 to 0.000")),
    ],
)
def test_a_difference_is_told_if_its_interval_is_on_one_side_of_0(
    low: float, value: float, high: float, said: tuple[str, str]
) -> None:
    assert difference_in_words(Interval(value, low, high, 8)) == said
