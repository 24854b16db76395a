"""Settings that shapes do not show, through a single file and back: said in metadata, read by our loader, told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sumizome.cli.main import main
from sumizome.errors import ModelError
from sumizome.inspection import inspect_model
from sumizome.mending import mend_model
from sumizome.models.sdxl import load_model
from sumizome.models.unseen_settings import SETTINGS_KEY, stated_settings
from sumizome.models.vae_file import load_vae, write_vae_file

OTHERWISE: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 8, "norm_eps": 1e-3, "attention_head_dim": [2, 2, 4]},
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


def test_an_activation_that_does_not_exist_is_an_error_of_the_model(tiny_file: Path, tmp_path: Path) -> None:
    settings = json.dumps({"text_encoder": {"hidden_act": "moon"}})
    save_file(load_file(tiny_file), tmp_path / "m.safetensors", metadata={SETTINGS_KEY: settings})
    with pytest.raises(ModelError, match=r"configuration of text_encoder .*: 'moon'"):
        load_model(tmp_path / "m.safetensors", components=("text_encoders",))
