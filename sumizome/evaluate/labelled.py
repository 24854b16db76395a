"""Pictures in rows and columns with words beside them, as one picture.

Owns layout and type alone. Sizes are pixels of the sheet; cells keep their own shape. Letters that the font at hand
lacks are written out.
"""

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

__all__ = ["labelled_grid", "plain_words"]

_INK, _SOFT, _PAPER, _RULE = (28, 27, 26), (107, 103, 98), (255, 255, 255), (214, 210, 204)
_GAP = 8
_LABEL = 190
_SIZE = 15
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
    smallest = min(max(image.size) for row in rows for image in row)
    factor = max(1, -(-least_side // smallest))
    big = [
        [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in row]
        for row in rows
    ]
    heads = [
        _wrapped(label, max(least_width, max(row[place].width for row in big)))
        for place, label in enumerate(column_labels)
    ]
    widths = [
        max([row[place].width for row in big] + [_width(line) for line in heads[place]] + _note_widths(notes, place))
        for place in range(len(column_labels))
    ]
    sides = [_wrapped(label, _LABEL) for label in row_labels]
    left = 2 * _GAP + max([_width(line) for lines in sides for line in lines] + [0])
    line = _SIZE + 4
    note = line if notes else 0
    heights = [
        max([image.height for image in row] + [line * len(words)]) for row, words in zip(big, sides, strict=True)
    ]
    titles = _wrapped(title, left + sum(widths) + _GAP * len(widths)) if title else []
    top = _GAP + line * (len(titles) + max(map(len, heads))) + (_GAP if titles else 0)
    # The sheet is as wide as its cells, however long the title: that is wrapped above.
    size = (_GAP + left + sum(width + _GAP for width in widths), top + sum(height + note + _GAP for height in heights))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, words in enumerate(titles):
        _write(draw, (_GAP, _GAP + number * line), words)
    x = left
    for place, words in enumerate(heads):
        for number, text in enumerate(words):
            _write(draw, (x, top - line * (len(words) - number)), text)
        x += widths[place] + _GAP
    y = top
    for row, words, height, place in zip(big, sides, heights, range(len(big)), strict=True):
        for number, text in enumerate(words):
            _write(draw, (_GAP, y + number * line), text)
        x = left
        for column, image in enumerate(row):
            sheet.paste(image, (x, y))
            draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=_RULE)
            if notes:
                _write(draw, (x, y + image.height + 2), notes[place][column], _SOFT)
            x += widths[column] + _GAP
        y += height + note + _GAP
    return sheet


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
