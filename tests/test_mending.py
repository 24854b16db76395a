"""Copies that say what they are: weights bit for bit, marks and metadata right, refusals where nothing tells."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from model_files import full_size_shapes, write_sparse
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sumizome.cli.main import main
from sumizome.errors import ConfigError, ExportError, ModelError
from sumizome.inspection import inspect_model
from sumizome.mend_decision import MendConfig
from sumizome.mending import mend_model
from sumizome.merging import add_difference, merge_weighted
from sumizome.models.sdxl import SDXLModel, load_model, model_digest

MARKS = ("v_pred", "ztsnr", "alphas_cumprod")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TOLD = MendConfig(prediction="v", zero_terminal_snr=True)


@pytest.fixture(scope="module")
def bare(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v-prediction model as trainers leave it: no marks, stale metadata."""
    path = tmp_path_factory.mktemp("bare") / "bare.safetensors"
    tensors = {name: tensor for name, tensor in load_file(tiny_file).items() if name not in MARKS}
    save_file(tensors, path, metadata={"modelspec.title": "Ink", "ss_steps": "9", "sshs_model_hash": "stale"})
    return path


def same_weights(path: Path, model: SDXLModel) -> None:
    loaded = load_model(path)
    for name, network in model.networks.items():
        assert model_digest(loaded.networks[name]) == model_digest(network), name


# --- marks and metadata ----------------------------------------------------------------------------------------------


def test_an_unmarked_file_becomes_one_that_every_program_knows(bare: Path, tiny: SDXLModel, tmp_path: Path) -> None:
    before = bare.read_bytes()
    mended = mend_model(bare, tmp_path / "m.safetensors", TOLD)
    assert bare.read_bytes() == before
    same_weights(mended.path, tiny)
    findings = inspect_model(mended.path)
    assert findings.problems == () and (findings.prediction_type, findings.zero_terminal_snr) == ("v_prediction", True)
    right = [row.program for row in findings.programs if row.right]
    assert right == ["ComfyUI", "Forge", "SwarmUI", "SD.Next", "sd.cpp"]  # A1111's sidecar is for SDXL's real size
    with safe_open(mended.path, "pt") as opened:
        metadata = opened.metadata()
        assert float(opened.get_tensor("alphas_cumprod")[-1]) == pytest.approx(4.8973451890853435e-08)
        assert opened.get_tensor("v_pred").shape == (0,)
    assert metadata["modelspec.prediction_type"] == "v-zsnr" and metadata["prediction_type"] == "v"
    assert metadata["modelspec.title"] == "Ink" and metadata["ss_steps"] == "9" and "sshs_model_hash" not in metadata
    content = mended.path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content[start:]).hexdigest()}"
    assert "adds alphas_cumprod, v_pred, ztsnr" in mended.changes


def test_the_other_answers_write_the_other_marks(bare: Path, tmp_path: Path) -> None:
    without = mend_model(bare, tmp_path / "v.safetensors", MendConfig("v", zero_terminal_snr=False))
    epsilon = mend_model(bare, tmp_path / "e.safetensors", MendConfig("epsilon", title="New"))
    no_table = mend_model(bare, tmp_path / "n.safetensors", MendConfig("v", True, noise_table=False))
    assert set(inspect_model(without.path).ignored) == {"v_pred"}
    assert inspect_model(epsilon.path).ignored == ()
    unmade = mend_model(no_table.path, tmp_path / "u.safetensors", MendConfig("epsilon"))
    assert "leaves out v_pred, ztsnr" in unmade.changes and inspect_model(unmade.path).ignored == ()
    assert inspect_model(epsilon.path).metadata["modelspec.title"] == "New"
    assert set(inspect_model(no_table.path).ignored) == {"v_pred", "ztsnr"}
    for mended in (without, epsilon):
        findings = inspect_model(mended.path)
        assert findings.problems == () and findings.zero_terminal_snr is False


def test_a_model_that_says_it_needs_no_flags_and_a_wrong_mark_is_overruled_by_one(
    tiny_file: Path, tmp_path: Path
) -> None:
    again = mend_model(tiny_file, tmp_path / "again.safetensors")
    assert inspect_model(again.path).zero_terminal_snr
    tensors = load_file(tiny_file) | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
    save_file(tensors, tmp_path / "edm.safetensors")
    with pytest.raises(ConfigError, match="EDM"):
        mend_model(tmp_path / "edm.safetensors", tmp_path / "m.safetensors")
    mended = mend_model(tmp_path / "edm.safetensors", tmp_path / "m.safetensors", TOLD)
    assert set(inspect_model(mended.path).ignored) == set(MARKS)


