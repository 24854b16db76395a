r"""ComfyUI's weights: (x) multiplies by 1.1, (x:1.3) sets 1.3 whatever is around it. Nothing else is syntax.

`\(` and `\)` are the characters. Square and curly brackets, BREAK and schedules are text, as are brackets that do not
pair.
"""

from sumizome.prompts.parts import Part, finite_weight, joined

__all__ = ["parse"]

_STEP = 1.1
_DEEPEST = 100
"""Levels of brackets; what stands deeper is text."""
_HIDDEN = {"\\(": "\0o", "\\)": "\0c"}
"""Escaped brackets while pairs are sought; NUL is taken out of the prompt first."""


def parse(text: str) -> tuple[Part, ...]:
    """The weighted parts of `text`."""
    text = text.replace("\0", "")
    for typed, hidden in _HIDDEN.items():
        text = text.replace(typed, hidden)
    return joined(Part(_shown(part.text), part.weight) for part in _weighted(text, 1.0))


def _shown(text: str) -> str:
    for typed, hidden in _HIDDEN.items():
        text = text.replace(hidden, typed[1])
    return text


def _weighted(text: str, weight: float, depth: int = 0) -> list[Part]:
    if depth > _DEEPEST:
        return [Part(text, weight)]
    parts = []
    for piece in _pieces(text):
        if len(piece) < 2 or piece[0] != "(" or piece[-1] != ")":
            parts.append(Part(piece, weight))
            continue
        inside, inner = piece[1:-1], weight * _STEP
        head, colon, number = inside.rpartition(":")
        if colon and head and (own := finite_weight(number)) is not None:
            inside, inner = head, own
        parts += _weighted(inside, inner, depth + 1)
    return parts


def _pieces(text: str) -> list[str]:
    """Outermost pairs of brackets with what they hold, and the text between them."""
    pieces, start, depth = [], 0, 0
    for place, letter in enumerate(text):
        if letter == "(":
            if depth == 0:
                pieces.append(text[start:place])
                start = place
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                pieces.append(text[start : place + 1])
                start = place + 1
    return [piece for piece in [*pieces, text[start:]] if piece]
