"""Grids: axes are read or refused in words, cells differ in two settings alone, picture and table say the same."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sumizome.cli.main import main
from sumizome.errors import ConfigError
from sumizome.evaluate.candidates import Candidate, load_candidate, unique_names
from sumizome.evaluate.grid import SETTINGS, draw_grid, parse_axis, table_rows
from sumizome.evaluate.labelled import labelled_grid
from sumizome.inference import PictureRequest, SamplingConfig, draw_pictures
from sumizome.models.sdxl import SDXLModel

QUICK = PictureRequest("a cat", canvas=(32, 32), sampling=SamplingConfig(steps=2))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "expected a setting"),
        (("colour", "red"), "expected a setting"),
        (("cfg",), "expected a setting"),
        (("cfg", "much"), "'much' is no value of cfg"),
        (("sigma_max", "pur"), "pure, ui, canvas or a sigma"),
        (("canvas", "64"), "HEIGHTxWIDTH"),
        (("sampler", "eulr"), "one of euler"),
    ],
)
def test_a_bad_axis_is_refused_in_words(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_axis(words, "--rows")


def test_values_are_read_as_settings_take_them() -> None:
    assert parse_axis(("sigma_max", "14.6", "pure", "ui"), "--rows").values == (14.6, "pure", "ui")
    assert parse_axis(("canvas", "64x32"), "--rows").values == ((64, 32),)
    assert parse_axis(("skip_above_sigma", "19", "never"), "--rows").values == (19.0, None)
    assert parse_axis(("prompt", "1girl, solo", ""), "--rows").labels == ("1girl, solo", "")


@pytest.mark.parametrize("setting", sorted(set(SETTINGS) - {"model"}))
def test_each_setting_changes_itself_alone(setting: str) -> None:
    value = {"sampler": "heun", "grid": "karras", "canvas": "16x48", "sigma_max": "3.5", "rescale": "0.7"}.get(
        setting, "9"
    )
    (read,) = parse_axis((setting, value), "--rows").values
    changed = SETTINGS[setting][1](QUICK, read)
    assert changed != QUICK
    assert SETTINGS[setting][1](changed, read) == changed
    assert (changed.sampling == QUICK.sampling) == (setting in ("canvas", "seed", "prompt", "negative_prompt"))


def test_a_cell_is_the_picture_of_its_two_settings(tiny: SDXLModel) -> None:
    rows, columns = parse_axis(("cfg", "1", "6"), "--rows"), parse_axis(("canvas", "32x32", "16x32"), "--columns")
    cells = draw_grid([Candidate("tiny", Path("tiny"), tiny)], QUICK, rows, columns, count=2)
    assert [(cell.row, cell.column) for cell in cells] == [
        ("1", "32x32"), ("1", "16x32"), ("6", "32x32"), ("6", "16x32")
    ]  # fmt: skip
    last = cells[-1].requests[1]
    assert (last.canvas, last.seed, last.sampling.guidance.guidance_scale) == ((16, 32), 1, 6.0)
    (alone,) = draw_pictures(tiny, [last])
    difference = np.asarray(alone.image, np.int16) - np.asarray(cells[-1].images[1], np.int16)
    assert abs(difference).max() <= 1
    lines = table_rows(cells, rows, columns)
    assert len(lines) == 8
    assert (lines[-1]["cfg"], lines[-1]["canvas"], lines[-1]["height"], lines[-1]["width"]) == ("6", "16x32", 16, 32)


def test_one_setting_on_both_axes_is_refused(tiny: SDXLModel) -> None:
    axis = parse_axis(("cfg", "1", "2"), "--rows")
    with pytest.raises(ConfigError, match="two settings"):
        draw_grid([Candidate("tiny", Path("tiny"), tiny)], QUICK, axis, replace(axis))


def test_the_command_writes_a_labelled_picture_and_its_table(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    flags = ["--canvas", "32", "32", "--steps", "2", "--out", str(out)]
    model = ["--rows", "model", str(tiny_folder), str(tiny_folder)]
    assert main(["grid", *model, "--columns", "prompt", "one, two", "three", *flags]) == 0
    with Image.open(out) as picture:
        assert picture.width > 2 * 192 and picture.height > 2 * 192
    with out.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["prompt"] for row in table] == ["one, two", "three"] * 2
    assert [row["model"] for row in table] == ["tiny (1)"] * 2 + ["tiny (2)"] * 2
    assert json.loads(out.with_suffix(".json").read_text())[0]["brightness"] == float(table[0]["brightness"])


def test_a_model_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = ["--rows", "cfg", "1", "2", "--columns", "rescale", "0", "1", "--out", str(tmp_path / "g.png")]
    assert main(["grid", *axes]) == 2
    assert "either --model or an axis of models" in capsys.readouterr().err


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model there"):
        load_candidate(tmp_path / "nothing")
    assert unique_names(["a", "b", "a"]) == ["a (1)", "b", "a (2)"]


def test_pictures_stand_unharmed_beside_their_labels() -> None:
    red, blue = (Image.new("RGB", (96, 96), colour) for colour in ("red", "blue"))
    sheet = np.asarray(labelled_grid([[red, blue]], ["σ 14.6"], ["one", "a long label of many words " * 3]))
    for colour in ((255, 0, 0), (0, 0, 255)):
        found = (sheet == colour).all(axis=2)
        assert found.sum() == 192 * 192  # enlarged twice, nothing drawn over it
