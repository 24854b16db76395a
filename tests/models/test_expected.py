"""The tables of names and shapes against the modules of diffusers and transformers themselves."""

import json
import shutil
from pathlib import Path

import pytest

from sumizome.cli.main import main
from sumizome.errors import ModelError
from sumizome.inspection import inspect_model
from sumizome.models.architecture import clip_config, unet_config, vae_config
from sumizome.models.expected import expected_original, expected_shapes
from sumizome.models.key_map import key_rules, to_original
from sumizome.models.networks import build_network, native_state
from sumizome.models.sdxl import SDXLModel, load_model

CONFIGS = {
    "sdxl unet": unet_config(),
    "sdxl vae": vae_config(),
    "sdxl text_encoder": clip_config(),
    "sdxl text_encoder_2": clip_config(width=1280, layers=32, intermediate=5120, projection_dim=1280),
    "three unet": unet_config(block_out_channels=(32, 64, 96, 96), transformer_layers=(1, 0, 2, 1), layers_per_block=3),
    "three vae": vae_config(block_out_channels=(32, 64), layers_per_block=3),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_names_and_shapes_are_the_modules_own(case: str) -> None:
    name, config = case.split()[1], CONFIGS[case]
    state = native_state(build_network(name, config, "meta"))
    assert expected_shapes(name, config) == {key: tuple(tensor.shape) for key, tensor in state.items()}
    stored = {
        rule.original: tuple(to_original(rule, {f"{name}.{key}": t for key, t in state.items()}).shape)
        for rule in key_rules(name, state)
    }
    assert expected_original(name, config) == stored


def test_the_tiny_model_too(tiny: SDXLModel) -> None:
    for name, network in tiny.networks.items():
        config = network.config.to_dict() if name.startswith("text") else dict(network.config)
        expected = {key: tuple(tensor.shape) for key, tensor in native_state(network).items()}
        assert expected_shapes(name, config) == expected


def test_another_architecture_is_named() -> None:
    with pytest.raises(ModelError, match="unet"):
        expected_shapes("unet", unet_config() | {"transformer_layers_per_block": [0, [2, 1], 10]})
    with pytest.raises(ModelError, match="vae"):
        expected_shapes("vae", {})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("unet", "layers_per_block", 10**9),
        ("unet", "transformer_layers_per_block", [1, 1, 10**9]),
        ("unet", "transformer_layers_per_block", 10**9),
        ("unet", "block_out_channels", [32] * 1000),
        ("vae", "layers_per_block", 10**9),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder_2", "num_hidden_layers", 1e400),
    ],
)
def test_more_blocks_than_anybody_could_build_end_in_one_line(
    name: str, key: str, value: object, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Listing what such a network has did not end, nor did building it."""
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder, folder)
    place = folder / name / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=f"{key} asks for"):
        expected_shapes(name, json.loads(place.read_text()))
    assert any(f"{key} asks for" in problem for problem in inspect_model(folder).problems)
    with pytest.raises(ModelError, match=f"{key} asks for"):
        load_model(folder)
    assert main(["mend", str(folder), "--out", str(tmp_path / "m.safetensors")]) == 2
    error = capsys.readouterr().err
    assert f"{key} asks for" in error and error.count("\n") == 1


def test_a_width_that_is_none_is_named() -> None:
    for width in (0, -1, 10**9, None, "x"):
        with pytest.raises(ModelError, match="vae"):
            expected_shapes("vae", vae_config() | {"in_channels": width})
