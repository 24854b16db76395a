"""Settings that shapes do not show, through a single file and back: said in metadata, read by our loader, told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.activations import ACT2CLS
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from sumizome.cli.main import main
from sumizome.errors import ModelError
from sumizome.evaluate.figures import matched_sigma
from sumizome.inference import native_canvas
from sumizome.inspection import inspect_model
from sumizome.mending import mend_model
from sumizome.models.sdxl import load_model
from sumizome.models.unseen_settings import _CLIP_FUNCTIONS, _DIFFUSERS_FUNCTIONS, SETTINGS_KEY, stated_settings
from sumizome.models.vae_file import load_vae, write_vae_file

OTHERWISE: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "norm_eps": 1e-3,
        "attention_head_dim": [2, 2, 4],
        "timestep_post_act": "mish",
        "time_embedding_act_fn": "gelu",
    },
    "vae": {"force_upcast": False, "act_fn": "gelu"},
    "text_encoder": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    "text_encoder_2": {"hidden_act": "quick_gelu"},
}
"""Each differs from what shapes and SDXL's habits would have a reader assume."""


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def odd_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_folder, folder)
    for name, values in OTHERWISE.items():
        change(folder / name / "config.json", **values)
    change(folder / "model_index.json", force_zeros_for_empty_prompt=True)
    return folder


def by_mend(source: Path, out: Path) -> int:
    return main(["mend", str(source), "--out", str(out)])


def by_export(source: Path, out: Path) -> int:
    return main(["export", str(source), "--file", str(out), "--dtype", "fp32"])


@torch.no_grad()
def answers(path: Path) -> list[torch.Tensor]:
    """What each network makes of the same input."""
    model = load_model(path)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=draw)
    tokens = torch.randint(0, 49000, (1, 77), generator=draw)
    first, second = (encoder(tokens, output_hidden_states=True) for encoder in model.text_encoders)
    words = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    conditions = {"text_embeds": second.text_embeds, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    noise = model.unet(latents, 500, words, added_cond_kwargs=conditions).sample
    return [words, second.text_embeds, noise, model.vae.decode(latents).sample]


@pytest.mark.parametrize("write", [by_mend, by_export])
def test_a_folder_becomes_a_file_that_answers_the_same_and_a_folder_again(
    odd_folder: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path, Path], int],
) -> None:
    """Text encoders with another activation came back as SDXL's, and no word: other embeddings, other pictures."""
    out = tmp_path / "m.safetensors"
    assert write(odd_folder, out) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("! ")]
    assert len(told) == 2 and "text_encoder hidden_act gelu" in told[0] and "draw something else" in told[0]
    assert "unet sample_size 8, vae force_upcast false" in told[1] and "draw" not in told[1]
    wanted = answers(odd_folder)
    assert all(torch.equal(one, other) for one, other in zip(answers(out), wanted, strict=True))
    assert not any(torch.allclose(one, other) for one, other in zip(answers(tiny_folder), wanted, strict=True))
    assert any("hidden_act gelu" in problem for problem in inspect_model(out).problems)
    assert inspect_model(out).metadata["modelspec.resolution"] == "32x32"

    again = mend_model(out, tmp_path / "n.safetensors").path
    folder = mend_model(again, tmp_path / "back").path
    for name, values in OTHERWISE.items():
        config = json.loads((folder / name / "config.json").read_text())
        assert {key: config[key] for key in values} == values
    # Our exports say the encoded prompt for all models; a copy says what its source did.
    zeros = json.loads((folder / "model_index.json").read_text())["force_zeros_for_empty_prompt"]
    assert zeros == (write is by_mend)


def test_an_sdxl_says_nothing_and_nothing_is_told(
    tiny_folder: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert by_mend(tiny_folder, tmp_path / "m.safetensors") == 0
    assert "! " not in capsys.readouterr().out
    for path in (tmp_path / "m.safetensors", tiny_file):
        assert SETTINGS_KEY not in inspect_model(path).metadata


def test_a_vae_alone_says_its_own(odd_folder: Path, tmp_path: Path) -> None:
    write_vae_file(load_vae(odd_folder), tmp_path / "vae.safetensors")
    config = load_vae(tmp_path / "vae.safetensors").config
    assert config["act_fn"] == "gelu" and config["force_upcast"] is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[1]", "no table"),
        ('{"vae": 3}', "no table"),
        ('{"vae": {"scaling_factor": 1.0}}', "'vae.scaling_factor' to '1.0', which is not known"),
        ('{"unet": {"attention_head_dim": [1e9]}}', "not known"),
        ('{"unet": {"norm_eps": NaN}}', "not known"),
        ('{"unet": {"sample_size": true}}', "not known"),
        (f'{{"unet": {{"norm_eps": 1{"0" * 400}}}}}', "not known"),
        (r'{"text_encoder": {"hidden_act": "\u001b[31m"}}', "text_encoder.hidden_act"),
        ('{"vae": {"force_upcast": "no"}}', "not known"),
        ('{"moon": {"force_upcast": false}}', "not known"),
        # Each of these built a network that drew NaN, did not run, or ran out of memory.
        ('{"unet": {"norm_eps": 0.0}}', "not known"),
        ('{"unet": {"mid_block_scale_factor": 0}}', "not known"),
        ('{"unet": {"resnet_out_scale_factor": 0.0}}', "not known"),
        ('{"unet": {"norm_num_groups": 0}}', "not known"),
        ('{"unet": {"attention_head_dim": [2, 0, 4]}}', "not known"),
        ('{"unet": {"addition_time_embed_dim": 0}}', "not known"),
        ('{"unet": {"downsample_padding": 2}}', "not known"),
        ('{"unet": {"freq_shift": 16}}', "not known"),
        ('{"unet": {"sample_size": 4096}}', "not known"),
        ('{"unet": {"sample_size": [16, 4096]}}', "not known"),
        ('{"unet": {"sample_size": [16, 16, 16]}}', "not known"),
        ('{"unet": {"norm_eps": [1e-5, 1e-5]}}', "not known"),
        ('{"unet": {"timestep_post_act": "moon"}}', "not known"),
        ('{"vae": {"act_fn": "quick_gelu"}}', "not known"),
        ('{"text_encoder": {"layer_norm_eps": 0}}', "not known"),
        ('{"text_encoder": {"num_attention_heads": 0}}', "not known"),
        ('{"text_encoder": {"hidden_act": "moon"}}', "'text_encoder.hidden_act' to 'moon', which is not known"),
    ],
)
def test_settings_that_are_not_known_are_refused_in_one_line(
    tiny_file: Path, tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=words):
        stated_settings({SETTINGS_KEY: text})
    path = tmp_path / "m.safetensors"
    save_file(load_file(tiny_file), path, metadata={SETTINGS_KEY: text})
    assert any(SETTINGS_KEY in problem for problem in inspect_model(path).problems)
    assert by_mend(path, tmp_path / "out.safetensors") == 2
    error = capsys.readouterr().err
    assert "m.safetensors" in error and words in error and error.count("\n") == 1 and error[:-1].isprintable()