@pytest.mark.parametrize(
    ("marks", "metadata", "config", "words"),
    [
        ((), {}, MendConfig(), "nothing in .* says .* --prediction v or --prediction epsilon"),
        ((), {}, MendConfig("v"), "--zero-terminal-snr .* or --no-zero-terminal-snr"),
        (("v_pred",), {}, MendConfig(), "does not say .* --zero-terminal-snr"),
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, MendConfig(), "contradicts .* --prediction"),
        (("v_pred",), {"modelspec.prediction_type": "v-zsnr"}, MendConfig(), "contradicts itself .* --zero-terminal-s"),
        (("v_pred", "ztsnr"), {"ss_zero_terminal_snr": "False"}, MendConfig(), "contradicts itself .* --zero-termin"),
        ((), {"prediction_type": "epsilon"}, MendConfig(zero_terminal_snr=True), "needs v-prediction"),
        ((), {}, MendConfig("epsilon", True), "needs v-prediction"),
    ],
)
def test_what_nothing_tells_is_asked_for_in_one_line(
    bare: Path, tmp_path: Path, marks: tuple[str, ...], metadata: dict[str, str], config: MendConfig, words: str
) -> None:
    source, out = tmp_path / "s.safetensors", tmp_path / "m.safetensors"
    save_file(load_file(bare) | {mark: torch.tensor([]) for mark in marks}, source, metadata=metadata)
    with pytest.raises(ConfigError, match=words):
        mend_model(source, out, config)
    assert not out.exists()


