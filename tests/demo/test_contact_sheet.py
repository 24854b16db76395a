"""The contact sheet and its page: everything fits, brightness is what the pixels say, nothing is left unescaped."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from contact_sheet import WIDTH, ImageRow, SheetData, draw_sheet, load_sheet_data, write_contact_sheet, write_sheet_data
from loss_plot import LINES, PAPER, ValidationPoint, draw_loss_plot, read_validation
from PIL import Image

CAPTION = '1girl, <script>alert("x")</script> & >_<'


def _picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Path:
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> SheetData:
    dark = [_picture(tmp_path / f"dark{k}.png", (51, 51, 51)) for k in range(8)]
    some = [_picture(tmp_path / f"some{k}.png", (200, 40, 40), size) for k, size in enumerate([(48, 80), (80, 48)] * 9)]
    validation = [
        ValidationPoint(step, {t: 2.0 / (step + 10) * (1 + t / 999) for t in (0, 100, 500, 900, 999)})
        for step in range(0, 600, 100)
    ]
    return SheetData(
        title="Title & more",
        subtitle="A <b>subtitle</b>",
        pure_noise=[ImageRow("“completely black”", dark, "from pure noise")],
        pictures=[ImageRow("Characters", some, captions=[CAPTION] * len(some))],
        validation=validation,
        summary={"black": 0.0031, "white": 0.998, "steps": 920, "train_seconds": 347.2},
    )


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_escapes_what_it_is_given_and_needs_no_other_file(data: SheetData, tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    write_contact_sheet(data, tmp_path / "sheet.png", page)
    parsed = _Text()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert "script" not in parsed.tags and "b" not in parsed.tags
    assert parsed.text.count(CAPTION) == 18
    assert "Title & more" in parsed.text and "A <b>subtitle</b>" in parsed.text
    assert "5 min 47 s" in parsed.text and "0.998" in parsed.text
    assert len(parsed.sources) == 8 + 18 + 1
    for source in parsed.sources:
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_brightness_beside_a_row_is_read_from_the_pixels(data: SheetData, tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    write_contact_sheet(data, tmp_path / "sheet.png", page)
    assert "mean brightness 0.200" in page.read_text(encoding="utf-8")  # 51 / 255


def test_sheet_shows_every_picture_enlarged(data: SheetData) -> None:
    sheet = draw_sheet(data)
    assert sheet.width == WIDTH
    pixels = np.asarray(sheet)
    assert (pixels == (51, 51, 51)).all(axis=-1).sum() == 8 * 128 * 128
    assert (pixels == (200, 40, 40)).all(axis=-1).sum() == 18 * 96 * 160
    assert (pixels[-20:] == PAPER).all(), "something was drawn into the lower margin"
    assert (pixels[:, -30:] == PAPER).all(), "something was drawn into the right margin"


def test_more_seeds_than_fit_are_made_smaller(data: SheetData) -> None:
    row = data.pure_noise[0]
    wide = SheetData("t", "s", [ImageRow(row.label, row.images * 2)], [], data.validation, {})
    assert (np.asarray(draw_sheet(wide))[:, -30:] == PAPER).all()


def test_data_read_back_as_it_was_written(data: SheetData, tmp_path: Path) -> None:
    write_contact_sheet(data, tmp_path / "sheet.png", tmp_path / "sheet.html")
    write_sheet_data(data, tmp_path / "sheet.json")
    again = load_sheet_data(tmp_path / "sheet.json")
    assert again == data
    with Image.open(tmp_path / "sheet.png") as image:
        assert draw_sheet(again).tobytes() == image.tobytes()


def test_validations_are_read_in_order_and_other_records_passed_over(tmp_path: Path) -> None:
    records = [
        {"step": 1, "loss": 0.5},
        {"step": 20, "validation_loss": {"0": 0.4, "999": 0.9}},
        {"step": 10, "validation_loss": {"0": 0.8, "999": 1.1}},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    assert read_validation(path) == [ValidationPoint(10, {0: 0.8, 999: 1.1}), ValidationPoint(20, {0: 0.4, 999: 0.9})]


def test_losses_lie_on_a_logarithmic_axis() -> None:
    """Level curves at 10, 1 and 0.1: the middle one is drawn midway."""
    values = {0: 10.0, 500: 1.0, 999: 0.1}
    plot = np.asarray(draw_loss_plot([ValidationPoint(step, values) for step in (0, 100)], 1200, 330)).astype(int)
    panel = plot[36:282, 690:1110]  # inside the right panel's axes
    heights = []
    for color in LINES[-3:]:  # lightest = least timestep
        near = (np.abs(panel - color).max(axis=-1) < 30).sum(axis=1) > 300
        assert near.any()
        heights.append(np.nonzero(near)[0].mean())
    assert heights[1] - heights[0] > 60
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=1.5)


@pytest.mark.parametrize("losses", [[], [{0: 1.0}], [{0: float("nan")}, {0: 1.0}], [{0: 0.0}, {0: 0.0}]])
def test_a_run_without_a_curve_still_has_a_plot(losses: list[dict[int, float]]) -> None:
    points = [ValidationPoint(10 * k, values) for k, values in enumerate(losses)]
    assert draw_loss_plot(points, 600, 300).size == (600, 300)


def test_nothing_is_fetched(data: SheetData, tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    write_contact_sheet(data, tmp_path / "sheet.png", page)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text
