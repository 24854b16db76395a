"""The PNG's settings, read back the way A1111 reads them, and our own JSON."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.errors import ConfigError
from sumizome.inference import PictureRequest, RedrawConfig, SamplingConfig, SecondPassConfig
from sumizome.png_info import parameters_text, write_png

# How A1111 1.10.1 takes the last line apart (interoperability facts, its own pattern of `name: value` pairs).
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')

REQUEST = PictureRequest(
    "1girl, 墨染, <b>",
    "lowres\nblurry",
    (1216, 832),
    7,
    SamplingConfig(20, "euler_ancestral", "karras", guidance=GuidanceConfig(4.5, guidance_rescale=0.7)),
)


def test_a1111_reads_every_pair_back() -> None:
    *prompts, last = parameters_text(REQUEST, "my, model: v", zero_terminal_snr=True).split("\n")
    assert prompts == ["1girl, 墨染, <b>", "Negative prompt: lowres", "blurry"]
    pairs = dict(PAIR.findall(last))
    assert pairs["Steps"] == "20"
    assert pairs["Sampler"] == "Euler a"
    assert pairs["Schedule type"] == "Karras"
    assert pairs["CFG scale"] == "4.5"
    assert pairs["Seed"] == "7"
    assert pairs["Size"] == "832x1216"
    assert pairs["Noise Schedule"] == "Zero Terminal SNR"
    assert pairs["Rescale CFG"] == "0.7"
    assert json.loads(pairs["Model"]) == "my, model: v"


def test_a_drawing_over_a_picture_and_a_second_pass_are_told_in_a1111s_words() -> None:
    def pairs(**changes: object) -> dict[str, str]:
        text = parameters_text(replace(REQUEST, **changes), "m", zero_terminal_snr=True)
        return dict(PAIR.findall(text.split("\n")[-1]))

    assert not {"Denoising strength", "Hires upscale", "Hires steps"} & pairs().keys()
    assert pairs(redraw=RedrawConfig(Path("a.png"), 0.6))["Denoising strength"] == "0.6"
    larger = pairs(second_pass=SecondPassConfig(1.5, steps=12))
    assert (larger["Hires upscale"], larger["Hires steps"], larger["Size"]) == ("1.5", "12", "832x1216")
    assert larger["Hires upscaler"] == "Latent (bicubic antialiased)"
    assert "Denoising strength" not in larger


def test_a_model_whose_name_is_no_utf8_and_a_prompt_that_is_none(tmp_path: Path) -> None:
    write_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", REQUEST, os.fsdecode(b"mod\xff"), zero_terminal_snr=False)
    assert "Model: mod?," in Image.open(tmp_path / "a.png").text["parameters"]
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        replace(REQUEST, negative_prompt=os.fsdecode(b"a \xff"))


def test_what_is_off_is_not_written() -> None:
    request = replace(REQUEST, negative_prompt="", sampling=SamplingConfig())
    text = parameters_text(request, "m", zero_terminal_snr=False)
    assert "Negative prompt" not in text
    assert "Rescale" not in text
    assert "Noise Schedule" not in text


def test_the_png_carries_both_and_claims_to_be_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    write_png(Image.new("RGB", (8, 8), "red"), path, REQUEST, "m", zero_terminal_snr=True)
    with Image.open(path) as image:
        info = dict(image.text)  # type: ignore[attr-defined]
        assert image.getpixel((0, 0)) == (255, 0, 0)
    assert info["parameters"].startswith("1girl, 墨染, <b>\n")
    own = json.loads(info["sumizome"])
    assert own["prompt"] == REQUEST.prompt
    assert own["sampling"]["guidance"]["guidance_rescale"] == 0.7
    assert info["Software"].startswith("Sumizome")
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
