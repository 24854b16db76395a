"""A decoder on its way into a model: verdicts, what differs, what does not, refusals; and the commands end to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from sumizome.cli.main import main
from sumizome.errors import ExportError
from sumizome.mend_decision import MendConfig
from sumizome.models.sdxl import load_model
from sumizome.models.vae import latent_statistics, model_digest
from sumizome.models.vae_file import load_vae
from sumizome.settings import to_toml
from sumizome.vae.bake import bake_model, bake_vae
from sumizome.vae.config import VaeTrainConfig
from sumizome.vae.safety import (
    TILE_TOLERANCE,
    TileReport,
    activation_maxima,
    half_verdict,
    tile_difference,
    tile_verdict,
)


@pytest.fixture
def finetuned(tiny_folder: Path) -> AutoencoderKL:
    """The tiny VAE with a decoder that differs a little."""
    vae = load_vae(tiny_folder)
    with torch.no_grad():
        for parameter in (*vae.decoder.parameters(), *vae.post_quant_conv.parameters()):
            parameter.mul_(1.01)
    return vae


@pytest.mark.parametrize(("source", "target"), [("tiny_folder", "model.safetensors"), ("tiny_file", "folder")])
def test_only_the_decoder_of_the_copy_differs(
    finetuned: AutoencoderKL, tmp_path: Path, source: str, target: str, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(source)
    mended = bake_model(finetuned, base, tmp_path / target, MendConfig(verify_step=False))
    before, after = load_model(base), load_model(mended.path)
    for name, network in before.networks.items():
        if name != "vae":
            assert model_digest(network) == model_digest(after.networks[name])
    assert model_digest(after.vae) == model_digest(finetuned)
    assert model_digest(after.vae.encoder) == model_digest(before.vae.encoder)
    assert any("the encoder" in change or "whose encoder stays" in change for change in mended.changes)


def test_a_models_own_scale_of_latents_stays(finetuned: AutoencoderKL, tiny_folder: Path, tmp_path: Path) -> None:
    """A U-Net trained on statistics of its own keeps them: the run's VAE, which has SDXL's factor, is not asked."""
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    place = model / "vae" / "config.json"
    stated = {"scaling_factor": 1.0, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [5.0, 6.0, 7.0, 8.0]}
    place.write_text(json.dumps(json.loads(place.read_text()) | stated))
    baked = bake_model(finetuned, model, tmp_path / "out", MendConfig(verify_step=False))
    assert latent_statistics(load_vae(baked.path)) == latent_statistics(load_vae(model))
    assert latent_statistics(finetuned) == latent_statistics(load_vae(tiny_folder))


@pytest.mark.parametrize("target", ["vae.safetensors", "vae"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_vae_alone_reads_back_and_diffusers_opens_it(
    finetuned: AutoencoderKL, tiny_folder: Path, tmp_path: Path, target: str, dtype: str
) -> None:
    out = bake_vae(finetuned, tiny_folder, tmp_path / target, dtype=dtype)
    back = load_vae(out)
    atol = 0 if dtype == "fp32" else 2e-3
    for name, tensor in finetuned.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, atol=atol, rtol=atol)
    if out.is_dir():
        theirs = AutoencoderKL.from_pretrained(out)
        assert model_digest(theirs.float()) == model_digest(back)
    with pytest.raises(ExportError, match="give --overwrite"):
        bake_vae(finetuned, tiny_folder, out)


def test_a_vae_replaces_neither_the_models_own_nor_another_folder(
    finetuned: AutoencoderKL, tiny_folder: Path, tmp_path: Path
) -> None:
    """The run goes on from the model's own VAE; and many folders have a config.json that hold no VAE."""
    model, project = tmp_path / "model", tmp_path / "project"
    shutil.copytree(tiny_folder, model)
    project.mkdir()
    for name in ("config.json", "diary.txt"):
        (project / name).write_text("{}")
    before = model_digest(load_vae(model))
    with pytest.raises(ExportError, match="inside the source"):
        bake_vae(finetuned, model, model / "vae", overwrite=True)
    with pytest.raises(ExportError, match="holds no diffusers VAE"):
        bake_vae(finetuned, model, project, overwrite=True)
    assert model_digest(load_vae(model)) == before and (project / "diary.txt").exists()
    out = bake_vae(finetuned, model, tmp_path / "vae")
    assert bake_vae(finetuned, model, out, overwrite=True) == out


