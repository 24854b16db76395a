"""How models differ from the first one: seed by seed and caption by caption, not from two means with an interval each.

Owns what is compared. Prompts and seeds are shared, so the difference of a pair leaves out what makes some of them hard
for every model, which the intervals of the two means have in them. Works on numbers as JSON has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float

from sumizome.evaluate.scores import Interval, bootstrap

__all__ = ["beside_the_first", "difference_in_words"]

_COLOURS_ALONE = ("black", "white")
"""Those that a model without zero terminal SNR cannot draw."""

_Values = Float[np.ndarray, " n"]


def beside_the_first(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each model after the first: its name, and by measure the mean difference from the first with its interval.

    `models` as `evaluate_model` gives their numbers. A measure that one of the two lacks is left out.
    """
    if len(models) < 2:
        return []
    first = _measured(models[0])
    found = []
    for model in models[1:]:
        own = _measured(model)
        differences = {what: asdict(bootstrap(own[what] - first[what])) for what in first if what in own}
        found.append({"name": model["name"], "differences": differences})
    return found


def _measured(model: Mapping[str, Any]) -> dict[str, _Values]:
    """By measure: a number of each seed, or of each caption that any tag was asked of which can be told."""
    errors = {row["colour"]: np.array(row["errors"], np.float64) for row in model["colours"]}
    values: dict[str, _Values] = {"colour_error": np.mean(list(errors.values()), axis=0)}
    values |= {f"colour_error_{colour}": errors[colour] for colour in _COLOURS_ALONE if colour in errors}
    # The same captions of every model: which of their tags can be told is the classifier's matter, not the pictures'.
    recalls = [recall for recall in (model["tags"] or {}).get("by_picture", ()) if recall is not None]
    return values | ({"recall": np.array(recalls, np.float64)} if recalls else {})


def difference_in_words(it: Interval, unit: float = 1.0, digits: int = 3, name: str = "") -> tuple[str, str]:
    """("lower by 0.021", "0.010 to 0.032"), or ("not told apart", …) where the interval has 0 in it.

    `unit`: what is 1 of the unit `name` that it is told in.
    """

    def told(number: float) -> str:
        rounded = round(number / unit, digits) + 0.0  # no −0
        return f"{rounded:.{digits}f}".replace("-", "\u2212")

    if it.low <= 0 <= it.high:
        return "not told apart", f"{told(it.low)} to {told(it.high)}{name}"
    lower = it.high < 0
    low, high = (-it.high, -it.low) if lower else (it.low, it.high)
    size = told(abs(it.value))
    if float(size) == 0:  # one model saved in two ways, say: rounding differs, nothing that a picture shows
        size = f"less than {10**-digits:.{digits}f}"
    return f"{'lower' if lower else 'higher'} by {size}{name}", f"{told(low)} to {told(high)}"
