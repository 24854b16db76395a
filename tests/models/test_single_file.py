"""The key map against the published layout at SDXL's real size, and against diffusers' own converters."""

from collections.abc import Mapping

import pytest
import torch
from diffusers.loaders import single_file_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.errors import ExportError, ModelError
from sumizome.models.architecture import Config, clip_config, unet_config, vae_config
from sumizome.models.infer_config import infer_configs
from sumizome.models.key_map import from_original, key_rules, to_original
from sumizome.models.networks import build_network, native_state
from sumizome.models.prediction_marks import prediction_markers, prediction_metadata, prediction_of
from sumizome.models.sdxl import SDXLModel

SDXL: dict[str, Config] = {
    "unet": unet_config(),
    "vae": vae_config(),
    "text_encoder": clip_config(),
    "text_encoder_2": clip_config(width=1280, layers=32, intermediate=5120, activation="gelu", projection_dim=1280),
}


def _original(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """An original file's tensors of {network: its native state}."""
    return {
        rule.original: to_original(rule, {f"{name}.{key}": tensor for key, tensor in tensors.items()})
        for name, tensors in state.items()
        for rule in key_rules(name, tensors)
    }


@pytest.fixture(scope="module")
def full_size() -> dict[str, dict[str, Tensor]]:
    """The native state of a real SDXL, without memory."""
    return {name: native_state(build_network(name, config, "meta")) for name, config in SDXL.items()}


@pytest.fixture(scope="module")
def tiny_state(tiny: SDXLModel) -> dict[str, dict[str, Tensor]]:
    return {name: native_state(network) for name, network in tiny.networks.items()}


def test_the_real_unet_has_the_published_size(full_size: dict[str, dict[str, Tensor]]) -> None:
    unet = full_size["unet"]
    assert len(unet) == 1680
    assert sum(tensor.numel() for tensor in unet.values()) == 2_567_463_684


def test_the_real_layout_has_the_keys_that_programs_probe(full_size: dict[str, dict[str, Tensor]]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in _original(full_size).items()}
    probes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
    }
    assert {name: shapes.get(name) for name in probes} == probes


@pytest.mark.parametrize("size", ["full_size", "tiny_state"])
def test_every_tensor_is_in_exactly_one_rule(size: str, request: pytest.FixtureRequest) -> None:
    for name, state in request.getfixturevalue(size).items():
        rules = key_rules(name, state)
        assert sorted(key for rule in rules for key in rule.native) == sorted(f"{name}.{key}" for key in state)
        assert len({rule.original for rule in rules}) == len(rules)


def test_configurations_are_read_back_from_shapes(
    full_size: dict[str, dict[str, Tensor]], tiny: SDXLModel, tiny_state: dict[str, dict[str, Tensor]]
) -> None:
    assert infer_configs({name: tuple(tensor.shape) for name, tensor in _original(full_size).items()}) == SDXL
    found = infer_configs({name: tuple(tensor.shape) for name, tensor in _original(tiny_state).items()})
    for name, network in tiny.networks.items():
        stated = network.config.to_dict() if name.startswith("text") else dict(network.config)
        assert found[name] == {key: stated[key] for key in found[name]}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("depths", [(0, 1), (1, 2, 1), (0, 0, 2, 1)])
def test_other_depths_and_levels_keep_the_map_one_to_one(layers: int, depths: tuple[int, ...]) -> None:
    config = unet_config(
        block_out_channels=(32, 64, 96, 96)[: len(depths)], transformer_layers=depths, layers_per_block=layers
    )
    state = native_state(build_network("unet", config, "meta"))
    assert len({rule.original for rule in key_rules("unet", state)}) == len(state)
    shapes = {name: tuple(tensor.shape) for name, tensor in _original({"unet": state}).items()}
    assert infer_configs(shapes)["unet"] == config


@pytest.mark.parametrize("size", ["full_size", "tiny_state"])
def test_diffusers_converters_read_what_we_write(size: str, request: pytest.FixtureRequest) -> None:
    states = request.getfixturevalue(size)
    original = _original(states)
    layers = 2 if size == "full_size" else 1
    unet = {"layers_per_block": layers, "addition_embed_type": "text_time"}
    levels = (None,) * (4 if size == "full_size" else 3)
    prefix = "conditioner.embedders.1.model."
    converted = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(original), unet),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(
            dict(original), {"down_block_types": levels, "up_block_types": levels}
        ),
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(dict(original)),
        "text_encoder_2": single_file_utils.convert_open_clip_checkpoint(None, dict(original), prefix=prefix),
    }
    for name, state in states.items():
        found = {key.removeprefix("text_model."): tensor for key, tensor in converted[name].items()}
        assert set(found) == set(state), name
        for key, tensor in state.items():
            # diffusers leaves the VAE's attention as 1×1 convolutions until the module asks for less.
            assert found[key].squeeze().shape == tensor.squeeze().shape, key
            if not tensor.is_meta:
                assert torch.equal(found[key].reshape(tensor.shape), tensor), key


