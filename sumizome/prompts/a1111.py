r"""A1111's weights: (x) is 1.1, [x] is 1/1.1, (x:1.3) is 1.3, nested ones multiply; BREAK begins a new chunk.

`\(`, `\)`, `\[`, `\]` and `\\` are the characters themselves. A bracket that is never closed weighs all that follows
it; one that was never opened is text. Also Forge's and reForge's.
"""

import re

from sumizome.prompts.parts import Part, Prompt, finite_weight, joined

__all__ = ["parse"]

_ROUND, _SQUARE = 1.1, 1 / 1.1
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_TOKEN = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<bracket>[()\[\]])
    | (?P<text>[^\\()\[\]:]+|[\\:])
    """,
    re.VERBOSE,
)


def parse(text: str) -> Prompt:
    """The groups of weighted parts that `text` means."""
    parts: list[Part | None] = []  # None is a BREAK, which a bracket may contain
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        parts[start:] = [part and Part(part.text, part.weight * factor) for part in parts[start:]]

    for token in _TOKEN.finditer(text):
        bracket = token["bracket"]
        if token["escaped"]:
            parts.append(Part(token["escaped"], 1.0))
        elif bracket in opened:
            opened[bracket].append(len(parts))
        elif token["weight"] and opened["("]:
            own = finite_weight(token["weight"])
            if own is None:  # text and a bracket that closes, as around any other word
                parts.append(Part(token[0][:-1], 1.0))
            weigh(opened["("].pop(), _ROUND if own is None else own)
        elif bracket == ")" and opened["("]:
            weigh(opened["("].pop(), _ROUND)
        elif bracket == "]" and opened["["]:
            weigh(opened["["].pop(), _SQUARE)
        else:
            first, *others = _BREAK.split(token[0])
            parts.append(Part(first, 1.0))
            for other in others:
                parts += [None, Part(other, 1.0)]
    for bracket, factor in (("(", _ROUND), ("[", _SQUARE)):
        for start in opened[bracket]:
            weigh(start, factor)
    groups: list[list[Part]] = [[]]
    for part in parts:
        if part is None:
            groups.append([])
        else:
            groups[-1].append(part)
    if len(groups) > 1 and not any(part.text for part in groups[-1]):
        groups.pop()  # a BREAK at the end begins no chunk
    return tuple(joined(group) for group in groups)