def test_a_model_with_another_encoder_is_refused(finetuned: AutoencoderKL, tiny_folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        finetuned.encoder.conv_in.bias[0] += 1
    with pytest.raises(ExportError, match="another encoder"):
        bake_model(finetuned, tiny_folder, tmp_path / "out", MendConfig())
    assert not (tmp_path / "out").exists()


def picture(side: int = 96) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


def test_maxima_are_those_of_a_forward_pass_and_the_verdict_follows(finetuned: AutoencoderKL) -> None:
    report = activation_maxima(finetuned, [picture(32)])
    safe, told = half_verdict(report)
    assert safe and "safe in float16" in told and report.largest == max(report.by_layer.values())
    assert half_verdict(replace(report, largest=30_000.0))[0] is False
    assert "near the limit" in half_verdict(replace(report, largest=30_000.0))[1]
    # A layer that gives out 70 000 is found, by name, and is what float16 cannot hold.
    with torch.no_grad():
        block = finetuned.decoder.up_blocks[1].resnets[0].conv2
        block.bias[0] = 70_000.0
    report = activation_maxima(finetuned, [picture(32)])
    safe, told = half_verdict(report)
    assert not safe and told.startswith("not safe in float16")
    assert report.by_layer["decoder.up_blocks.1.resnets.0.conv2"] == pytest.approx(70_000, rel=0.01)
    assert torch.tensor(report.largest).half().isinf()


def test_tiles_agree_with_the_whole_where_nothing_looks_far(finetuned: AutoencoderKL) -> None:
    whole = tile_difference(finetuned, [picture(64)], 64)
    assert whole.psnr == 100 and whole.largest == 0  # it fits into a tile
    cut = tile_difference(finetuned, [picture(96)], 64)
    assert 20 < cut.psnr < 60
    assert tile_verdict(cut, cut)[0]
    worse = TileReport(cut.tile, cut.psnr - TILE_TOLERANCE - 0.1, cut.largest)
    assert not tile_verdict(cut, worse)[0] and "seams" in tile_verdict(cut, worse)[1]


def test_the_three_commands_in_a_row(
    config: VaeTrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "decoder.toml"
    settings.write_text(to_toml(replace(config, steps=2, micro_batches_per_step=1)))
    assert main(["vae", "train", str(settings)]) == 0
    told = capsys.readouterr().out
    assert "3 pictures held out" in told and "the encoder is unchanged" in told
    page = tmp_path / "page.html"
    assert main(["vae", "evaluate", "--model", str(config.run_dir), "--out", str(page), "--device", "cpu"]) == 0
    facts = json.loads(page.with_suffix(".json").read_text())
    assert [row["name"] for row in facts["rows"]] == ["tiny, untouched", "run, step 2", "JPEG 75", "JPEG 90"]
    assert facts["pictures"] == 3
    assert set(facts["rows"][1]["better"]) == set(facts["measures"])
    html = page.read_text()
    assert "data:image/webp" in html and "<script" not in html and "lpips-weights" in html
    out = tmp_path / "baked.safetensors"
    command = ["vae", "bake", str(config.run_dir), "--out", str(out), "--device", "cpu", "--pictures", "1"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "safe in float16" in told and "tiles of 64 px agree" in told and "read back bit for bit" in told
    safety = json.loads((config.run_dir / "safety.json").read_text())
    assert safety["half"]["limit"] == 65504 and safety["step"] == 2
    (config.run_dir / "safety.json").unlink()
    assert main(command) == 2  # it exists, which is said before pictures are decoded
    assert "give --overwrite" in capsys.readouterr().err and not (config.run_dir / "safety.json").exists()
    for wrong in (["--pictures", "0"], ["--pictures", "-1"], ["--side", "10"]):
        assert main([*command, "--overwrite", *wrong]) == 2
        assert "--pictures must be" in capsys.readouterr().err


def test_pictures_that_a_run_was_trained_on_are_not_measured_as_held_out(
    config: VaeTrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run held one picture out of sixty; one in twenty are three, and two of them it had learned."""
    config = replace(config, steps=1, micro_batches_per_step=1)
    page = tmp_path / "page.html"
    for held_out in (1, 0):
        run = replace(
            config,
            run_dir=tmp_path / f"run-{held_out}",
            validation=replace(config.validation, count=held_out, shown=1),
        )
        (tmp_path / "decoder.toml").write_text(to_toml(run))
        assert main(["vae", "train", str(tmp_path / "decoder.toml")]) == 0
    command = ["vae", "evaluate", "--out", str(page), "--device", "cpu", "--count", "500", "--model"]
    assert main([*command, str(tmp_path / "run-1")]) == 0
    text = page.with_suffix(".json").read_text()
    assert json.loads(text)["pictures"] == 1 and "NaN" not in text
    assert main([*command, str(tmp_path / "run-0")]) == 2
    assert "held no picture out" in capsys.readouterr().err


def test_a_model_that_was_moved_can_be_given(
    config: VaeTrainConfig, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    settings = tmp_path / "decoder.toml"
    settings.write_text(to_toml(replace(config, model=base, steps=1, micro_batches_per_step=1)))
    assert main(["vae", "train", str(settings)]) == 0
    base.rename(tmp_path / "moved")
    command = ["vae", "bake", str(config.run_dir), "--vae-only", "--out", str(tmp_path / "v.safetensors")]
    assert main([*command, "--device", "cpu", "--pictures", "1"]) == 2
    assert "base" in capsys.readouterr().err
    assert main([*command, "--device", "cpu", "--pictures", "1", "--model", str(tmp_path / "moved")]) == 0
