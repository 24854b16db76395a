"""Turns a demo's results into a picture, `sheet.png`, and a self-contained page, `sheet.html`.

    python demo/contact_sheet.py sheet.json --out DIR

Owns layout and nothing else: what was measured comes in as `SheetData`. The one number computed here is the mean
brightness printed beside a row, read from the very pixels shown. Sizes are pixels of the sheet.
"""

import argparse
import base64
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageStat

sys.path.insert(0, str(Path(__file__).parent))

from loss_plot import INK, MUTED, PAPER, Color, ValidationPoint, draw_loss_plot, font

__all__ = ["ImageRow", "SheetData", "draw_sheet", "load_sheet_data", "main", "write_contact_sheet", "write_sheet_data"]

WIDTH = 1344
MARGIN = 36
LABEL = 192
"""Width of the column that names a row of pictures."""
ENLARGE = 2
FRAME: Color = (206, 202, 196)
SEAL: Color = (170, 42, 38)
PLOT = (WIDTH - 2 * MARGIN, 330)

KEY_NUMBERS: dict[str, tuple[str, Callable[[float], str]]] = {
    "black": ("“completely black”, mean brightness", lambda v: f"{v:.3f}"),
    "white": ("“completely white”, mean brightness", lambda v: f"{v:.3f}"),
    "black_finite_start": ("black from a finite sigma", lambda v: f"{v:.3f}"),
    "steps": ("training steps", lambda v: f"{v:,.0f}"),
    "train_seconds": ("training time", lambda v: f"{int(v) // 60} min {int(v) % 60:02d} s"),
    "images_per_second": ("images a second", lambda v: f"{v:.1f}"),
    "total_seconds": ("everything", lambda v: f"{int(v) // 60} min {int(v) % 60:02d} s"),
}
"""Key of the summary → its caption and how it is written. Other keys are not shown."""


@dataclass(frozen=True)
class ImageRow:
    """Pictures that belong together: one prompt over several seeds, or several prompts with a caption each."""

    label: str
    images: list[Path]
    note: str = ""
    captions: list[str] = field(default_factory=list)
    """One a picture, or none."""


@dataclass(frozen=True)
class SheetData:
    """Everything that the sheet shows."""

    title: str
    subtitle: str
    pure_noise: list[ImageRow]
    """The report's Figure 2: rows of one prompt from pure noise, and the same from a finite sigma."""
    pictures: list[ImageRow]
    """Characters, scenes, objects, …: captions are the prompts."""
    validation: list[ValidationPoint]
    summary: dict[str, float]


def write_contact_sheet(data: SheetData, sheet: Path, page: Path) -> None:
    """Writes the picture and the page."""
    draw_sheet(data).save(sheet, optimize=True)
    page.write_text(_page(data), encoding="utf-8")


def write_sheet_data(data: SheetData, path: Path) -> None:
    """Writes `data` as JSON, with absolute picture paths, so that the sheet can be drawn again."""
    rows = {
        key: [asdict(row) | {"images": [str(image.resolve()) for image in row.images]} for row in getattr(data, key)]
        for key in ("pure_noise", "pictures")
    }
    path.write_text(json.dumps(asdict(data) | rows, indent=1), encoding="utf-8")


def load_sheet_data(path: Path) -> SheetData:
    """`SheetData` from JSON; picture paths may be relative to the file's folder."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = {
        key: [ImageRow(**{**row, "images": [path.parent / image for image in row["images"]]}) for row in data[key]]
        for key in ("pure_noise", "pictures")
    }
    validation = [
        ValidationPoint(point["step"], {int(t): loss for t, loss in point["losses"].items()})
        for point in data["validation"]
    ]
    return SheetData(**{**data, **rows, "validation": validation})


# -- the sheet ------------------------------------------------------------------------------------------------------


class _Sheet:
    """A canvas that grows downwards; `y` is where the next thing goes."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 400), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = float(MARGIN)

    def room(self, height: float) -> None:
        """Makes sure that `height` fits below `y`."""
        if self.y + height + MARGIN > self.image.height:
            taller = Image.new("RGB", (WIDTH, round(self.y + height + MARGIN) + 600), PAPER)
            taller.paste(self.image)
            self.image, self.draw = taller, ImageDraw.Draw(taller)

    def text(self, x: float, words: str, size: float, color: Color = INK, bold: bool = False, width: float = 0) -> None:
        """Words at (x, y), wrapped to `width` if one is given; `y` moves below them."""
        face = font(size, bold)
        for line in _wrapped(words, face.getlength, width) if width else [words]:
            self.room(size * 1.4)
            self.draw.text((x, self.y), line, color, face)
            self.y += size * 1.4

    def picture(self, image: Image.Image, x: float, y: float) -> None:
        """A picture with a hairline around it: black ones on screens that are dark, white ones on paper."""
        corner = round(x), round(y)
        self.draw.rectangle(
            (corner[0] - 1, corner[1] - 1, corner[0] + image.width, corner[1] + image.height), outline=FRAME
        )
        self.image.paste(image, corner)

    def finished(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, round(self.y) + MARGIN))


