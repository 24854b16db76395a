"""Pictures in rows and columns with words beside them, as one picture.

Owns layout and type alone. Sizes are pixels of the sheet; cells keep their own shape. Letters that the font at hand
lacks are written out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from PIL import Image, ImageDraw, ImageFont

__all__ = ["labelled_grid", "plain_words"]

_INK, _SOFT, _PAPER, _RULE = (28, 27, 26), (107, 103, 98), (255, 255, 255), (214, 210, 204)
_GAP = 8
_LABEL = 190
_SIZE = 15
_LINE = _SIZE + 4
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf")
_WRITTEN_OUT = {
    "σ": "sigma",
    "∞": "inf",
    "φ": "phi",
    "×": "x",
    "√": "sqrt ",
    "−": "-",
    "→": "->",
    "±": "+-",
    "…": "...",
}


@cache
def _font(size: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, bool]:
    """A font, and whether it knows Greek and mathematics: Pillow's own does not."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size), True
        except OSError:
            continue
    return ImageFont.load_default(size), False


def plain_words(text: str) -> str:
    """The text in letters that every font has."""
    for letter, words in _WRITTEN_OUT.items():
        text = text.replace(letter, words)
    return text


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str = "",
    notes: Sequence[Sequence[str]] | None = None,
    least_side: int = 192,
    least_width: int = 110,
) -> Image.Image:
    """The pictures with labels left and on top, and `notes` (a line each) under them.

    Small pictures are enlarged by one whole factor, pixel by pixel, so that each one's longer side is
    `least_side` or more.
    Labels of columns are broken at the column's width, or at `least_width`.
    """
    cells = _enlarged(rows, least_side)
    plan = _plan(cells, row_labels, column_labels, title, notes, least_width)
    sheet = Image.new("RGB", plan.size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write_labels(draw, plan)
    for row, top in enumerate(plan.tops):
        for column, left in enumerate(plan.lefts):
            image = cells[row][column]
            sheet.paste(image, (left, top))
            draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=_RULE)
            if notes:
                _write(draw, (left, top + image.height + 2), notes[row][column], _SOFT)
    return sheet


@dataclass(frozen=True)
class _Plan:
    """Where everything stands; labels are lines of words that fit."""

    size: tuple[int, int]
    titles: list[str]
    heads: list[list[str]]
    sides: list[list[str]]
    lefts: list[int]
    """Of each column of pictures."""
    tops: list[int]
    """Of each row of pictures."""


def _enlarged(rows: Sequence[Sequence[Image.Image]], least_side: int) -> list[list[Image.Image]]:
    smallest = min(max(image.size) for row in rows for image in row)
    factor = max(1, -(-least_side // smallest))
    return [
        [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in row]
        for row in rows
    ]


def _plan(
    cells: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    notes: Sequence[Sequence[str]] | None,
    least_width: int,
) -> _Plan:
    columns = list(zip(*cells, strict=True))
    cell_widths = [max(image.width for image in column) for column in columns]
    heads = [_wrapped(label, max(least_width, width)) for label, width in zip(column_labels, cell_widths, strict=True)]
    widths = [
        max([cell_widths[place]] + [_width(line) for line in heads[place]] + _note_widths(notes, place))
        for place in range(len(columns))
    ]
    sides = [_wrapped(label, _LABEL) for label in row_labels]
    left = 2 * _GAP + max([_width(line) for lines in sides for line in lines] + [0])
    # The sheet is as wide as its cells, however long the title: that is wrapped.
    titles = _wrapped(title, left + sum(widths) + _GAP * len(widths)) if title else []
    top = _GAP + _LINE * (len(titles) + max(map(len, heads))) + (_GAP if titles else 0)
    note = _LINE if notes else 0
    heights = [
        max([image.height for image in row] + [_LINE * len(words)]) + note
        for row, words in zip(cells, sides, strict=True)
    ]
    # One entry more than there are rows or columns: the last is where the sheet ends.
    lefts = list(accumulate((width + _GAP for width in widths), initial=left))
    tops = list(accumulate((height + _GAP for height in heights), initial=top))
    return _Plan((lefts[-1] + _GAP, tops[-1]), titles, heads, sides, lefts[:-1], tops[:-1])


def _write_labels(draw: ImageDraw.ImageDraw, plan: _Plan) -> None:
    for number, words in enumerate(plan.titles):
        _write(draw, (_GAP, _GAP + number * _LINE), words)
    for left, lines in zip(plan.lefts, plan.heads, strict=True):
        for number, words in enumerate(lines):
            _write(draw, (left, plan.tops[0] - _LINE * (len(lines) - number)), words)
    for top, lines in zip(plan.tops, plan.sides, strict=True):
        for number, words in enumerate(lines):
            _write(draw, (_GAP, top + number * _LINE), words)


def _note_widths(notes: Sequence[Sequence[str]] | None, place: int) -> list[int]:
    return [_width(row[place]) for row in notes or ()]


def _shown(text: str) -> str:
    return text if _font(_SIZE)[1] else plain_words(text)


def _width(text: str) -> int:
    return round(_font(_SIZE)[0].getlength(_shown(text))) + 1


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int] = _INK) -> None:
    draw.text(at, _shown(text), font=_font(_SIZE)[0], fill=colour)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many pixels, broken between words; a longer word stands alone."""
    lines, present = [], ""
    for word in text.split():
        joined = f"{present} {word}".strip()
        if present and _width(joined) > width:
            lines.append(present)
            joined = word
        present = joined
    return [*lines, present]
