"""The whole command on the tiny model: JSON and page agree, parts share no picture, losses are comparable."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hostile_text import parse
from PIL import Image
from safetensors.torch import load_file, save_file

from sumizome.cli.main import main
from sumizome.data.buckets import BucketConfig
from sumizome.data.ingest import ingest
from sumizome.data.latents import open_latents
from sumizome.data.loader import split_validation
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.errors import ConfigError, ModelError
from sumizome.evaluate import candidates
from sumizome.evaluate.candidates import Candidate, load_candidate
from sumizome.evaluate.config import EvaluateConfig, check_config
from sumizome.evaluate.evaluation import _validation
from sumizome.evaluate.plots import Series, line_chart
from sumizome.evaluate.reference import fits, load_reference
from sumizome.evaluate.scores import bootstrap
from sumizome.models.sdxl import SDXLModel
from sumizome.models.vision_features import load_vision_features
from sumizome.prepare import PrepareConfig, prepare_latents


@pytest.fixture(scope="module")
def latents(tiny: SDXLModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pictures, red or blue and tagged so."""
    folder = tmp_path_factory.mktemp("coloured")
    random = np.random.default_rng(0)
    for index in range(96):
        colour = np.array([(220, 30, 30), (30, 30, 220)][index % 2]) + random.integers(-20, 20, 3)
        Image.new("RGB", (32, 32), tuple(colour.tolist())).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(f"picture, {['red', 'blue'][index % 2]}")
    out = tmp_path_factory.mktemp("prepared") / "latents"
    for _ in prepare_latents(ingest([folder], workers=0).manifest, tiny.vae, out, PrepareConfig(BucketConfig(32, 16))):
        pass
    return out