def test_the_way_back_is_exact(tiny_state: dict[str, dict[str, Tensor]]) -> None:
    for name, state in tiny_state.items():
        native = {f"{name}.{key}": tensor for key, tensor in state.items()}
        for rule in key_rules(name, state):
            for key, tensor in from_original(rule, to_original(rule, native)).items():
                assert tensor.shape == native[key].shape and torch.equal(tensor, native[key])


def test_a_vae_with_linear_attention_reads_as_one_with_pointwise_convolutions(tiny: SDXLModel) -> None:
    state = native_state(tiny.vae)
    rule = next(rule for rule in key_rules("vae", state) if rule.original.endswith("encoder.mid.attn_1.q.weight"))
    linear = state["encoder.mid_block.attentions.0.to_q.weight"]
    for stored in (linear, linear[:, :, None, None]):
        (read,) = from_original(rule, stored).values()
        assert torch.equal(read, linear)


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        ([], {}, ("epsilon", False)),
        (["v_pred"], {}, ("v_prediction", False)),
        (["v_pred", "ztsnr"], {}, ("v_prediction", True)),
        (["ztsnr"], {}, ("epsilon", False)),  # as in ComfyUI
        ([], {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        ([], {"modelspec.prediction_type": "v-zsnr"}, ("v_prediction", True)),
        ([], {"prediction_type": "v"}, ("v_prediction", False)),
        (["v_pred", "ztsnr"], {"modelspec.prediction_type": "epsilon"}, ("v_prediction", True)),
    ],
)
def test_what_a_file_says_of_its_prediction(
    names: list[str], metadata: dict[str, str], expected: tuple[str, bool]
) -> None:
    assert prediction_of(names, metadata) == expected


def test_edm_files_are_refused() -> None:
    with pytest.raises(ModelError, match="EDM"):
        prediction_of(["edm_mean", "edm_std"], {})


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_markers_and_metadata_each_say_what_they_were_made_for(
    prediction_type: PredictionType, zero_terminal_snr: bool
) -> None:
    schedule = ScheduleConfig(zero_terminal_snr=zero_terminal_snr)
    markers = prediction_markers(prediction_type, schedule)
    metadata = prediction_metadata(prediction_type, schedule)
    assert prediction_of(markers, {}) == (prediction_type, zero_terminal_snr)
    assert prediction_of([], metadata) == (prediction_type, zero_terminal_snr)


@pytest.mark.parametrize(
    ("prediction_type", "schedule"),
    [
        ("sample", ScheduleConfig(zero_terminal_snr=False)),
        ("epsilon", ScheduleConfig(zero_terminal_snr=True)),
        ("v_prediction", ScheduleConfig(beta_end=0.02)),
    ],
)
def test_what_the_layout_cannot_say_is_refused(prediction_type: PredictionType, schedule: ScheduleConfig) -> None:
    with pytest.raises(ExportError, match="single-file layout"):
        prediction_markers(prediction_type, schedule)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_shapes_of_any_file_give_a_network_or_one_sentence(tiny: SDXLModel, data: st.DataObject) -> None:
    network = data.draw(st.sampled_from(sorted(tiny.networks)))
    state = native_state(tiny.networks[network])
    shapes = {name: tuple(tensor.shape) for name, tensor in _original({network: state}).items()}
    names = st.sampled_from(sorted(shapes))
    for name in data.draw(st.lists(names, max_size=3)):
        shapes.pop(name, None)
    sides = st.lists(st.sampled_from([0, 1, 2, 3, 31, 64, 10**9, 2**40]), max_size=4).map(tuple)
    shapes |= data.draw(st.dictionaries(names, sides, max_size=3))
    shapes |= {
        name.replace(".1.", f".{number}."): (0, 2**40)
        for name, number in data.draw(st.lists(st.tuples(names, st.sampled_from([5, 10**12])), max_size=2))
    }
    try:
        for name, config in infer_configs(shapes).items():
            build_network(name, config, "meta")
    except ModelError as error:
        assert "\n" not in str(error)
