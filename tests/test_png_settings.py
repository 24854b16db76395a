"""Settings read out of pictures: ours to the last field, and other programs' as those write them."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.errors import DataError
from sumizome.inference import PictureRequest, RedrawConfig, SamplingConfig, SecondPassConfig
from sumizome.png_info import write_png
from sumizome.png_settings import read_settings

REQUEST = PictureRequest(
    "1girl, 墨染, <b>",
    "lowres\nblurry",
    (1216, 832),
    2**63 + 5,
    SamplingConfig(
        20,
        "euler_ancestral",
        "karras",
        29.0,
        guidance=GuidanceConfig(4.5, guidance_rescale=0.7, skip_above_sigma=19.0, scale_by_sigma=(20.0, 5.0, 1.0, 3.0)),
    ),
    noise_row=3,
    syntax="novelai",
    redraw=RedrawConfig(Path("a.png"), 0.5),
    second_pass=SecondPassConfig(1.5, 10),
)
NOVELAI_COMMENT = {
    "prompt": "1girl, {red hair}", "steps": 28, "height": 1216, "width": 832, "scale": 5.0, "uncond_scale": 1.0,
    "cfg_rescale": 0.2, "seed": 1234567890, "n_samples": 1, "noise_schedule": "native",
    "sampler": "k_euler_ancestral", "uc": "lowres", "skip_cfg_above_sigma": 19,
}  # fmt: skip
COMFYUI_GRAPH: dict[str, Any] = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 42, "steps": 24, "cfg": 4.5, "sampler_name": "dpmpp_2m", "scheduler": "sgm_uniform", "denoise": 1.0,
        "model": ["9", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "my model.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 832, "height": 1216, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "lowres", "clip": ["4", 1]}},
    "8": {"class_type": "PrimitiveString", "inputs": {"value": "1girl, (red hair:1.2)"}},
    "9": {"class_type": "RescaleCFG", "inputs": {"multiplier": 0.7, "model": ["4", 0]}},
}  # fmt: skip


def _png(path: Path, texts: dict[str, str]) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return path


def _hidden(path: Path, signature: bytes, payload: bytes, size: tuple[int, int] = (96, 64)) -> Path:
    """A picture with `payload` in the lowest bits of its alpha, column by column, the others opaque."""
    data = signature + (len(payload) * 8).to_bytes(4, "big") + payload
    alpha = np.full(size[0] * size[1], 255, np.uint8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    alpha[: len(bits)] = 0xFE | bits
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    pixels[..., 3] = alpha.reshape(size[0], size[1]).T
    Image.fromarray(pixels).save(path)
    return path


def test_our_own_come_back_to_the_last_field(tmp_path: Path) -> None:
    write_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", REQUEST, "m", True, {"batch": [1, 4]})
    found = read_settings(tmp_path / "a.png")
    assert (found.origin, found.request, found.model_name, found.batch) == ("sumizome", REQUEST, "m", (1, 4))
    assert found.differs == ()


@pytest.mark.parametrize("sampler", ["euler", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_3m_sde", "euler_cfg_pp"])
def test_what_we_write_for_a1111_says_the_same(tmp_path: Path, sampler: Any) -> None:
    from sumizome.png_info import parameters_text

    request = replace(
        REQUEST,
        sampling=replace(REQUEST.sampling, sampler=sampler, guidance=GuidanceConfig(4.5, guidance_rescale=0.7)),
        noise_row=0,
        syntax="a1111",
        redraw=RedrawConfig(),
        second_pass=SecondPassConfig(),
    )
    found = read_settings(_png(tmp_path / "a.png", {"parameters": parameters_text(request, "a, b", True)}))
    assert (found.origin, found.request, found.model_name) == ("a1111", request, "a, b")
    assert found.differs == ()


def test_a1111s_picture(tmp_path: Path) -> None:
    text = (
        "1girl, (red hair:1.2)\nsecond line\nNegative prompt: lowres, blurry\nSteps: 30, Sampler: DPM++ 2M, "
        "Schedule type: Automatic, CFG scale: 7, Seed: 99, Size: 832x1216, Model hash: abc, Model: some, Clip skip: 2, "
        'Foo: "a, b: c", Version: v1.10.1'
    )
    found = read_settings(_png(tmp_path / "a.png", {"parameters": text}))
    request = found.request
    assert request.prompt == "1girl, (red hair:1.2)\nsecond line"
    assert request.negative_prompt == "lowres, blurry"
    assert (request.canvas, request.seed, request.syntax) == ((1216, 832), 99, "a1111")
    assert (request.sampling.steps, request.sampling.sampler, request.sampling.grid) == (30, "dpmpp_2m", "karras")
    assert request.sampling.sigma_max == "ui"
    assert found.differs == (
        "Noise Schedule: drawn without zero terminal SNR", "RNG: the noise was a GPU's", "Clip skip: 2", "Foo: a, b: c",
    )  # fmt: skip
    old = "a\nSteps: 20, Sampler: DPM++ 2M SDE Karras, CFG scale: 7, Seed: 1, Size: 64x64, RNG: CPU"
    found = read_settings(_png(tmp_path / "b.png", {"parameters": old}))
    assert (found.request.sampling.sampler, found.request.sampling.grid) == ("dpmpp_2m_sde", "karras")


def _check_novelai(path: Path) -> None:
    found = read_settings(path)
    assert found.origin == "novelai"
    guidance = GuidanceConfig(5.0, 0.2, 19.0)
    sampling = SamplingConfig(28, "euler_ancestral", "native", guidance=guidance)
    assert found.request == PictureRequest(
        "1girl, {red hair}", "lowres", (1216, 832), 1234567890, sampling, syntax="novelai"
    )


def test_novelais_picture_by_its_text_and_by_its_alpha(tmp_path: Path) -> None:
    texts = {"Software": "NovelAI", "Description": "1girl", "Comment": json.dumps(NOVELAI_COMMENT)}
    _check_novelai(_png(tmp_path / "text.png", texts))
    payload = gzip.compress(json.dumps(texts).encode())
    _check_novelai(_hidden(tmp_path / "alpha.png", b"stealth_pngcomp", payload))


def test_a1111s_hidden_text(tmp_path: Path) -> None:
    text = "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"
    for signature, payload in ((b"stealth_pnginfo", text.encode()), (b"stealth_pngcomp", gzip.compress(text.encode()))):
        found = read_settings(_hidden(tmp_path / "a.png", signature, payload))
        assert (found.origin, found.request.prompt, found.request.sampling.steps) == ("a1111", "a cat", 20)


def test_comfyuis_picture(tmp_path: Path) -> None:
    found = read_settings(_png(tmp_path / "a.png", {"prompt": json.dumps(COMFYUI_GRAPH), "workflow": "{}"}))
    sampling = SamplingConfig(24, "dpmpp_2m", "sgm_uniform", "ui", guidance=GuidanceConfig(4.5, 0.7))
    assert (found.origin, found.model_name, found.differs) == ("comfyui", "my model", ())
    assert found.request == PictureRequest(
        "1girl, (red hair:1.2)", "lowres", (1216, 832), 42, sampling, syntax="comfyui"
    )


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"sumizome": "{"},
        {"sumizome": '{"prompt": 3}'},
        {"sumizome": '{"prompt": "a", "sampling": {"sampler": "magic"}}'},
        {"sumizome": '{"prompt": "a", "sampling": {"guidance": {"x": 1}}}'},
        {"sumizome": "[]"},
        {"Comment": "no JSON"},
        {"Comment": "[" * 5000},
        {"prompt": "{}"},
        {"prompt": json.dumps({"1": {"class_type": "KSampler", "inputs": {"latent_image": ["1", 0]}}})},
        {"parameters": "a\nSteps: many, Sampler: Euler, Seed: 1"},
    ],
)
def test_settings_that_cannot_be_read_are_one_line(tmp_path: Path, texts: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"a\.png"):
        read_settings(_png(tmp_path / "a.png", texts))


def test_hidden_bombs_and_broken_files_are_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(b"0" * 50_000_000)
    size = (512, 1 + (len(bomb) + 19) * 8 // 512)
    for path in (
        _hidden(tmp_path / "bomb.png", b"stealth_pngcomp", bomb, size),
        _hidden(tmp_path / "torn.png", b"stealth_pngcomp", gzip.compress(b"abc")[:-9]),
    ):
        with pytest.raises(DataError, match=r"no settings inside|cannot be read"):
            read_settings(path)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match="PNG picture"):
        read_settings(tmp_path / "x.png")