def test_the_command_compares_models_in_one_json_and_one_page(
    tiny_folder: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    config = {"sampling.steps": 2, "seeds": 2, "pictures": 20, "guidance-pictures": 2, "held-out": 40}
    flags = [word for name, value in config.items() for word in (f"--config.{name}", str(value))]
    models = ["--model", str(tiny_folder), str(tiny_folder)]
    colours = ["--config.colours", "black", "white", "--config.guidance-scales", "1", "5"]
    short = ["--config.timesteps", "100", "999"]
    assert main(["evaluate", *models, "--latents", str(latents), "--out", str(out), *flags, *colours, *short]) == 0
    facts = json.loads(out.with_suffix(".json").read_text())
    first, second = facts["models"]
    assert (first["name"], second["name"]) == ("tiny (1)", "tiny (2)")
    for part in ("colours", "tags", "distance", "guidance", "validation"):
        assert first[part] == second[part]  # the same model: the same prompts, seeds and noise
    assert facts["data"]["pictures"]["test"] == 12 and facts["data"]["features"].endswith("this data's tags")
    assert [row["colour"] for row in first["colours"]] == ["black", "white"]
    assert first["colours"][1]["wanted_brightness"] == pytest.approx(1)
    assert first["distance"]["frechet"]["value"] > first["distance"]["real_frechet"]
    (beside,) = facts["beside_first"]
    assert beside["name"] == "tiny (2)"
    assert {"colour_error", "colour_error_black", "colour_error_white"} <= set(beside["differences"])
    assert all(it["low"] == it["value"] == it["high"] == 0 for it in beside["differences"].values())
    page = out.read_text()
    parse(page)
    assert "Beside the first model" in page and "not told apart" in page
    assert f"{first['colours'][0]['error']['value']:.3f}" in page and "not FID and KID of Inception" in page
    assert "colour error black" in capsys.readouterr().out


def test_colours_need_no_data(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "colours.html"
    flags = ["--config.sampling.steps", "2", "--config.seeds", "2", "--config.colours", "grey"]
    assert main(["evaluate", "--model", str(tiny_folder), "--out", str(out), *flags]) == 0
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["data"] is None and facts["models"][0]["distance"] is None
    assert facts["beside_first"] == [] and "Beside the first model" not in out.read_text()


def test_the_parts_of_the_data_share_no_picture_and_hold_out_what_training_does(tiny: SDXLModel, latents: Path) -> None:
    cache = open_latents(latents)
    reference = load_reference(cache, tiny.vae, held_out=24, train_pictures=50)
    parts = [set(reference.rows[part].tolist()) for part in (reference.train, reference.calibration, reference.test)]
    assert [len(part) for part in parts] == [50, 12, 12]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    _, held = split_validation(cache.index.picture_hash, 4)
    assert set(held.tolist()) <= parts[1] | parts[2]
    assert reference.images[0].shape == (1, 32, 32, 3)
    assert fits(cache, tiny.vae)


def test_too_few_pictures_are_refused(tiny: SDXLModel, tiny_latents: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        load_reference(open_latents(tiny_latents), tiny.vae, held_out=400, train_pictures=100)


def test_losses_of_all_prediction_types_are_those_of_the_velocity(
    tiny: SDXLModel, latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that answers 0 misses v by E|v|², ε by E|ε|² = 1, which is 1/ᾱ as v's: no network needed to know."""
    from sumizome.train import step

    monkeypatch.setattr(step, "apply_unet", lambda unet, x, t, conditioning: torch.zeros_like(x))
    reference = load_reference(open_latents(latents), tiny.vae, held_out=24, train_pictures=50)
    config = EvaluateConfig(timesteps=(500,))
    model = replace(tiny, prediction_type="epsilon", schedule_config=ScheduleConfig(zero_terminal_snr=False))
    facts = _validation(Candidate("m", Path(), model), reference, config)
    loss = facts["by_timestep"][0]["loss"]["value"]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert loss == pytest.approx(1 / np.cumprod(1 - betas)[500], rel=0.2)
    assert facts["pictures"] == 4 and facts["known_held_out"] is False


@pytest.mark.parametrize(("count", "told"), [(0, None), (64, 64)])
def test_a_run_that_held_nothing_out_is_not_taken_for_one_that_did(
    tiny: SDXLModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, told: int | None
) -> None:
    config = SimpleNamespace(validation=SimpleNamespace(count=count))
    monkeypatch.setattr(candidates, "is_run_dir", lambda path: True)
    monkeypatch.setattr(candidates, "load_trained_model", lambda *args, **options: (tiny, 7))
    monkeypatch.setattr(candidates, "read_run_config", lambda path: config)
    state = tmp_path / "checkpoints" / "step-00000007" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"facts": {"latents": "abc"}}))
    found = load_candidate(tmp_path)
    assert (found.held_out, found.trained_on) == (told, "abc")


@pytest.mark.parametrize(
    ("trained_on", "held_out", "same", "known"),
    [("these", 64, True, True), ("these", None, True, False), ("others", 64, False, False), (None, 64, None, False)],
)
def test_pictures_are_known_to_be_held_out_of_the_run_s_own_data_alone(
    tiny: SDXLModel,
    latents: Path,
    trained_on: str | None,
    held_out: int | None,
    same: bool | None,
    known: bool,
) -> None:
    """The pictures of least hash in another folder are others, which the run may have been trained on."""
    reference = load_reference(open_latents(latents), tiny.vae, held_out=24, train_pictures=50)
    digest = reference.cache.fingerprint.digest if trained_on == "these" else trained_on
    candidate = Candidate("run", Path(), tiny, 7, held_out, digest)
    facts = _validation(candidate, reference, EvaluateConfig(timesteps=()))
    assert (facts["same_data"], facts["known_held_out"]) == (same, known)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"colours": ("mauve",)}, "mauve"),
        ({"colour_prompt": "black"}, "stands for"),
        ({"seeds": 1}, "seeds is 1"),
        ({"validation_count": 0}, "give 1 or more"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_config(replace(EvaluateConfig(), **changed))  # type: ignore[arg-type]


def test_a_local_vision_model_gives_features(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**small, image_size=32, patch_size=16)).save_pretrained(tmp_path / "clip")
    sides = {"text_config": {**small, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}}
    sides["vision_config"] = {**small, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(**sides)).save_pretrained(tmp_path / "both")
    capfd.readouterr()
    load_vision_features(tmp_path / "both")
    features = load_vision_features(tmp_path / "clip")
    assert capfd.readouterr() == ("", "")  # neither a bar of transformers' own nor its table of a text encoder
    tensors = load_file(tmp_path / "clip/model.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "clip/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors of its CLIPVisionModel are not there"):
        load_vision_features(tmp_path / "clip")
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "red", "blue")]
    found = features(pictures)
    assert found.shape == (3, 16) and np.allclose(found[0], found[1]) and not np.allclose(found[0], found[2])
    with pytest.raises(ModelError, match="vision model"):
        load_vision_features(tmp_path)


def test_a_chart_puts_its_points_where_they_belong() -> None:
    chart = line_chart("t", [Series("a", [(0, 0.0), (10, bootstrap([1.0, 3.0]))])], "x", "y")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in chart.lines[0].points.split())
    assert x0 < x1 and y0 == chart.bottom and y1 < y0
    assert y1 == pytest.approx(chart.bottom - 2 / 3 * (chart.bottom - chart.y_ticks[-1].at), abs=0.1)
    assert chart.rects[0].height > 0
