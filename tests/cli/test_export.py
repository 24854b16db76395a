"""`sumizome export` of a run: what its files say of the training, the U-Net alone, statistics of the run's own."""

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from short_runs import short_run

from sumizome.cli.main import main
from sumizome.data.latent_statistics import LatentStatisticsConfig
from sumizome.data.latents import open_latents
from sumizome.export import write_single_file
from sumizome.models.sdxl import SDXLModel, load_model, model_digest
from sumizome.models.vae import decode_latents, encode_pixels, latent_statistics, normalise
from sumizome.train.build import build_trainer
from sumizome.train.config import CheckpointConfig, PreviewConfig, ValidationConfig
from sumizome.train.run_dir import hold_run_dir, load_trained_model

MEAN, STD = (4.8119, 0.1607, 1.3538, -1.7753), (9.9181, 6.2753, 7.5978, 5.9956)


@pytest.fixture(scope="module")
def run_dir(tiny_folder: Path, tiny_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on latents with the statistics of the report's appendix B."""
    config = short_run(
        tiny_folder,
        tiny_latents,
        tmp_path_factory.mktemp("secret-place") / "ink",
        steps=2,
        latent_statistics=LatentStatisticsConfig(preset="novelai_v3"),
        validation=ValidationConfig(every=2, count=2, timesteps=(999,)),
        preview=PreviewConfig(every=2, prompts=("a",), canvas=(32, 32), sampling_steps=2),
        checkpoint=CheckpointConfig(every=2),
    )
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        batch = trainer.loader.step(0)[0]
        cache = open_latents(tiny_latents)
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        ids = cache.index.ids(np.arange(len(cache)))
        for latent, name in zip(batch.latents, batch.sample_ids, strict=True):
            raw = cache.read(np.array([ids.index(name)]))[0]
            torch.testing.assert_close(latent, (raw - mean) / std)
        assert latent_statistics(trainer.task.model.vae).mean == MEAN
        for _ in trainer.steps():
            pass
    return config.run_dir


@pytest.fixture(scope="module")
def written(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("out")
    assert main(["export", str(run_dir), "--folder", str(out / "folder"), "--file", str(out / "m.safetensors"),
                 "--dtype", "fp32", "--author", "me"]) == 0  # fmt: skip
    yield out


def test_the_file_says_how_it_was_trained_and_no_path(written: Path, run_dir: Path, tiny_folder: Path) -> None:
    with safe_open(written / "m.safetensors", "pt") as opened:
        metadata = opened.metadata()
    told = json.loads(metadata["sumizome.training"])
    assert (told["steps"], told["samples_seen"], told["weights"]) == (2, 8, "ema")
    assert told["schedule"]["zero_terminal_snr"] and told["loss"]["gamma"] == 5.0
    assert told["loss_at_end"] > 0 and set(told["validation_loss_at_end"]) == {"999"}
    assert len(told["latents_fingerprint"]) == 64 and told["images"] == 40
    assert told["latent_statistics"] == {"preset": "novelai_v3"}
    assert metadata["ss_steps"] == "2" and metadata["ss_zero_terminal_snr"] == "True"
    assert metadata["ss_base_model_version"].startswith("sdxl_") and metadata["ss_num_train_images"] == "40"
    assert metadata["modelspec.resolution"] == told["resolution"] == "32x32" and metadata["modelspec.author"] == "me"
    assert not any(key.startswith("ss_network") for key in metadata)  # or readers would take it for a LoRA
    text = json.dumps(metadata)
    for place in (run_dir.parent, tiny_folder.parent):
        assert str(place) not in text and place.name not in text


@torch.no_grad()
def test_both_exports_fold_the_statistics_and_draw_what_the_run_draws(written: Path, run_dir: Path) -> None:
    trained, _ = load_trained_model(run_dir)
    assert latent_statistics(trained.vae).mean == MEAN
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for path in (written / "folder", written / "m.safetensors"):
        model = load_model(path)
        assert latent_statistics(model.vae).mean == (0.0,) * 4
        torch.testing.assert_close(decode_latents(model.vae, latents), decode_latents(trained.vae, latents),
                                   atol=2e-6, rtol=0)  # fmt: skip


def test_a_folder_may_state_them_instead_and_keeps_the_vae(
    run_dir: Path, tiny: SDXLModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run_dir), "--folder", str(tmp_path / "f"), "--latents", "config", "--dtype", "fp32"]
    assert main(command) == 0
    vae = load_model(tmp_path / "f", components=("vae",)).vae
    assert model_digest(vae) == model_digest(tiny.vae) and latent_statistics(vae).std == STD
    assert main(["export", str(tmp_path / "f"), "--unet", str(tmp_path / "u.safetensors")]) == 2
    assert "statistics of their own" in capsys.readouterr().err and not (tmp_path / "u.safetensors").exists()


def test_a_unet_alone_is_refused_where_its_latents_need_the_vae(
    run_dir: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run_dir), "--unet", str(tmp_path / "u.safetensors")]) == 2
    assert "statistics of their own" in capsys.readouterr().err
    command = ["export", str(tiny_file), "--unet", str(tmp_path / "u.safetensors"), "--dtype", "bf16"]
    assert main(command) == 0
    assert "one denoising step compared" in capsys.readouterr().out
    with safe_open(tmp_path / "u.safetensors", "pt") as opened:
        names = set(opened.keys())
        assert {
            "v_pred",
            "ztsnr",
            "input_blocks.0.0.weight",
        } <= names and "modelspec.vae_dtype" not in opened.metadata()
    again = load_model(tmp_path / "u.safetensors", components=("unet",))
    source = load_model(tiny_file, components=("unet",), dtype=torch.bfloat16)
    for name, tensor in source.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], tensor.float()), name