def draw_sheet(data: SheetData) -> Image.Image:
    """The whole contact sheet."""
    sheet = _Sheet()
    _header(sheet, data)
    if data.pure_noise:
        _heading(sheet, "Pure noise and back", "The same model and seeds; only the first sigma differs.")
        for row in data.pure_noise:
            _labelled_row(sheet, row)
    if data.pictures:
        _heading(sheet, "Pictures", "Every one starts from pure noise; its prompt stands below it.")
        for row in data.pictures:
            _captioned_row(sheet, row)
    _heading(sheet, "Loss by timestep", "Held-out pictures, fixed noise, averaged weights.")
    sheet.room(PLOT[1])
    sheet.image.paste(draw_loss_plot(data.validation, *PLOT), (MARGIN, round(sheet.y)))
    sheet.y += PLOT[1]
    return sheet.finished()


def _header(sheet: _Sheet, data: SheetData) -> None:
    sheet.draw.rectangle((MARGIN, sheet.y + 3, MARGIN + 12, sheet.y + 35), fill=SEAL)
    sheet.text(MARGIN + 24, data.title, 30, bold=True)
    sheet.text(MARGIN + 24, data.subtitle, 14, MUTED, width=WIDTH - 2 * MARGIN - 24)
    numbers = _key_numbers(data.summary)
    sheet.y += 16
    sheet.room(80)
    pitch = (WIDTH - 2 * MARGIN) / max(len(numbers), 1)
    top = sheet.y
    for k, (value, caption) in enumerate(numbers):
        x = MARGIN + k * pitch
        sheet.draw.line((x, top, x + pitch - 18, top), FRAME, 2)
        sheet.y = top + 10
        sheet.text(x, value, 25, bold=True)
        sheet.text(x, caption, 12, MUTED, width=pitch - 18)
    sheet.y = top + 78


def _key_numbers(summary: dict[str, float]) -> list[tuple[str, str]]:
    """(value, caption) of what the summary has, in the order of KEY_NUMBERS."""
    return [(write(summary[key]), caption) for key, (caption, write) in KEY_NUMBERS.items() if key in summary]


def _heading(sheet: _Sheet, title: str, note: str) -> None:
    sheet.y += 22
    sheet.text(MARGIN, title, 20, bold=True)
    sheet.text(MARGIN, note, 13, MUTED)
    sheet.y += 10


def _labelled_row(sheet: _Sheet, row: ImageRow) -> None:
    """The label on the left, then the pictures, made smaller where they would not fit."""
    images = [_enlarged(_opened(path)) for path in row.images]
    gap = 8
    space = WIDTH - 2 * MARGIN - LABEL - gap * (len(images) - 1)
    images = [_scaled(image, min(1.0, space / max(1, sum(i.width for i in images)))) for image in images]
    height = max((image.height for image in images), default=0)
    sheet.room(height + 60)
    top = sheet.y
    sheet.text(MARGIN, row.label, 14, bold=True, width=LABEL - 16)
    if row.note:
        sheet.text(MARGIN, row.note, 12, MUTED, width=LABEL - 16)
    sheet.text(MARGIN, f"mean brightness {_mean_brightness(row.images):.3f}", 12, INK, width=LABEL - 16)
    bottom = sheet.y
    x = float(MARGIN + LABEL)
    for image in images:
        sheet.picture(image, x, top)
        x += image.width + gap
    sheet.y = max(bottom, top + height) + 12


def _captioned_row(sheet: _Sheet, row: ImageRow) -> None:
    """A label above, then as many lines of pictures as it takes, each picture above its caption."""
    images = [_enlarged(_opened(path)) for path in row.images]
    captions = row.captions or [""] * len(images)
    sheet.text(MARGIN, row.label, 14, bold=True)
    sheet.y += 4
    for line in _lines([max(image.width, 128) for image in images], WIDTH - 2 * MARGIN, gap=14):
        height = max(images[k].height for k in line)
        sheet.room(height + 110)
        top, bottom, x = sheet.y, sheet.y, float(MARGIN)
        for k in line:
            cell = max(images[k].width, 128)
            sheet.picture(images[k], x, top + height - images[k].height)
            sheet.y = top + height + 5
            sheet.text(x, captions[k], 10.5, MUTED, width=cell)
            bottom = max(bottom, sheet.y)
            x += cell + 14
        sheet.y = bottom + 10


