r"""A1111's prompts that change while sampling: [a:b:0.4] is a, then b; [b:0.4] is b from there on; [a::0.4] is a up to
there; [a|b] takes turns, step by step.

The place is a share of the steps where it is written with a point (1.0 is all of them), else a number of steps.
Brackets that are no schedule stay in the text, for the weights to read. Schedules nest, to 100 levels.
"""

import re
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["prompts_by_step"]

_PLACE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*")
_DEEPEST = 100
"""Levels of brackets; what stands deeper is text."""


@dataclass(frozen=True)
class _Switch:
    before: "_Node"
    after: "_Node"
    place: str


@dataclass(frozen=True)
class _Turns:
    choices: "tuple[_Node, ...]"


_Node: TypeAlias = "tuple[str | _Switch | _Turns, ...]"


def prompts_by_step(text: str, steps: int) -> list[str]:
    """The prompt of each of `steps` steps, schedules resolved; text without schedules comes back as it is."""
    node = _sequence(text)
    return [_at(node, step, steps) for step in range(1, steps + 1)]


def _at(node: _Node, step: int, steps: int) -> str:
    words = []
    for piece in node:
        if isinstance(piece, str):
            words.append(piece)
        elif isinstance(piece, _Turns):
            words.append(_at(piece.choices[(step - 1) % len(piece.choices)], step, steps))
        else:
            words.append(_at(piece.before if step <= _last_step(piece.place, steps) else piece.after, step, steps))
    return "".join(words)


def _last_step(place: str, steps: int) -> int:
    """The last step of what stands before the switch."""
    value = float(place)
    return min(steps, int(value * steps) if "." in place else int(value))


def _sequence(text: str, depth: int = 0) -> _Node:
    """Text and schedules in order."""
    pieces: list[str | _Switch | _Turns] = []
    start = place = 0
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        end = _closing(text, place) if text[place] == "[" and depth < _DEEPEST else None
        if end is not None:
            pieces.append(text[start:place])
            pieces += _bracket(text[place + 1 : end], depth + 1)
            start = place = end + 1
            continue
        place += 1
    return (*pieces, text[start:])


def _bracket(inside: str, depth: int) -> _Node:
    """What a pair of square brackets around `inside` means."""
    turns = _split(inside, "|")
    if len(turns) > 1:
        return (_Turns(tuple(_sequence(turn, depth) for turn in turns)),)
    *texts, last = _split(inside, ":")
    place = _PLACE.fullmatch(last)
    if place and 1 <= len(texts) <= 2:
        before = texts[0] if len(texts) == 2 else ""
        return (_Switch(_sequence(before, depth), _sequence(texts[-1], depth), place[1]),)
    return ("[", *_sequence(inside, depth), "]")


def _split(text: str, separator: str) -> list[str]:
    """`text` at separators that stand outside of brackets."""
    parts, start, depth, place = [], 0, 0, 0
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place += 1
        elif letter in "([":
            depth += 1
        elif letter in ")]":
            depth -= 1
        elif letter == separator and depth == 0:
            parts.append(text[start:place])
            start = place + 1
        place += 1
    return [*parts, text[start:]]


def _closing(text: str, opening: int) -> int | None:
    """The index of the bracket that closes the one at `opening`."""
    depth, place = 0, opening
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == "[":
            depth += 1
        elif text[place] == "]":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    return None
