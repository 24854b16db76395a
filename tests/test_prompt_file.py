"""Prompt lines as kohya's users write them."""

from pathlib import Path

import pytest

from sumizome.errors import ConfigError
from sumizome.inference import PictureRequest
from sumizome.prompt_file import parse_prompt_line, read_prompt_file

DEFAULTS = PictureRequest("", "bad", (64, 48), 5)


def test_every_option_is_read_and_width_comes_before_height() -> None:
    line = "1girl, red hair --w 832 --h 1216 --d 7 --s 20 --l 4.5 --n lowres, blurry"
    request = parse_prompt_line(line, DEFAULTS)
    assert request.prompt == "1girl, red hair"
    assert request.canvas == (1216, 832)
    assert (request.seed, request.sampling.steps, request.sampling.guidance.guidance_scale) == (7, 20, 4.5)
    assert request.negative_prompt == "lowres, blurry"


def test_what_a_line_does_not_say_comes_from_the_defaults() -> None:
    assert parse_prompt_line("a cat --d 1", DEFAULTS) == PictureRequest("a cat", "bad", (64, 48), 1)
    assert parse_prompt_line("a --n", DEFAULTS).negative_prompt == ""
    assert parse_prompt_line("--w 32", DEFAULTS).prompt == ""  # the empty prompt is one
    assert parse_prompt_line("dash-dot -- x", DEFAULTS).prompt == "dash-dot -- x"


@pytest.mark.parametrize(
    ("line", "words"), [("a --x 3", "unknown option --x"), ("a --w wide", "--w takes a number, found 'wide'")]
)
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"# comment\n\nfine\n{line}\n")
    with pytest.raises(ConfigError, match="line 4") as caught:
        read_prompt_file(path, DEFAULTS)
    assert words in str(caught.value)


def test_comments_are_passed_over_and_seeds_count_up(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\none\n\ntwo --d 100\nthree\n", encoding="utf-8-sig")
    assert [(r.prompt, r.seed) for r in read_prompt_file(path, DEFAULTS)] == [("one", 5), ("two", 100), ("three", 7)]


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "x", tmp_path / "none"):
        with pytest.raises(ConfigError, match="prompt a line"):
            read_prompt_file(path, DEFAULTS)