def _lines(widths: list[int], space: int, gap: int) -> list[list[int]]:
    """Indices of consecutive cells that fit side by side, line by line."""
    lines: list[list[int]] = []
    used = space + 1
    for k, width in enumerate(widths):
        if used + width > space:
            lines.append([])
            used = 0
        lines[-1].append(k)
        used += width + gap
    return lines


def _wrapped(words: str, length: Callable[[str], float], width: float) -> list[str]:
    """Greedy line breaks at spaces; a word that is wider than the line stays whole."""
    lines: list[str] = []
    for word in words.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _enlarged(image: Image.Image) -> Image.Image:
    """Small pictures twice as large; Lanczos, since they are photographs of latents rather than pixel art."""
    return _scaled(image, ENLARGE) if max(image.size) <= 160 else image


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _mean_brightness(paths: list[Path]) -> float:
    """Mean of all pixels and channels in 0..1 over the pictures."""
    means = [sum(ImageStat.Stat(_opened(path)).mean) / 3 / 255 for path in paths]
    return sum(means) / max(1, len(means))


# -- the page -------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 2.2rem 1.4rem 4rem; max-width: 84rem; background: #fcfbf8; color: #221e28;
  font: 15px/1.5 "DejaVu Sans", system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; border-left: 12px solid #aa2a26; padding-left: .8rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 0; }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
p { color: #706a74; margin: .2rem 0 1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem 1.2rem; margin: 1.4rem 0; }
dl div { border-top: 2px solid #cecac4; padding-top: .5rem; display: flex;
  flex-direction: column-reverse; justify-content: flex-end; }
dt { color: #706a74; font-size: .8rem; } dd { margin: 0; font-size: 1.55rem; font-weight: 700; }
.row { display: grid; grid-template-columns: 12rem 1fr; gap: 1rem; margin: 0 0 .9rem; align-items: start; }
.row h3 { margin: 0; } .row p { font-size: .8rem; margin: 0; }
.strip, .grid { display: flex; flex-wrap: wrap; gap: .55rem; align-items: start; } .grid { gap: 1rem .9rem; }
img { display: block; box-shadow: 0 0 0 1px #cecac4; } img.plot { box-shadow: none; max-width: 100%; }
figure { margin: 0; } figcaption { font-size: .72rem; line-height: 1.35; color: #706a74; padding-top: .35rem; }
@media (max-width: 46rem) { .row { grid-template-columns: 1fr; } }
"""


def _page(data: SheetData) -> str:
    numbers = "".join(
        f"<div><dt>{escape(words)}</dt><dd>{escape(value)}</dd></div>" for value, words in _key_numbers(data.summary)
    )
    noise = "".join(_labelled_html(row) for row in data.pure_noise)
    pictures = "".join(_captioned_html(row) for row in data.pictures)
    plot = draw_loss_plot(data.validation, *PLOT)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(data.title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(data.title)}</h1><p>{escape(data.subtitle)}</p><dl>{numbers}</dl>
<h2>Pure noise and back</h2><p>The same model and seeds; only the first sigma differs.</p>{noise}
<h2>Pictures</h2><p>Every one starts from pure noise; its prompt stands below it.</p>{pictures}
<h2>Loss by timestep</h2><p>Held-out pictures, fixed noise, averaged weights.</p>
<img class="plot" alt="Validation loss by timestep" width="{plot.width}" src="{_data_url(plot)}">
</body></html>
"""


def _labelled_html(row: ImageRow) -> str:
    words = " · ".join(filter(None, (row.note, f"mean brightness {_mean_brightness(row.images):.3f}")))
    images = "".join(_image_html(path, row.label) for path in row.images)
    label = f"<div><h3>{escape(row.label)}</h3><p>{escape(words)}</p></div>"
    return f'<div class="row">{label}<div class="strip">{images}</div></div>'


def _captioned_html(row: ImageRow) -> str:
    captions = row.captions or [""] * len(row.images)
    figures = "".join(
        f'<figure style="width:{max(128, _shown_width(path))}px">{_image_html(path, caption)}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for path, caption in zip(row.images, captions, strict=True)
    )
    return f'<h3>{escape(row.label)}</h3><div class="grid">{figures}</div>'


def _shown_width(path: Path) -> int:
    return _enlarged(_opened(path)).width


def _image_html(path: Path, words: str) -> str:
    image = _opened(path)
    return f'<img alt="{escape(words)}" width="{_enlarged(image).width}" src="{_data_url(image)}">'


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw a demo's contact sheet and page.")
    parser.add_argument("data", type=Path, help="sheet.json, as `write_sheet_data` leaves it")
    parser.add_argument("--out", type=Path, required=True, help="folder for sheet.png and sheet.html")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sheet, page = options.out / "sheet.png", options.out / "sheet.html"
    write_contact_sheet(load_sheet_data(options.data), sheet, page)
    print(sheet, page, sep="\n")


if __name__ == "__main__":
    main()
