"""Loading: the layouts that people have, and a sentence for everything that can be missing or wrong."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sumizome.errors import ModelError
from sumizome.inspection import inspect_model
from sumizome.models.sdxl import SDXLModel, load_model, model_digest

UNET = "unet/diffusion_pytorch_model.safetensors"


def _digests(model: SDXLModel) -> dict[str, str]:
    return {name: model_digest(network) for name, network in model.networks.items()}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy whose files may be replaced (they are links: never written to)."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny", copy_function=os.link))


def _edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(content))


def _rewrite(path: Path, source: Path, change: Callable[[dict[str, Tensor]], None], **metadata: str) -> Path:
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    return path


def test_folder_and_single_file_hold_the_same_model(tiny: SDXLModel, tiny_folder: Path, tiny_file: Path) -> None:
    for path in (tiny_folder, tiny_file):
        model = load_model(path)
        assert _digests(model) == _digests(tiny)
        assert model.prediction_type == "v_prediction" and model.schedule_config == tiny.schedule_config
        assert model.source == path
        assert not any(p.is_meta for network in model.networks.values() for p in network.parameters())
        assert not any(network.training for network in model.networks.values())


@torch.no_grad()
def test_a_loaded_text_encoder_works_like_the_original(tiny: SDXLModel, tiny_folder: Path) -> None:
    # Its positions are a buffer that no file holds: weights alone would not show a wrong one.
    ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    for ours, loaded in zip(tiny.text_encoders, load_model(tiny_folder).text_encoders, strict=True):
        assert torch.equal(ours(ids).last_hidden_state, loaded(ids).last_hidden_state)


def test_dtype_is_the_networks_and_the_vae_stays_float32(tiny_file: Path) -> None:
    model = load_model(tiny_file, dtype=torch.bfloat16)
    assert model.unet.dtype == torch.bfloat16 and model.text_encoders[1].dtype == torch.bfloat16
    assert model.vae.dtype == torch.float32


def test_components_that_are_not_asked_for_are_not_read(folder: Path) -> None:
    (folder / UNET).unlink()
    model = load_model(folder, components=("vae",))
    assert list(model.networks) == ["vae"]
    for component, name in (("unet", "unet"), ("text_encoders", "text_encoder")):
        with pytest.raises(ModelError, match=rf"{name} is needed, and was not loaded"):
            getattr(model, component)


def test_the_loaded_model_outlives_its_file(tiny: SDXLModel, tiny_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(tiny_file, tmp_path / "model.safetensors"))
    model = load_model(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert _digests(model) == _digests(tiny)


def test_overrides_win(tiny_file: Path) -> None:
    model = load_model(tiny_file, prediction_type="epsilon", zero_terminal_snr=False)
    assert model.prediction_type == "epsilon" and not model.schedule_config.zero_terminal_snr


# --- folders ---------------------------------------------------------------------------------------------------------


def test_fp16_variant_is_found(folder: Path, tiny: SDXLModel) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert _digests(load_model(folder)) == _digests(tiny)


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ],
)
def test_shards_are_found(folder: Path, tiny: SDXLModel, index: str) -> None:
    shards = _shard(folder, index)
    assert _digests(load_model(folder)) == _digests(tiny)
    shards[1].unlink()
    with pytest.raises(ModelError, match="00002-of-00002"):
        load_model(folder)


def _shard(folder: Path, index: str) -> list[Path]:
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    names = sorted(tensors)
    paths = [folder / f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for path, half in zip(paths, halves, strict=True):
        save_file({name: tensors[name] for name in half}, path)
    weight_map = {name: path.name for path, half in zip(paths, halves, strict=True) for name in half}
    (folder / "unet" / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..\\x.safetensors"])
def test_a_shard_index_cannot_point_elsewhere(folder: Path, name: str) -> None:
    (folder / UNET).unlink()
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(ModelError, match="own folder"):
        load_model(folder)


@pytest.mark.parametrize(
    "part", ["model_index.json", "unet/config.json", "vae", "text_encoder_2", UNET, "scheduler/scheduler_config.json"]
)
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match=part.split("/")[-1]):
        load_model(folder)


def test_pickled_weights_in_a_folder_are_refused(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="never read here"):
        load_model(folder)


def test_encoders_saved_without_the_old_prefix_load_too(folder: Path, tiny: SDXLModel) -> None:
    # transformers 5 drops "text_model." from the first encoder's names.
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}, path)
    assert _digests(load_model(folder)) == _digests(tiny)


def test_a_vae_with_the_attention_names_of_2023_loads_too(folder: Path, tiny: SDXLModel) -> None:
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def renamed(name: str) -> str:
        for new, previous in old.items():
            name = name.replace(new, previous)
        return name

    save_file({renamed(name): tensor for name, tensor in tensors.items()}, path)
    assert model_digest(load_model(folder, components=("vae",)).vae) == model_digest(tiny.vae)


def test_scheduler_config_says_what_is_predicted(folder: Path) -> None:
    config = folder / "scheduler/scheduler_config.json"
    _edit_json(config, prediction_type="epsilon", rescale_betas_zero_snr=False, trained_betas=None)
    model = load_model(folder, components=())
    assert model.prediction_type == "epsilon" and not model.schedule_config.zero_terminal_snr
    _edit_json(config, beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ModelError, match="squaredcos_cap_v2"):
        load_model(folder, components=())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "expected a StableDiffusionXLPipeline"),
        ("text_encoder/config.json", {"vocab_size": 49409}, "49409"),
        ("unet/config.json", {"block_out_channels": [32, 64, 128]}, "shape"),
        ("unet/config.json", {"down_block_types": ["Nonsense"] * 3}, "unet"),
        ("unet/config.json", {"down_block_types": [None] * 3}, "unet"),
        ("text_encoder/config.json", {"num_attention_heads": 3}, "text_encoder"),
        ("text_encoder/config.json", {"hidden_size": None}, "text_encoder"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": math.inf}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "not SDXL's"),
    ],
)
def test_a_folder_of_another_architecture_is_refused(
    folder: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    _edit_json(folder / file, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    with contextlib.suppress(ModelError):
        inspect_model(folder)  # a sentence or findings, never a traceback


# --- single files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("first_stage_model.", "has no vae"),
        ("conditioner.embedders.0.", "has no text_encoder "),
        ("conditioner.embedders.1.", "has no text_encoder_2"),
        ("model.diffusion_model.", "has no unet"),
    ],
)
def test_a_file_without_a_component_names_it(tiny_file: Path, tmp_path: Path, prefix: str, message: str) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    path = _rewrite(tmp_path / "part.safetensors", tiny_file, drop)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_a_file_without_vae_still_gives_its_unet(tiny: SDXLModel, tiny_file: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(("first_stage_model.", "conditioner."))]:
            del tensors[name]

    path = _rewrite(tmp_path / "part.safetensors", tiny_file, drop)
    assert model_digest(load_model(path, components=("unet",)).unet) == model_digest(tiny.unet)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_unet_alone_loads_with_or_without_its_prefix(
    tiny: SDXLModel, tiny_file: Path, tmp_path: Path, prefix: str
) -> None:
    own = "model.diffusion_model."
    tensors = {
        prefix + name.removeprefix(own): tensor for name, tensor in load_file(tiny_file).items() if name.startswith(own)
    }
    path = tmp_path / "unet.safetensors"
    save_file(tensors | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, path)
    model = load_model(path, components=("unet",))
    assert model_digest(model.unet) == model_digest(tiny.unet)
    assert model.prediction_type == "v_prediction" and model.schedule_config.zero_terminal_snr
    with pytest.raises(ModelError, match="has no vae"):
        load_model(path)


_IN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
_IN_VAE = "first_stage_model.encoder.mid.attn_1.q.weight"
_IN_UNET = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(_IN_UNET), r"down_blocks\.0\.resnets\.0\.conv1\.weight"),
        (lambda tensors: tensors.update({"model.diffusion_model.extra.weight": torch.ones(1)}), r"extra\.weight"),
        (lambda tensors: tensors.update({_IN_UNET: tensors[_IN_UNET][:, :16].clone()}), "shape"),
        (lambda tensors: tensors.update({_IN_CLIP: tensors[_IN_CLIP][:2].clone()}), "in_proj_weight has shape"),
        (lambda tensors: tensors.update({_IN_VAE: tensors[_IN_VAE].expand(-1, -1, 3, 3).clone()}), "shape"),
        (lambda tensors: tensors[_IN_UNET].fill_(float("nan")), "NaN"),
        (lambda tensors: tensors.pop("model.diffusion_model.label_emb.0.0.weight"), "label_emb"),
        (lambda tensors: tensors.update({"edm_mean": torch.ones(4)}), "EDM"),
        (lambda tensors: tensors.update({"cond_stage_model.x": torch.ones(4)}), "Stable Diffusion 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tiny_file: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = _rewrite(tmp_path / "wrong.safetensors", tiny_file, change)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert "wrong.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_what_other_programs_add_is_passed_over(tiny: SDXLModel, tiny_file: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
        tensors["denoiser.sigmas"] = torch.ones(1000)
        tensors["model_ema.decay"] = torch.tensor(0.999)

    path = _rewrite(tmp_path / "other.safetensors", tiny_file, add)
    assert _digests(load_model(path)) == _digests(tiny)


@pytest.mark.parametrize(
    ("markers", "metadata", "expected"),
    [
        ((), {}, ("epsilon", False)),
        (("v_pred",), {}, ("v_prediction", False)),
        ((), {"modelspec.prediction_type": "v-zsnr"}, ("v_prediction", True)),
    ],
)
def test_a_file_says_what_it_predicts(
    tiny_file: Path, tmp_path: Path, markers: tuple[str, ...], metadata: dict[str, str], expected: tuple[str, bool]
) -> None:
    def mark(tensors: dict[str, Tensor]) -> None:
        for name in {"v_pred", "ztsnr"} - set(markers):
            del tensors[name]

    model = load_model(_rewrite(tmp_path / "said.safetensors", tiny_file, mark, **metadata), components=())
    assert (model.prediction_type, model.schedule_config.zero_terminal_snr) == expected


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "LoRA"),
        ("conditioner.embedders.0.model.ln_final.weight", "refiner"),
        ("input_blocks.0.0.weight", "no downsampling"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers folder"),
        ("something.else", "none of SDXL's networks"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_name(tmp_path: Path, key: str, kind: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.ones(1)}, path)
    with pytest.raises(ModelError, match=kind):
        load_model(path)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load_model(tmp_path)
