"""Inpainting models, whose U-Net takes nine channels: described, mended and proved like any other; not trained."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sumizome import export_check, export_metadata
from sumizome.cli.main import main
from sumizome.errors import ExportError, ModelError
from sumizome.export_check import step_source
from sumizome.inspection import inspect_model
from sumizome.mend_decision import MendConfig
from sumizome.mending import mend_model
from sumizome.models.one_step import step_difference
from sumizome.models.sdxl import load_model

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def inpainting(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = load_file(tiny_file)
    mask = torch.randn(32, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    tensors[FIRST] = torch.cat([tensors[FIRST], 0.1 * mask], dim=1)
    path = tmp_path_factory.mktemp("inpainting") / "inpainting.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(inpainting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mend_model(inpainting, tmp_path_factory.mktemp("mended") / "folder").path


def test_it_is_recognised_in_both_layouts(inpainting: Path, folder: Path) -> None:
    assert "for inpainting" in inspect_model(inpainting).kind
    assert "Inpaint" in inspect_model(folder).kind
    for path in (inpainting, folder):
        assert inspect_model(path).problems == ()


def test_the_folder_is_an_inpainting_pipelines(inpainting: Path, folder: Path) -> None:
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLInpaintPipeline"
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
    assert torch.equal(unet.conv_in.weight, load_file(inpainting)[FIRST])


def test_no_sidecar_that_does_not_fit_is_written_or_promised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_metadata, "_is_full_size", lambda model: True)
    mended = mend_model(folder, tmp_path / "m.safetensors", MendConfig(verify_step=False))
    assert mended.sidecar is None and [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    row = next(row for row in inspect_model(mended.path).programs if row.program == "A1111 1.10.1")
    assert row.action.startswith("nothing helps")


def test_the_denoising_step_sees_every_channel(inpainting: Path, folder: Path, tmp_path: Path) -> None:
    mended = mend_model(folder, tmp_path / "m.safetensors").path
    assert step_difference(step_source(inpainting), step_source(mended)) == 0
    tensors = load_file(inpainting)
    tensors[FIRST][:, 4:] *= -1  # the mask's channels alone
    save_file(tensors, tmp_path / "other.safetensors")
    assert step_difference(step_source(inpainting), step_source(tmp_path / "other.safetensors")) > 1e-3


def test_a_copy_that_denoises_otherwise_is_not_kept(
    inpainting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_check, "step_difference", lambda source, copy: 0.5)
    with pytest.raises(ExportError, match="one denoising step"):
        mend_model(inpainting, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert mend_model(inpainting, tmp_path / "m.safetensors", MendConfig(verify_step=False)).bytes > 0


def test_training_and_drawing_refuse_it_in_one_line(
    inpainting: Path, folder: Path, tiny_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (inpainting, folder):
        with pytest.raises(ModelError, match="inpainting"):
            load_model(path, components=("unet",))
        assert list(load_model(path, components=("vae",)).networks) == ["vae"]
    for command in (
        ["train", "--model", str(inpainting), "--latents", str(tiny_latents), "--run-dir", str(tmp_path / "run")],
        ["sample", "--model", str(folder), "--prompt", "p", "--out", str(tmp_path / "out")],
        ["export", str(inpainting), "--file", str(tmp_path / "e.safetensors")],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "is an inpainting model" in error and "9 channels" in error and error.count("\n") == 1
