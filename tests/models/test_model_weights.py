"""Weights that go straight from the file into networks: the same bytes and digests as a model that was loaded whole."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sumizome.errors import ModelError
from sumizome.models.model_weights import fill_shards, stored_digest
from sumizome.models.sdxl import load_model, model_digest

ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(params=["folder", "file"])
def stored(request: pytest.FixtureRequest, tiny_folder: Path, tiny_file: Path) -> Path:
    return tiny_folder if request.param == "folder" else tiny_file


def test_a_file_has_the_digest_of_the_model_in_it(stored: Path) -> None:
    model = load_model(stored)
    assert stored_digest(stored, "unet") == model_digest(model.unet)
    assert stored_digest(stored, *ENCODERS) == model_digest(model.text_encoders)


def test_networks_without_weights_are_filled_with_those_of_the_file(stored: Path) -> None:
    def put(parameter: Tensor, tensor: Tensor) -> None:
        parameter.copy_(tensor)

    whole = load_model(stored)
    bare = load_model(stored, without_weights=("unet", "text_encoders"))
    networks = {name: network for name, network in bare.networks.items() if name != "vae"}
    assert all(parameter.is_meta for network in networks.values() for parameter in network.parameters())
    fill_shards(stored, networks, torch.device("cpu"), put)
    for name, network in networks.items():
        expected = whole.networks[name]
        for (key, found), (_, right) in zip(
            [*network.named_parameters(), *network.named_buffers()],
            [*expected.named_parameters(), *expected.named_buffers()],
            strict=True,
        ):
            assert torch.equal(found, right), f"{name}.{key}"


def test_a_file_that_lacks_a_network_is_said_to(tmp_path: Path, tiny_folder: Path) -> None:
    bare = load_model(tiny_folder, components=("unet",), without_weights=("unet",))
    with pytest.raises(ModelError):
        fill_shards(tmp_path / "none.safetensors", {"unet": bare.unet}, torch.device("cpu"), lambda *_: None)
