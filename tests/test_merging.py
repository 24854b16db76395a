"""Merges against the same arithmetic on loaded tensors, and what the result says it is."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sumizome.cli.main import main
from sumizome.errors import ConfigError, ExportError, ModelError
from sumizome.inspection import inspect_model
from sumizome.mend_decision import MendConfig
from sumizome.mending import mend_model
from sumizome.merge_words import with_other_vae
from sumizome.merging import add_difference, merge_weighted
from sumizome.models.sdxl import load_model

MARKS = ("v_pred", "ztsnr", "alphas_cumprod")
VAE = "first_stage_model."
EPSILON = {"modelspec.prediction_type": "epsilon"}


def weights_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if name not in MARKS}


def moved(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=draw) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def other(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another v-prediction model of the same shape."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    marks = {mark: torch.tensor([]) for mark in MARKS[:2]}
    save_file(moved(weights_of(tiny_file), seed=1) | marks, path)
    return path


@pytest.fixture(scope="module")
def epsilon_pair(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An epsilon model and its fine-tune."""
    folder = tmp_path_factory.mktemp("epsilon")
    original = moved(weights_of(tiny_file), seed=2)
    save_file(original, folder / "original.safetensors", metadata=EPSILON)
    save_file(moved(original, seed=3), folder / "tuned.safetensors", metadata=EPSILON)
    return folder / "tuned.safetensors", folder / "original.safetensors"


def test_a_weighted_merge_is_the_mean_and_keeps_marks_and_the_first_vae(
    tiny_file: Path, other: Path, tmp_path: Path
) -> None:
    merged = merge_weighted([tiny_file, other], [3.0, 1.0], tmp_path / "m.safetensors")
    assert merged.warnings == ()
    first, second, found = weights_of(tiny_file), weights_of(other), load_file(merged.mended.path)
    for name, tensor in first.items():
        expected = tensor if name.startswith(VAE) else 0.75 * tensor + 0.25 * second[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)
    findings = inspect_model(merged.mended.path)
    assert findings.problems == () and (findings.prediction_type, findings.zero_terminal_snr) == ("v_prediction", True)


TRAINED = {
    "sumizome.training": '{"steps": 9}',
    "ss_steps": "9",
    "ss_zero_terminal_snr": "True",
    "sd_merge_recipe": "{}",
    "modelspec.date": "2023-01-01",
    "modelspec.author": "A. N. Other",
    "modelspec.thumbnail": "data:image/jpeg;base64,",
    "modelspec.hash_sha256": "0xab",
    "modelspec.tags": "anime",
    "modelspec.resolution": "832x1216",
}