def test_functions_are_those_that_the_libraries_know() -> None:
    """Those with weights of their own are none: no layout has a place for these. Older libraries know fewer."""
    assert set(ACT2CLS) == _DIFFUSERS_FUNCTIONS
    without = {name for name in ACT2FN if not list(ACT2FN[name].parameters())}
    assert without <= _CLIP_FUNCTIONS and _CLIP_FUNCTIONS - without <= {"sqrtsoftplus", "gelu_python_tanh"}


def test_swish_is_silu_and_no_word_is_lost_on_it(
    tiny_folder: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, told = tmp_path / "swish", tmp_path / "told.safetensors"
    shutil.copytree(tiny_folder, folder)
    for name in ("unet", "vae"):
        change(folder / name / "config.json", act_fn="swish")
    assert by_mend(folder, tmp_path / "m.safetensors") == 0
    assert "! " not in capsys.readouterr().out
    assert SETTINGS_KEY not in inspect_model(tmp_path / "m.safetensors").metadata
    # As a file says it that was written before.
    save_file(load_file(tiny_file), told, metadata={SETTINGS_KEY: json.dumps({"vae": {"act_fn": "swish"}})})
    assert not any("act_fn" in problem for problem in inspect_model(told).problems)


@pytest.mark.parametrize("write", [by_mend, by_export])
@pytest.mark.parametrize(
    ("stated", "canvas"), [(None, (64, 64)), ([16, 24], (64, 96)), ([8, 8], (32, 32)), (24, (96, 96))]
)
def test_a_canvas_of_one_side_two_or_none_is_kept(
    tiny_folder: Path,
    tmp_path: Path,
    stated: object,
    canvas: tuple[int, int],
    write: Callable[[Path, Path], int],
) -> None:
    """None, which is diffusers' default, and a pair ended in a TypeError."""
    folder, out = tmp_path / "folder", tmp_path / "m.safetensors"
    shutil.copytree(tiny_folder, folder)
    change(folder / "unet" / "config.json", sample_size=stated)
    assert write(folder, out) == 0
    height, width = canvas
    assert inspect_model(out).metadata["modelspec.resolution"] == f"{width}x{height}"
    for path in (folder, out):
        model = load_model(path, components=("unet", "vae"))
        assert native_canvas(model) == canvas
        assert matched_sigma(model, 128.0) == pytest.approx((height * width) ** 0.5 / 4)


@pytest.mark.parametrize("stated", [0, -8, 4096, True, "x", 16.5, [16], [16, 0], [16, None], {"a": 1}])
def test_what_is_no_canvas_is_told_in_one_line(
    tiny_folder: Path, tmp_path: Path, stated: object, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder, folder)
    change(folder / "unet" / "config.json", sample_size=stated)
    assert by_mend(folder, tmp_path / "m.safetensors") == 2
    error = capsys.readouterr().err
    assert "sample_size" in error and error.count("\n") == 1


def test_a_value_that_no_file_can_say_is_not_written(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written is read back: a copy that our own loader refuses would be no copy."""
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder, folder)
    change(folder / "unet" / "config.json", mid_block_scale_factor=0)
    for write in (by_mend, by_export):
        assert write(folder, tmp_path / "m.safetensors") == 2
        error = capsys.readouterr().err
        assert "sets mid_block_scale_factor to '0'" in error and error.count("\n") == 1
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("features", [16, 64])
def test_time_ids_that_do_not_fit_the_prompt_are_one_line(
    tiny_file: Path, tmp_path: Path, features: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.safetensors"
    settings = json.dumps({"unet": {"addition_time_embed_dim": features}})
    save_file(load_file(tiny_file), path, metadata={SETTINGS_KEY: settings})
    asked = ["sample", "--model", str(path), "--prompt", "a", "--out", str(tmp_path / "pictures")]
    commands = [asked] if features == 16 else [asked, ["mend", str(path), "--out", str(tmp_path / "n.safetensors")]]
    for command in commands:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "addition_time_embed_dim" in error and error.count("\n") == 1