# --- folding, by diffusers' own conventions --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_folded_is_exact_to_a_millionth_both_ways(tiny: SDXLModel, tmp_path: Path, dtype: torch.dtype) -> None:
    """Encoding and decoding as a program does that knows 0.13025 alone, against (z − mean)/std and back."""
    model = replace(tiny, networks={**tiny.networks, "vae": copy.deepcopy(tiny.vae)})
    model.vae.register_to_config(scaling_factor=1.0, latents_mean=list(MEAN), latents_std=list(STD))
    folded = load_model(write_single_file(model, tmp_path / "m.safetensors"), components=("vae",)).vae.to(dtype)
    plain = copy.deepcopy(tiny.vae).to(dtype)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3), dtype=dtype) * 2 - 1
    mean, std = (torch.tensor(numbers, dtype=dtype)[None, :, None, None] for numbers in (MEAN, STD))

    expected, found = plain.encode(pixels).latent_dist, folded.encode(pixels).latent_dist
    normalised = (expected.mean - mean) / std
    assert (found.mean * 0.13025 - normalised).abs().max() < 1e-6 * normalised.abs().max().clamp(min=1)
    assert (found.std * 0.13025 / (expected.std / std) - 1).abs().max() < 1e-5
    pictures = plain.decode(normalised * std + mean).sample
    again = folded.decode(normalised / 0.13025).sample
    assert (again - pictures).abs().max() < 1e-6 * pictures.abs().max().clamp(min=1)


def test_our_own_path_normalises_as_the_folded_file_does(tiny: SDXLModel, tmp_path: Path) -> None:
    model = replace(tiny, networks={**tiny.networks, "vae": copy.deepcopy(tiny.vae)})
    model.vae.register_to_config(scaling_factor=1.0, latents_mean=list(MEAN), latents_std=list(STD))
    folded = load_model(write_single_file(model, tmp_path / "m.safetensors"), components=("vae",)).vae
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    expected = normalise(encode_pixels(model.vae, pixels), latent_statistics(model.vae))
    found = normalise(encode_pixels(folded, pixels), latent_statistics(folded))
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max().clamp(min=1)


def test_the_source_is_never_replaced_even_when_asked_to_overwrite(
    tiny_file: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export is float16 unless told otherwise: written over its float32 source, it took the only copy."""
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder, folder)
    inside = Path(shutil.copyfile(tiny_file, folder / "m.safetensors"))
    (tmp_path / "link").symlink_to(folder)
    for model, target in ((folder, folder), (folder, tmp_path / "link"), (inside, folder)):
        assert main(["export", str(model), "--folder", str(target), "--overwrite"]) == 2
        assert "the source itself" in (told := capsys.readouterr().err) or "lies inside" in told
    for flag in ("--file", "--unet"):
        assert main(["export", str(inside), flag, str(inside), "--overwrite"]) == 2
    twice = ["--file", str(tmp_path / "m.safetensors"), "--unet", str(folder / ".." / "m.safetensors"), "--overwrite"]
    assert main(["export", str(inside), *twice]) == 2
    assert "given twice" in capsys.readouterr().err
    assert inside.read_bytes() == tiny_file.read_bytes()