@pytest.mark.parametrize("marks", [("v_pred",), ("v_pred", "ztsnr")])
@pytest.mark.parametrize("answer", [True, False])
def test_marks_and_metadata_that_differ_on_the_schedule_are_told_and_settled(
    bare: Path, tmp_path: Path, marks: tuple[str, ...], answer: bool
) -> None:
    """v_pred alone beside "v-zsnr" was read without pure noise, and its copy said pure noise, unasked."""
    marked = len(marks) == 2
    metadata = {"ss_zero_terminal_snr": "False"} if marked else {"modelspec.prediction_type": "v-zsnr"}
    source = tmp_path / "s.safetensors"
    save_file(load_file(bare) | {mark: torch.tensor([]) for mark in marks}, source, metadata=metadata)
    findings = inspect_model(source)
    assert findings.zero_terminal_snr == load_model(source, components=()).schedule_config.zero_terminal_snr == marked
    (problem,) = findings.problems
    assert f"metadata {next(iter(metadata))} (" in problem and "--no-zero-terminal-snr settles it" in problem
    assert ("v_pred stands without ztsnr" in problem) == (not marked)
    mended = inspect_model(mend_model(source, tmp_path / "m.safetensors", MendConfig(zero_terminal_snr=answer)).path)
    assert mended.problems == () and mended.zero_terminal_snr == answer
    assert mended.metadata["modelspec.prediction_type"] == ("v-zsnr" if answer else "v")


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_folder_and_file_become_each_other_bit_for_bit(
    bare: Path, tiny: SDXLModel, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = mend_model(bare, tmp_path / "folder", TOLD).path
    same_weights(folder, tiny)
    marked = mend_model(tiny_folder, tmp_path / "marked.safetensors").path
    again = mend_model(marked, tmp_path / "again")
    assert again.changes == ("says v_prediction, zero terminal SNR",)  # its scheduler says what the marks said
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    assert model_digest(pipeline.unet) == model_digest(tiny.unet)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert inspect_model(folder).problems == ()
    same_weights(mend_model(folder, tmp_path / "back.safetensors").path, tiny)
    same_weights(mend_model(tiny_folder, tmp_path / "third.safetensors").path, tiny)
    written = {path.relative_to(tiny_folder) for path in tiny_folder.rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == written


def test_a_folder_with_a_poor_scheduler_gets_a_good_one(tiny_folder: Path, tmp_path: Path) -> None:
    poor = shutil.copytree(tiny_folder, tmp_path / "poor")
    config = poor / "scheduler/scheduler_config.json"
    found = json.loads(config.read_text())
    del found["trained_betas"]
    config.write_text(json.dumps(found | {"timestep_spacing": "leading"}))
    assert inspect_model(poor).problems
    mended = mend_model(poor, tmp_path / "good").path
    found = json.loads((mended / "scheduler/scheduler_config.json").read_text())
    assert len(found["trained_betas"]) == 1000 and found["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_unet_alone_is_written_without_prefix_beside_its_marks(bare: Path, tmp_path: Path, prefixed: bool) -> None:
    tensors = {
        name if prefixed else name.removeprefix(UNET): tensor
        for name, tensor in load_file(bare).items()
        if name.startswith(UNET)
    }
    save_file(tensors, tmp_path / "u.safetensors")
    mended = mend_model(tmp_path / "u.safetensors", tmp_path / "m.safetensors", TOLD)
    found = load_file(mended.path)
    assert set(found) == {name.removeprefix(UNET) for name in tensors} | set(MARKS)
    assert inspect_model(mended.path).programs[0].right
    with pytest.raises(ModelError, match="U-Net alone"):
        mend_model(tmp_path / "u.safetensors", tmp_path / "folder", TOLD)


def test_short_names_of_the_first_encoder_become_the_layouts_own(bare: Path, tiny: SDXLModel, tmp_path: Path) -> None:
    prefix = "conditioner.embedders.0.transformer."
    before = load_file(bare)
    short = {name.replace(f"{prefix}text_model.", prefix): tensor for name, tensor in before.items()}
    save_file(short, tmp_path / "s.safetensors")
    for out in (
        mend_model(tmp_path / "s.safetensors", tmp_path / "m.safetensors", TOLD).path,
        merge_weighted([tmp_path / "s.safetensors"] * 2, [1.0, 1.0], tmp_path / "n.safetensors", TOLD).mended.path,
    ):
        assert set(load_file(out)) == set(before) | set(MARKS) and inspect_model(out).problems == ()
        same_weights(out, tiny)


# --- dtypes and VAEs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_weights_are_cast_as_torch_casts_them(bare: Path, tmp_path: Path, dtype: Any, torch_dtype: torch.dtype) -> None:
    mended = mend_model(bare, tmp_path / "m.safetensors", MendConfig("v", True, dtype=dtype))
    before, after = load_file(bare), load_file(mended.path)
    assert set(after) == set(before) | set(MARKS)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(torch_dtype)), name
    assert inspect_model(mended.path).metadata["modelspec.unet_dtype"] == dtype
    kept = mend_model(mended.path, tmp_path / "kept.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in load_file(kept.path).items())


def test_mixed_dtypes_stay_and_every_tensor_is_aligned(bare: Path, tmp_path: Path) -> None:
    mixed = {name: tensor if name.startswith(VAE) else tensor.half() for name, tensor in load_file(bare).items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    mended = mend_model(tmp_path / "mixed.safetensors", tmp_path / "m.safetensors", TOLD)
    findings = inspect_model(mended.path)
    assert findings.metadata["modelspec.unet_dtype"] == "fp16" and findings.metadata["modelspec.vae_dtype"] == "fp32"
    header = findings.headers[0]
    for entry in header.tensors.values():
        assert (header.data_start + entry.start) % {"F32": 4, "F16": 2}[entry.dtype] == 0
    assert all(torch.equal(tensor, mixed[name]) for name, tensor in load_file(mended.path).items() if name in mixed)


@pytest.mark.parametrize("layout", ["m.safetensors", "folder"])
@pytest.mark.parametrize(("value", "words"), [(70000.0, "overflows fp16"), (float("nan"), "NaN")])
def test_a_weight_that_cannot_be_written_leaves_nothing(
    bare: Path, tmp_path: Path, layout: str, value: float, words: str
) -> None:
    tensors = load_file(bare)
    tensors[f"{UNET}out.2.bias"][0] = value
    save_file(tensors, tmp_path / "s.safetensors")
    with pytest.raises(ExportError, match=words):
        mend_model(tmp_path / "s.safetensors", tmp_path / layout, MendConfig("v", True, dtype="fp16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.safetensors"]


@pytest.mark.parametrize("kind", ["model", "folder", "vae folder", "vae", "prefixed vae", "native vae"])
def test_a_vae_is_baked_from_wherever_it_stands(
    bare: Path, tiny_file: Path, tiny_folder: Path, tiny: SDXLModel, tmp_path: Path, kind: str
) -> None:
    source = tmp_path / "without.safetensors"
    save_file({name: tensor for name, tensor in load_file(bare).items() if not name.startswith(VAE)}, source)
    own = {name: tensor for name, tensor in load_file(tiny_file).items() if name.startswith(VAE)}
    vae = tmp_path / "vae.safetensors"
    if kind == "vae":
        save_file({name.removeprefix(VAE): tensor for name, tensor in own.items()}, vae)
    elif kind == "prefixed vae":
        save_file(own, vae)
    elif kind == "native vae":
        shutil.copyfile(tiny_folder / "vae/diffusion_pytorch_model.safetensors", vae)
    vae = {"model": tiny_file, "folder": tiny_folder, "vae folder": tiny_folder / "vae"}.get(kind, vae)
    with pytest.raises(ModelError, match="--vae"):
        mend_model(source, tmp_path / "m.safetensors", TOLD)
    mended = mend_model(source, tmp_path / "m.safetensors", MendConfig("v", True, vae=vae))
    same_weights(mended.path, tiny)


def test_what_holds_no_vae_says_so(bare: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    for vae in (tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(ModelError, match="holds no"):
            mend_model(bare, tmp_path / "m.safetensors", MendConfig("v", True, vae=vae))


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_never_in_place_and_never_over_something_unasked(tiny_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "s.safetensors"
    shutil.copyfile(tiny_file, source)
    (tmp_path / "link.safetensors").symlink_to(source)
    for place in (source, tmp_path / "link.safetensors"):
        with pytest.raises(ExportError, match="the source itself"):
            mend_model(source, place, overwrite=True)
    with pytest.raises(ExportError, match="inside the source"):
        mend_model(tiny_folder, tiny_folder / "mended")
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    with pytest.raises(ExportError, match="exists"):
        mend_model(source, tmp_path / "taken.safetensors")
    assert (tmp_path / "taken.safetensors").read_bytes() == b"precious"
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ExportError, match="holds no diffusers model"):
        mend_model(source, tmp_path / "pictures", overwrite=True)
    with pytest.raises(ExportError, match="must end in"):
        mend_model(source, tmp_path / "m.ckpt")
    assert inspect_model(mend_model(source, tmp_path / "taken.safetensors", overwrite=True).path).problems == ()


def test_a_folder_that_holds_the_source_is_not_replaced(tiny_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """A clone from the hub holds the single file beside the folder's parts: --overwrite took the source with it."""
    clone = tmp_path / "clone"
    shutil.copytree(tiny_folder, clone)
    source = clone / "model.safetensors"
    shutil.copyfile(tiny_file, source)
    with pytest.raises(ExportError, match="lies inside"):
        mend_model(source, clone, overwrite=True)
    with pytest.raises(ExportError, match="lies inside"):
        mend_model(tiny_file, clone, MendConfig(vae=clone / "vae"), overwrite=True)
    with pytest.raises(ExportError, match="the source itself"):
        mend_model(tiny_file, source, MendConfig(vae=source), overwrite=True)
    assert source.read_bytes() == tiny_file.read_bytes()


def test_a_link_to_a_folder_is_replaced_and_leaves_nothing_beside_it(
    tiny_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    shutil.copytree(tiny_folder, elsewhere)
    link.symlink_to(elsewhere)
    mend_model(tiny_file, link, MendConfig(verify_step=False), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]
    assert (elsewhere / "model_index.json").exists() and not link.is_symlink()


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", "weight.absmax"])
def test_scaled_weights_are_refused_because_a_copy_would_lose_the_scales(
    bare: Path, tmp_path: Path, scale: str
) -> None:
    """ComfyUI's scaled fp8: each weight is to be multiplied by a tensor beside it, which no copy of ours has."""
    tensors = load_file(bare)
    name = f"{UNET}time_embed.0.weight"
    largest = tensors[name].abs().max() / 448
    tensors[name] = (tensors[name] / largest).to(torch.float8_e4m3fn)
    tensors[name.replace("weight", scale)] = largest
    save_file(tensors, tmp_path / "scaled.safetensors")
    assert "quantised weights" in " ".join(inspect_model(tmp_path / "scaled.safetensors").problems)
    for config in (TOLD, MendConfig("v", True, dtype="fp16")):
        with pytest.raises(ModelError, match=r"quantised weights .* scales"):
            mend_model(tmp_path / "scaled.safetensors", tmp_path / "m.safetensors", config)
    assert not (tmp_path / "m.safetensors").exists()


def test_a_unet_with_a_vae_beside_it_keeps_its_prefix_and_loads(bare: Path, tmp_path: Path) -> None:
    """Without the prefix the VAE's tensors were taken for the U-Net's, and the copy did not load."""
    source = tmp_path / "s.safetensors"
    save_file({name: t for name, t in load_file(bare).items() if not name.startswith("conditioner.")}, source)
    mended = mend_model(source, tmp_path / "m.safetensors", TOLD)
    before, after = (load_model(path, components=("unet", "vae")) for path in (source, mended.path))
    for name, network in before.networks.items():
        assert model_digest(after.networks[name]) == model_digest(network)
    assert inspect_model(mended.path).zero_terminal_snr


@pytest.mark.parametrize("stated", [True, False, None])
def test_a_folders_copy_draws_in_diffusers_as_it_did_without_a_negative_prompt(
    tiny_folder: Path, tmp_path: Path, stated: bool | None
) -> None:
    """SDXL's own folder says zeros, which its U-Net was trained with; the copy said the encoded empty prompt."""
    source = tmp_path / "source"
    shutil.copytree(tiny_folder, source)
    index = json.loads((source / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    if stated is not None:
        index["force_zeros_for_empty_prompt"] = stated
    (source / "model_index.json").write_text(json.dumps(index))
    copy = mend_model(source, tmp_path / "copy", MendConfig(verify_step=False)).path
    found = [StableDiffusionXLPipeline.from_pretrained(path, local_files_only=True) for path in (source, copy)]
    assert len({pipeline.config["force_zeros_for_empty_prompt"] for pipeline in found}) == 1


@pytest.fixture
def scaled_latents(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder whose U-Net knows latents with statistics of their own, stated beside its VAE."""
    folder = tmp_path / "own-latents"
    shutil.copytree(tiny_folder, folder)
    place = folder / "vae" / "config.json"
    stated = {"scaling_factor": 1.0, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [5.0, 6.0, 7.0, 8.0]}
    place.write_text(json.dumps(json.loads(place.read_text()) | stated))
    return folder


def test_a_vae_that_scales_latents_otherwise_is_not_put_in(
    scaled_latents: Path, tiny_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """The U-Net's latents would be decoded with another mean and deviation: pale or burnt pictures, and no word."""
    for source, vae in ((scaled_latents, tiny_file), (tiny_file, scaled_latents), (tiny_folder, scaled_latents)):
        with pytest.raises(ModelError, match="scales latents otherwise"):
            mend_model(source, tmp_path / "out", MendConfig(vae=vae, verify_step=False))
    assert not (tmp_path / "out").exists()
    copy = mend_model(scaled_latents, tmp_path / "out", MendConfig(vae=scaled_latents / "vae", verify_step=False))
    assert load_model(copy.path).vae.config["latents_mean"] == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ConfigError, match="scale latents differently"):
        merge_weighted([scaled_latents, tiny_folder], [0.5, 0.5], tmp_path / "merged")
    with pytest.raises(ConfigError, match="scale latents differently"):
        add_difference(tiny_folder, tiny_folder, scaled_latents, tmp_path / "added")


@pytest.mark.parametrize(
    "stated",
    [
        {"scaling_factor": None},
        {"scaling_factor": "x"},
        {"latents_mean": ["a"]},
        {"scaling_factor": 10**400},
        {"scaling_factor": 0},
        {"scaling_factor": -1.0},
        {"scaling_factor": float("nan")},
        {"scaling_factor": float("inf")},
        {"latents_mean": [0.0, 0.0, 0.0, float("nan")]},
        {"latents_mean": [0, 0, 0, -(10**400)]},
        {"latents_std": [1.0, 1.0, 0.0, 1.0]},
        {"latents_std": [1.0, 1.0, 1.0, float("inf")]},
    ],
)
def test_a_scale_that_is_no_number_is_named(
    stated: dict[str, object],
    scaled_latents: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Zero ended in a ZeroDivisionError, four hundred digits in an OverflowError, NaN as damaged tensors."""
    place = scaled_latents / "vae" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | stated))
    for command in (
        lambda: mend_model(tiny_folder, tmp_path / "out", MendConfig(vae=scaled_latents / "vae", verify_step=False)),
        lambda: merge_weighted([scaled_latents, tiny_folder], [0.5, 0.5], tmp_path / "merged"),
    ):
        with pytest.raises(ModelError, match="is not made of numbers"):
            command()
    assert main(["export", str(scaled_latents), "--file", str(tmp_path / "m.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "is not made of numbers" in error and error.count("\n") == 1


def test_an_incomplete_or_another_model_is_refused(bare: Path, tmp_path: Path) -> None:
    tensors = load_file(bare)
    del tensors[f"{UNET}out.2.bias"]
    save_file(tensors, tmp_path / "s.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*out\.2\.bias"):
        mend_model(tmp_path / "s.safetensors", tmp_path / "m.safetensors", TOLD)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2)}, tmp_path / "l.safetensors")
    with pytest.raises(ModelError, match="LoRA"):
        mend_model(tmp_path / "l.safetensors", tmp_path / "m.safetensors", TOLD)


def test_a_flipped_bit_on_disk_is_found_and_what_stood_there_stays(
    tiny_file: Path, tmp_path: Path, break_disk: Callable[[], None]
) -> None:
    out = mend_model(tiny_file, tmp_path / "m.safetensors").path
    before = out.read_bytes()
    break_disk()
    with pytest.raises(ExportError, match="bit for bit"):
        mend_model(tiny_file, out, overwrite=True)
    assert out.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_command_says_what_it_did(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.safetensors"
    flags = ["--prediction", "v", "--zero-terminal-snr", "--dtype", "bf16"]
    assert main(["mend", str(bare), "--out", str(out), *flags]) == 0
    text = capsys.readouterr().out
    assert "adds alphas_cumprod, v_pred, ztsnr" in text and "read back bit for bit" in text and " MB, " in text
    assert main(["mend", str(bare), "--out", str(tmp_path / "n.safetensors"), *flags, "--no-zero-terminal-snr"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main(["mend", str(bare), "--out", str(tmp_path / "n.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "--prediction v or --prediction epsilon" in error and error.count("\n") == 1


# --- at SDXL's real size ---------------------------------------------------------------------------------------------

_MEND_AND_MEASURE = """
import sys, threading, time
from pathlib import Path
from sumizome.mend_decision import MendConfig
from sumizome.mending import mend_model
most, running = 0, True
def watch():
    global most
    while running:
        kilobytes = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')][0]
        most = max(most, kilobytes)
        time.sleep(0.02)
from sumizome.inspection import inspect_model
base = [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')][0]
thread = threading.Thread(target=watch); thread.start()
mended = mend_model(Path(sys.argv[1]), Path(sys.argv[2]), MendConfig('v', True, dtype='bf16'))
running = False; thread.join()
print(most - base, mended.sidecar)
"""


@pytest.mark.slow
def test_a_full_size_file_is_mended_in_little_memory(tmp_path: Path) -> None:
    """7 GB in, 7 GB out. The bound is on memory that is not the mapped file itself: a few tensors, 1.2 GB at most."""
    source = write_sparse(tmp_path / "s.safetensors", full_size_shapes())
    out = tmp_path / "m.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", _MEND_AND_MEASURE, str(source), str(out)], capture_output=True, text=True, check=True
    )
    kilobytes, sidecar = done.stdout.split()
    print(f"peak beside the mapped file: {int(kilobytes) / 1e6:.2f} GB")
    assert int(kilobytes) < 1_200_000 and Path(sidecar).is_file()
    findings = inspect_model(out)
    assert findings.problems == () and findings.dtypes["BF16"] == 3_468_837_867
    assert [row.program for row in findings.programs if row.prediction_type != "v_prediction"] == [
        "diffusers", "InvokeAI"
    ]  # fmt: skip
