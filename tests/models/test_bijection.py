"""The key map is a bijection: over all of SDXL's tensors, and over block layouts that nobody has made yet."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import SDXL
from torch import Tensor

from sumizome.models.architecture import Config, clip_config, unet_config, vae_config
from sumizome.models.expected import expected_original, expected_shapes
from sumizome.models.infer_config import infer_configs
from sumizome.models.key_map import from_original, key_rules, to_original

TENSORS = {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517}


def assert_names_map_one_to_one(network: str, shapes: dict[str, tuple[int, ...]], config: Config) -> None:
    """Injective both ways, nothing left out, and no number of a tensor lost."""
    rules = key_rules(network, shapes)
    native = [name for rule in rules for name in rule.native]
    assert sorted(native) == sorted(f"{network}.{key}" for key in shapes)
    originals = [rule.original for rule in rules]
    assert len(set(originals)) == len(originals)
    stored = expected_original(network, config)
    assert set(stored) == set(originals)
    assert sum(map(math.prod, stored.values())) == sum(map(math.prod, shapes.values()))
    # The order in which a file lists its tensors decides nothing.
    assert {rule.original: rule for rule in key_rules(network, reversed(list(shapes)))} == {
        rule.original: rule for rule in rules
    }


@pytest.mark.parametrize("network", SDXL)
def test_every_tensor_of_sdxl_has_one_place_in_either_layout(network: str) -> None:
    shapes = expected_shapes(network, SDXL[network])
    assert len(shapes) == TENSORS[network]
    assert_names_map_one_to_one(network, shapes, SDXL[network])


def test_no_two_networks_share_a_name() -> None:
    places = [key for network, config in SDXL.items() for key in expected_original(network, config)]
    assert len(set(places)) == len(places)


@st.composite
def unets(draw: st.DrawFn) -> tuple[str, Config]:
    levels = draw(st.integers(2, 4))
    depths = [draw(st.integers(0, 3)) for _ in range(levels - 1)] + [draw(st.integers(1, 3))]
    widths = tuple(draw(st.sampled_from([32, 64, 96])) for _ in range(levels))
    layers = draw(st.integers(1, 3))
    sizes = {"cross_attention_dim": draw(st.sampled_from([8, 24])), "pooled_dim": draw(st.sampled_from([8, 16]))}
    config = unet_config(block_out_channels=widths, transformer_layers=tuple(depths), layers_per_block=layers, **sizes)
    return "unet", config


@st.composite
def vaes(draw: st.DrawFn) -> tuple[str, Config]:
    widths = tuple(draw(st.sampled_from([8, 16])) for _ in range(draw(st.integers(2, 5))))
    return "vae", vae_config(
        block_out_channels=widths, layers_per_block=draw(st.integers(1, 3)), latent_channels=draw(st.integers(2, 5))
    )


@st.composite
def encoders(draw: st.DrawFn) -> tuple[str, Config]:
    width, network = draw(st.sampled_from([32, 64])), draw(st.sampled_from(["text_encoder", "text_encoder_2"]))
    return network, clip_config(
        width=width,
        layers=draw(st.integers(1, 4)),
        intermediate=draw(st.sampled_from([8, 16])),
        activation="quick_gelu" if network == "text_encoder" else "gelu",
        projection_dim=width,
    )


@settings(max_examples=20, derandomize=True)
@given(case=unets() | vaes() | encoders())
def test_any_block_layout_maps_one_to_one_and_is_read_back_from_its_shapes(case: tuple[str, Config]) -> None:
    network, config = case
    shapes = expected_shapes(network, config)
    assert_names_map_one_to_one(network, shapes, config)
    found = infer_configs(expected_original(network, config))[network]
    assert found == config


@settings(max_examples=12, derandomize=True)
@given(case=unets() | vaes() | encoders())
def test_there_and_back_gives_every_number_its_own_place(case: tuple[str, Config]) -> None:
    network, config = case
    shapes = {name: shape for name, shape in expected_shapes(network, config).items() if math.prod(shape) < 200_000}
    native, reached = {}, 0
    for name, shape in shapes.items():
        # No number occurs twice (int64 is not rounded): one in a wrong place cannot go unseen.
        native[f"{network}.{name}"] = torch.arange(reached, reached + math.prod(shape)).reshape(shape)
        reached += math.prod(shape)
    original: dict[str, Tensor] = {}
    rules = [rule for rule in key_rules(network, expected_shapes(network, config)) if set(rule.native) <= set(native)]
    for rule in rules:
        original[rule.original] = to_original(rule, native)
    assert len(original) == len(rules)
    back = {name: tensor for rule in rules for name, tensor in from_original(rule, original[rule.original]).items()}
    assert set(back) == set(native)
    assert all(torch.equal(tensor, native[name]) for name, tensor in back.items())
