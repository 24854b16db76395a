"""NovelAI's weights: {x} multiplies by 1.05, [x] divides by it, 1.5::x:: multiplies by 1.5; nested ones multiply.

A number stands directly before its "::" and holds to the next bare "::", or to the end. Round brackets and backslashes
are text. A bracket that is never closed weighs all that follows it; one that was never opened is text.
"""

import math
import re

from sumizome.prompts.parts import Part, finite_weight, joined

__all__ = ["parse"]

_STEP = 1.05
_CLOSERS = {"}": "{", "]": "["}
_NUMBER = r"(?<![\w.])[+-]?(?:\d+\.?\d*|\.\d+)::"
_TOKEN = re.compile(rf"(?P<number>{_NUMBER})|(?P<end>::)|(?P<bracket>[{{}}\[\]])|(?:(?!{_NUMBER}|::)[^{{}}\[\]])+")


def parse(text: str) -> tuple[Part, ...]:
    """The weighted parts of `text`."""
    parts: list[Part] = []
    brackets: list[str] = []
    emphasis = 1.0
    for token in _TOKEN.finditer(text):
        bracket = token["bracket"]
        own = finite_weight(token["number"][:-2]) if token["number"] else None
        if own is not None:
            emphasis = own
        elif token["end"] and emphasis != 1.0:
            emphasis = 1.0
        elif bracket in _CLOSERS.values():
            brackets.append(bracket)
        elif bracket and _CLOSERS[bracket] in brackets:
            # The innermost of its kind: `{[x}` leaves the square one open, as a reader would see it.
            place = len(brackets) - 1 - brackets[::-1].index(_CLOSERS[bracket])
            del brackets[place]
        else:
            parts.append(Part(token[0], _weight(brackets) * emphasis))
    return joined(parts)


def _weight(brackets: list[str]) -> float:
    """1.05 to the number of curly brackets less that of square ones: `{[x]}` is exactly 1."""
    try:
        return float(_STEP ** (brackets.count("{") - brackets.count("[")))
    except OverflowError:
        return math.inf