def test_a_merge_names_its_parents_and_says_nothing_of_their_training(
    tiny_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """It kept the first model's steps, settings, author and date, as if it had been trained so."""
    own = weights_of(tiny_file) | {mark: torch.tensor([]) for mark in MARKS[:2]}
    one, two, out = tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "m.safetensors"
    first = TRAINED | {"modelspec.title": "Ink, light", "modelspec.license": "Fair", "modelspec.trigger_phrase": "ink"}
    save_file(own, one, metadata=first)
    save_file(own, two, metadata=TRAINED | {"modelspec.license": "Open", "modelspec.hash_sha256": "0xcd"})
    config = MendConfig(verify_step=False)
    told = inspect_model(merge_weighted([one, two], [3.0, 1.0], out, config).mended.path).metadata
    assert not [key for key in told if key.startswith("ss_") or key in ("sumizome.training", "sd_merge_recipe")]
    assert not {"modelspec.author", "modelspec.thumbnail", "modelspec.trigger_phrase"}.intersection(told)
    assert told["modelspec.merged_from"] == "Ink light, two"
    assert told["modelspec.description"] == "A merge: 0.75 × Ink, light + 0.25 × two. The VAE is that of Ink, light."
    assert told["modelspec.license"] == "Fair; Open" and told["modelspec.tags"] == "anime"
    assert told["modelspec.title"] == "m" and told["modelspec.resolution"] == "832x1216"
    assert told["modelspec.date"].startswith("20") and told["modelspec.date"] != "2023-01-01"
    assert told["modelspec.prediction_type"] == "v-zsnr" and told["modelspec.hash_sha256"] not in ("0xab", "0xcd")
    recipe = json.loads(told["sumizome.merge"])
    assert recipe["vae"] == "one.safetensors" and recipe["models"] == [
        {"name": "one.safetensors", "title": "Ink, light", "hash_sha256": "0xab", "weight": 0.75},
        {"name": "two.safetensors", "hash_sha256": "0xcd", "weight": 0.25},
    ]
    again = add_difference(tiny_folder, out, one, tmp_path / "n.safetensors", config, scale=0.5).mended.path
    told = inspect_model(again).metadata
    assert told["modelspec.merged_from"] == "tiny, m, Ink light" and "modelspec.tags" not in told
    assert "1 × tiny + 0.5 × m - 0.5 × Ink, light" in told["modelspec.description"]
    base, added, _ = json.loads(told["sumizome.merge"])["models"]
    assert base == {"name": "tiny", "weight": 1.0} and added["merge"] == recipe
    save_file(own, two, metadata={"sumizome.merge": json.dumps(["x" * 20_000])})
    of_long = inspect_model(merge_weighted([one, two], [1.0, 1.0], out, config, overwrite=True).mended.path).metadata
    assert "xx" not in of_long["sumizome.merge"]
    kept = mend_model(again, tmp_path / "k.safetensors", config).path  # what a merge says stays with its copies
    assert inspect_model(kept).metadata["sumizome.merge"] == told["sumizome.merge"]


def test_names_that_are_no_text_and_licences_told_twice(tiny_file: Path, tmp_path: Path) -> None:
    own = weights_of(tiny_file) | {mark: torch.tensor([]) for mark in MARKS[:2]}
    one, two = tmp_path / "one.safetensors", tmp_path / os.fsdecode(b"tw\xff.safetensors")
    save_file(own, one, metadata={"modelspec.license": "A; B", "modelspec.title": "Ink\x1b[31m\n wash"})
    shutil.copyfile(tiny_file, two)
    card = {"modelspec.license": "A"}
    save_file(own, tmp_path / "three.safetensors", metadata=card)
    paths, config = [one, two, tmp_path / "three.safetensors"], MendConfig(verify_step=False)
    told = inspect_model(merge_weighted(paths, [1.0] * 3, tmp_path / "m.safetensors", config).mended.path).metadata
    assert told["modelspec.license"] == "A; B"
    assert told["modelspec.merged_from"].startswith("Ink\\x1b[31m wash, ")
    assert told["modelspec.merged_from"].isprintable() and told["modelspec.description"].isprintable()
    models = json.loads(told["sumizome.merge"])["models"]
    assert models[1]["name"] == "tw\\udcff.safetensors" and models[0]["title"] == "Ink\\x1b[31m\\n wash"


def test_another_vae_is_named(tiny_file: Path, other: Path, tmp_path: Path) -> None:
    """A merge that got another VAE went on naming the first model's."""
    config = MendConfig(vae=other, verify_step=False)
    out = merge_weighted([tiny_file, tiny_file], [1.0, 1.0], tmp_path / "m.safetensors", config).mended.path
    told = inspect_model(out).metadata
    assert told["modelspec.description"].endswith(" The VAE is that of other.")
    assert json.loads(told["sumizome.merge"])["vae"] == "other.safetensors"
    again = with_other_vae(told, Path("new/sdxl.vae.safetensors"))
    assert again["modelspec.description"].endswith(" The VAE is that of sdxl.vae.")
    assert again["modelspec.description"].count("VAE") == 1
    assert json.loads(again["sumizome.merge"]) == json.loads(told["sumizome.merge"]) | {"vae": "sdxl.vae.safetensors"}
    mended = mend_model(out, tmp_path / "n.safetensors", MendConfig(vae=tiny_file, verify_step=False)).path
    assert inspect_model(mended).metadata["modelspec.description"].endswith(f" The VAE is that of {tiny_file.stem}.")
    plain = {"modelspec.description": "Mine. The VAE is that of SDXL."}
    assert with_other_vae(plain, other) == plain


def test_a_folder_and_a_file_merge_into_a_folder(
    tiny_folder: Path, other: Path, tiny_file: Path, tmp_path: Path
) -> None:
    by_folder = merge_weighted([tiny_folder, other], [1.0, 1.0], tmp_path / "folder").mended.path
    by_file = merge_weighted([tiny_file, other], [1.0, 1.0], tmp_path / "m.safetensors").mended.path
    for name, network in load_model(by_folder).networks.items():
        same = load_model(by_file).networks[name].state_dict()
        assert all(torch.equal(tensor, same[key]) for key, tensor in network.state_dict().items())


def test_a_difference_is_added_and_mixing_kinds_is_warned_about(
    tiny_file: Path, epsilon_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    tuned, original = epsilon_pair
    merged = add_difference(tiny_file, tuned, original, tmp_path / "m.safetensors", scale=0.5)
    assert "epsilon" in merged.warnings[0] and "v_prediction" in merged.warnings[0]
    base, high, low = weights_of(tiny_file), weights_of(tuned), weights_of(original)
    found = load_file(merged.mended.path)
    for name, tensor in base.items():
        expected = tensor if name.startswith(VAE) else tensor + 0.5 * (high[name] - low[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
    assert inspect_model(merged.mended.path).zero_terminal_snr
    back = add_difference(original, tiny_file, tiny_file, tmp_path / "e.safetensors")
    assert len(back.warnings) == 1 and inspect_model(back.mended.path).prediction_type == "epsilon"
    spoilt = add_difference(tiny_file, tiny_file, original, tmp_path / "s.safetensors")
    assert "change of the target" in spoilt.warnings[0]


def test_a_mean_of_epsilon_and_v_is_refused_unless_asked_for(
    tiny_file: Path, epsilon_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = [tiny_file, epsilon_pair[0]]
    with pytest.raises(ConfigError, match="do not predict the same"):
        merge_weighted(paths, [1.0, 1.0], tmp_path / "m.safetensors")
    merged = merge_weighted(paths, [1.0, 1.0], tmp_path / "m.safetensors", MendConfig("v", True))
    assert "mixture of epsilon and v" in merged.warnings[0]


def test_what_options_settle_is_no_difference(tiny_file: Path, other: Path, tmp_path: Path) -> None:
    """A model marked v_pred alone was "epsilon and v" beside one with ztsnr, and drew a warning of mush."""
    marked = tmp_path / "v.safetensors"
    save_file(weights_of(tiny_file) | {"v_pred": torch.tensor([])}, marked)
    config = MendConfig(zero_terminal_snr=True, verify_step=False)
    merged = merge_weighted([other, marked], [1.0, 1.0], tmp_path / "m.safetensors", config)
    assert merged.warnings == () and inspect_model(merged.mended.path).zero_terminal_snr


def changed_folder(folder: Path, out: Path, file: str, **values: object) -> Path:
    shutil.copytree(folder, out)
    config = out / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return out


def test_two_schedules_are_named_as_what_differs(tiny_folder: Path, tmp_path: Path) -> None:
    own = {"rescale_betas_zero_snr": False, "trained_betas": None}
    place = "scheduler/scheduler_config.json"
    plain = changed_folder(tiny_folder, tmp_path / "plain", place, **own)
    out = tmp_path / "m.safetensors"
    with pytest.raises(ConfigError, match=r"different schedules.*--no-zero-terminal-snr"):
        merge_weighted([tiny_folder, plain], [1.0, 1.0], out)
    settled = MendConfig(zero_terminal_snr=True, verify_step=False)
    warnings = merge_weighted([tiny_folder, plain], [1.0, 1.0], out, settled).warnings
    assert len(warnings) == 1 and "schedules" in warnings[0] and "epsilon" not in warnings[0]
    longer = changed_folder(tiny_folder, tmp_path / "longer", place, beta_end=0.02)
    with pytest.raises(ConfigError, match="different betas"):
        merge_weighted([tiny_folder, longer], [1.0, 1.0], tmp_path / "n.safetensors")


def test_networks_that_draw_otherwise_with_the_same_weights_are_refused(
    tiny_folder: Path, tiny_file: Path, tmp_path: Path
) -> None:
    """One activation was taken for the other's, and no word."""
    odd = changed_folder(tiny_folder, tmp_path / "odd", "text_encoder/config.json", hidden_act="relu")
    out = tmp_path / "m.safetensors"
    with pytest.raises(
        ModelError, match=r"text_encoder has another hidden_act in .*tiny.* \(SDXL's own\) .*odd \(relu"
    ):
        merge_weighted([tiny_file, odd], [1.0, 1.0], out)
    with pytest.raises(ModelError, match="hidden_act"):
        add_difference(tiny_folder, tiny_file, odd, out)
    canvas = changed_folder(tiny_folder, tmp_path / "canvas", "unet/config.json", sample_size=64, upcast_attention=True)
    merge_weighted([tiny_file, canvas], [1.0, 1.0], out, MendConfig(verify_step=False))
    alike = mend_model(odd, tmp_path / "odd.safetensors", MendConfig(verify_step=False)).path
    merge_weighted([odd, alike], [1.0, 1.0], tmp_path / "n.safetensors", MendConfig(verify_step=False))


def test_what_cannot_be_merged_is_refused(tiny_file: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(ConfigError, match="a weight each"):
        merge_weighted([tiny_file, other], [1.0], out)
    with pytest.raises(ConfigError, match="more than 0"):
        merge_weighted([tiny_file, other], [1.0, -1.0], out)
    with pytest.raises(ExportError, match="the source itself"):
        merge_weighted([tiny_file, other], [1.0, 1.0], other, overwrite=True)
    half = {name: tensor.half() for name, tensor in weights_of(tiny_file).items()}
    name = "model.diffusion_model.out.2.bias"
    half[name] = torch.full_like(half[name], 60000.0)
    small = half | {name: torch.zeros_like(half[name])}
    config = MendConfig("v", True)
    for stem, tensors in (("half", half), ("small", small)):
        save_file(tensors, tmp_path / f"{stem}.safetensors")
    places = [tmp_path / f"{stem}.safetensors" for stem in ("half", "small")]
    with pytest.raises(ExportError, match="overflows"):
        add_difference(places[0], places[0], places[1], out, config)
    save_file({key: tensor for key, tensor in small.items() if "embedders" not in key}, tmp_path / "u.safetensors")
    with pytest.raises(ModelError, match="no text_encoder"):
        merge_weighted([places[0], tmp_path / "u.safetensors"], [1.0, 1.0], out, config)
    assert not out.exists()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1e308, 1e308], "their sum must be finite"),
        ([float("inf"), 1.0], "must be finite"),
        ([float("nan"), 1.0], "must be finite"),
        ([1e308, -1e308, 1e-10], "nearly cancel"),
    ],
)
def test_weights_that_no_float_holds_are_refused(
    tiny_file: Path, tmp_path: Path, weights: list[float], words: str
) -> None:
    """The first made a model of zeros, in silence."""
    with pytest.raises(ConfigError, match=words):
        merge_weighted([tiny_file] * len(weights), weights, tmp_path / "m.safetensors")


@pytest.mark.parametrize("scale", ["nan", "inf", "1e39"])
def test_a_scale_that_float32_does_not_hold_is_refused(
    tiny_file: Path, tmp_path: Path, scale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    difference = ["--add", str(tiny_file), "--minus", str(tiny_file), "--scale", scale]
    assert main(["merge", str(tiny_file), *difference, "--out", str(tmp_path / "m.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "must be a finite number" in error and error.count("\n") == 1


def test_what_float8_does_not_hold_is_refused_and_its_greatest_number_is_kept(tiny_file: Path, tmp_path: Path) -> None:
    """torch's cast to float8 saturates: a sum of 1024 became 448, and no word."""
    name, out = "model.diffusion_model.out.2.bias", tmp_path / "m.safetensors"
    whole, paths = weights_of(tiny_file), []
    for number in (448.0, 288.0, -288.0):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(whole | {name: torch.full_like(whole[name], number).to(torch.float8_e4m3fn)}, paths[-1])
    config = MendConfig("v", True, verify_step=False)
    with pytest.raises(ExportError, match=r"reaches 1\.02e\+03 when merged, which overflows torch.float8_e4m3fn"):
        add_difference(*paths, out, config)
    # 448 and 448, with shares whose mean float32 rounds to above 448.
    greatest = torch.tensor([448.0])
    share = next(k / 100 for k in range(1, 100) if float(k / 100 * greatest + (1 - k / 100) * greatest) > 448)
    merge_weighted([paths[0]] * 2, [share, 1 - share], out, config)
    assert weights_of(out)[name].float().eq(448).all()


def test_what_is_asked_for_is_rounded_once_from_float32(tiny_file: Path, tmp_path: Path) -> None:
    """A sum that float16 cannot hold was refused though bfloat16 was asked for, and float32 got float16's digits."""
    name = "model.diffusion_model.out.2.bias"
    half = {key: t if key in MARKS else t.half() for key, t in weights_of(tiny_file).items()}
    save_file(half | {name: torch.full_like(half[name], 60000.0)}, tmp_path / "a.safetensors")
    save_file(half | {name: torch.full_like(half[name], 3.0)}, tmp_path / "b.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    mean, out = tmp_path / "mean.safetensors", tmp_path / "sum.safetensors"
    config = MendConfig("v", True, dtype="fp32", verify_step=False)
    merge_weighted([a, b], [0.5, 0.5], mean, config)
    assert torch.equal(weights_of(mean)[name], torch.full((4,), 30001.5))
    add_difference(a, a, b, out, config)
    assert torch.equal(weights_of(out)[name], torch.full((4,), 119997.0))


def test_the_command_merges_and_warns(
    tiny_file: Path, other: Path, epsilon_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "m.safetensors")
    assert main(["merge", str(tiny_file), str(other), "--weights", "0.7", "0.3", "--out", out]) == 0
    assert "read back bit for bit" in capsys.readouterr().out
    difference = ["--add", str(epsilon_pair[0]), "--minus", str(epsilon_pair[1])]
    assert main(["merge", str(tiny_file), *difference, "--out", out, "--overwrite"]) == 0
    assert capsys.readouterr().out.startswith("! the difference is between")
    assert main(["merge", str(tiny_file), *difference[:2], "--out", out, "--overwrite"]) == 2
    assert "belong together" in capsys.readouterr().err
