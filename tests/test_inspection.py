"""Findings about files at SDXL's real size (sparse on disk), about our own exports, and about what is no SDXL."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import full_size_shapes, write_sparse
from safetensors.torch import load_file, save_file

from sumizome.cli.main import main
from sumizome.errors import ModelError
from sumizome.files import readable_size
from sumizome.inspection import Findings, inspect_model
from sumizome.models.sdxl import load_model

MARKS = ("v_pred", "ztsnr")


def programs(findings: Findings) -> dict[str, tuple[str | None, bool | None]]:
    return {row.program: (row.prediction_type, row.zero_terminal_snr) for row in findings.programs}


def verdict_of(findings: Findings, source: str) -> str:
    return next(evidence.verdict for evidence in findings.evidence if source in evidence.source)


# --- at SDXL's real size ---------------------------------------------------------------------------------------------


def test_a_file_of_seven_gigabytes_is_whole_and_marked(tmp_path: Path) -> None:
    findings = inspect_model(write_sparse(tmp_path / "m.safetensors", full_size_shapes(), marks=MARKS))
    assert findings.layout == "file" and findings.bytes > 6.9e9 and findings.dtypes == {"F16": 3_468_837_867}
    assert (findings.prediction_type, findings.zero_terminal_snr) == ("v_prediction", True)
    assert {part.name: part.tensors for part in findings.components}["unet"] == 1680
    assert findings.components[0].parameters == 2_567_463_684
    assert not any(part.missing or part.foreign or part.misshapen for part in findings.components)
    assert findings.problems == () and set(MARKS) == set(findings.ignored)


def test_torch_is_not_imported_for_it(tmp_path: Path) -> None:
    """Importing torch alone takes longer than the whole answer may."""
    path = write_sparse(tmp_path / "m.safetensors", full_size_shapes(), marks=MARKS)
    code = (
        "import sys; from sumizome.cli.main import main; main(['inspect', sys.argv[1]]); "
        "heavy = {'torch', 'numpy', 'diffusers'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1,680" in done.stdout and "ComfyUI" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100 + len(str(path))


def bytes_read() -> int:
    """What this process has asked the system to read so far, files in memory included."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_of_seven_gigabytes_the_header_alone_is_read(tmp_path: Path) -> None:
    shapes = full_size_shapes()
    path = write_sparse(tmp_path / "m.safetensors", shapes, marks=MARKS)
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    inspect_model(path)  # whatever Python itself still has to load
    before = bytes_read()
    inspect_model(path)
    assert header <= bytes_read() - before < header + 10_000


def test_missing_foreign_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    shapes = full_size_shapes()
    lost = "model.diffusion_model.time_embed.0.weight"
    del shapes[lost]
    shapes["first_stage_model.decoder.extra.weight"] = (3, 3)
    shapes["conditioner.embedders.1.model.ln_final.bias"] = (1281,)
    shapes["mystery"] = (2,)
    findings = inspect_model(write_sparse(tmp_path / "m.safetensors", shapes))
    unet, vae, _, second = findings.components
    assert unet.missing == (lost,) and vae.foreign == ("first_stage_model.decoder.extra.weight",)
    assert second.misshapen == ("conditioner.embedders.1.model.ln_final.bias 1281, expected 1280",)
    assert [words for words in ("lacks", "does not", "other shapes", "mystery")
            if not any(words in problem for problem in findings.problems)] == []  # fmt: skip


def test_missing_networks_and_a_second_unet_are_told(tmp_path: Path) -> None:
    shapes = {key: shape for key, shape in full_size_shapes().items() if not key.startswith("first_stage")}
    shapes["model_ema.diffusion_model.w"] = (1000,)
    findings = inspect_model(write_sparse(tmp_path / "m.safetensors", shapes))
    assert any(problem.startswith("has no vae") for problem in findings.problems)
    assert any("averaged U-Net" in problem for problem in findings.problems)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_unet_alone_with_or_without_its_prefix(tmp_path: Path, prefixed: bool) -> None:
    unet = "model.diffusion_model."
    shapes = {
        key if prefixed else key.removeprefix(unet): shape
        for key, shape in full_size_shapes().items()
        if key.startswith(unet)
    }
    findings = inspect_model(write_sparse(tmp_path / "unet.safetensors", shapes, marks=MARKS))
    assert findings.layout == "unet" and findings.prediction_type == "v_prediction"
    (part,) = findings.components
    assert part.tensors == 1680 and not part.missing and not part.foreign
    assert programs(findings)["ComfyUI"] == ("v_prediction", True) and programs(findings)["Forge"] == (None, None)


# --- the evidence ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_shapes(tiny_file: Path) -> dict[str, tuple[int, ...]]:
    marks = (*MARKS, "alphas_cumprod")
    return {name: tuple(tensor.shape) for name, tensor in load_file(tiny_file).items() if name not in marks}


@pytest.mark.parametrize(
    ("marks", "metadata", "expected", "decides"),
    [
        ((), {}, ("epsilon", False), "nothing above"),
        (("v_pred",), {}, ("v_prediction", False), "v_pred"),
        (MARKS, {}, ("v_prediction", True), "ztsnr"),
        (("ztsnr",), {}, ("epsilon", False), "nothing above"),
        ((), {"modelspec.prediction_type": "v-zsnr"}, ("v_prediction", True), "modelspec.prediction_type"),
        ((), {"prediction_type": "v"}, ("v_prediction", False), "prediction_type"),
        (MARKS, {"modelspec.prediction_type": "epsilon"}, ("v_prediction", True), "v_pred"),
    ],
)
def test_what_decides_is_what_the_loader_goes_by(
    tmp_path: Path,
    small_shapes: dict[str, tuple[int, ...]],
    marks: tuple[str, ...],
    metadata: dict[str, str],
    expected: tuple[str, bool],
    decides: str,
) -> None:
    path = write_sparse(tmp_path / "m.safetensors", small_shapes, dtype="F32", marks=marks, metadata=metadata)
    findings = inspect_model(path)
    assert (findings.prediction_type, findings.zero_terminal_snr) == expected
    loaded = load_model(path, components=())
    assert (loaded.prediction_type, loaded.schedule_config.zero_terminal_snr) == expected
    assert any(decides in evidence.source for evidence in findings.evidence if evidence.verdict == "decides")


def test_a_contradiction_is_a_problem_with_its_remedy(tmp_path: Path, small_shapes: dict[str, tuple[int, ...]]) -> None:
    named = inspect_model(write_sparse(tmp_path / "ink_vPred.safetensors", small_shapes))
    assert verdict_of(named, "name") == "contradicts" and "--prediction v" in named.problems[0]
    stated = {"modelspec.prediction_type": "epsilon"}
    stale = inspect_model(write_sparse(tmp_path / "m.safetensors", small_shapes, marks=MARKS, metadata=stated))
    assert verdict_of(stale, "modelspec") == "contradicts" and len(stale.problems) == 2
    unknown = inspect_model(
        write_sparse(tmp_path / "u.safetensors", small_shapes, metadata={"prediction_type": "vpred"})
    )
    assert 'prediction_type says "vpred", which is no word' in unknown.problems[0]
    edm = inspect_model(write_sparse(tmp_path / "e.safetensors", small_shapes, marks=("edm_mean", "edm_std")))
    assert edm.prediction_type == "EDM" and "EDM" in edm.problems[0]
    assert programs(edm)["ComfyUI"] == ("EDM", False)


def test_a_sidecar_is_read_for_its_words_and_its_comments_are_not(
    tmp_path: Path, small_shapes: dict[str, tuple[int, ...]]
) -> None:
    path = write_sparse(tmp_path / "m.safetensors", small_shapes)
    sidecar = path.with_suffix(".yaml")
    sidecar.write_text("model:\n  target: sgm.EpsScaling # not .VScaling\n")
    assert programs(inspect_model(path))["A1111 1.10.1"] == ("epsilon", False)
    sidecar.write_text("model:\n  target: sgm.modules.denoiser_scaling.VScaling\n")
    findings = inspect_model(path)
    assert findings.sidecar == sidecar and programs(findings)["A1111 1.10.1"] == ("v_prediction", False)
    assert verdict_of(findings, "m.yaml") == "decides"  # nothing that is believed more says anything
    loaded = load_model(path, components=())
    assert loaded.prediction_type == findings.prediction_type == "v_prediction"
    stated = write_sparse(path, small_shapes, metadata={"prediction_type": "epsilon"})
    assert verdict_of(inspect_model(stated), "m.yaml") == "contradicts"


# --- our own exports -------------------------------------------------------------------------------------------------


def test_our_own_file_and_folder_are_without_fault(tiny_file: Path, tiny_folder: Path) -> None:
    for path in (tiny_file, tiny_folder):
        findings = inspect_model(path)
        assert (findings.prediction_type, findings.zero_terminal_snr) == ("v_prediction", True)
        assert findings.problems == () and len(findings.components) == 4
        assert not any(evidence.verdict == "contradicts" for evidence in findings.evidence)
    assert programs(inspect_model(tiny_file))["sd.cpp"] == ("v_prediction", True)
    assert programs(inspect_model(tiny_folder))["InvokeAI"] == ("v_prediction", True)


def test_a_folder_that_lost_something_says_what(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    config = folder / "scheduler/scheduler_config.json"
    found = json.loads(config.read_text())
    del found["trained_betas"]
    config.write_text(json.dumps(found | {"timestep_spacing": "leading"}))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_in.bias"]
    save_file(tensors, weights)
    findings = inspect_model(folder)
    assert any("conv_in.bias" in problem for problem in findings.problems)
    assert any("leading" in problem for problem in findings.problems)
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(ModelError, match="missing"):
        (folder / "model_index.json").unlink()
        inspect_model(folder)


# --- what is no SDXL, and what is damaged ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "LoRA"),
        ("unet.down_blocks.0.lora_A.weight", "LoRA"),
        ("clip_g", "textual inversion"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("cond_stage_model.transformer.text_model.x", "Stable Diffusion 1"),
        ("conditioner.embedders.0.model.ln_final.weight", "refiner"),
        ("first_stage_model.decoder.conv_in.weight", "VAE"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers folder"),
        ("something", "no model"),
    ],
)
def test_what_is_no_sdxl_says_what_it_is(tmp_path: Path, name: str, kind: str) -> None:
    path = write_sparse(tmp_path / "m.safetensors", {name: (4, 4)}, metadata={"ss_network_dim": "8"})
    findings = inspect_model(path)
    assert kind in findings.kind and findings.layout is None and findings.programs == ()
    assert main(["inspect", str(path)]) == 0


def test_each_damage_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    cut = write_sparse(tmp_path / "cut.safetensors", {"a": (100,)})
    cut.write_bytes(cut.read_bytes()[:-5])
    for path, words in (
        (empty, "is empty"),
        (cut, "was cut off"),
        (tmp_path / "none.safetensors", "No such file"),
        (tmp_path / "m.ckpt", "pickled"),
        (tmp_path, "model_index.json is missing"),
    ):
        assert main(["inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("sumizome: ")


def test_weights_are_read_when_asked(tmp_path: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_file), "--weights"]) == 0
    text = capsys.readouterr().out
    assert "all finite" in text and "what the metadata's hash_sha256 says" in text
    tensors = load_file(tiny_file)
    tensors["model.diffusion_model.out.2.bias"][0] = float("nan")
    tensors["model.diffusion_model.out.2.bias"][1] = 1e6
    save_file(tensors, tmp_path / "bad.safetensors", metadata={"modelspec.hash_sha256": "0xabc"})
    assert main(["inspect", str(tmp_path / "bad.safetensors"), "--weights"]) == 0
    text = capsys.readouterr().out
    assert "1 numbers that are NaN" in text and "reaches 1e+06" in text and "not this data's" in text


@pytest.mark.parametrize(
    ("count", "words"),
    [(7_111_222_333, "7.11 GB"), (20_440_000, "20.4 MB"), (999_700_000, "1,000 MB"), (1500, "1.50 kB"), (9, "9 bytes")],
)
def test_a_size_is_told_in_the_unit_that_suits_it(count: int, words: str) -> None:
    assert readable_size(count) == words


def test_json_holds_everything_and_the_terminal_gets_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_shapes: dict[str, tuple[int, ...]]
) -> None:
    metadata = {"modelspec.title": "\x1b[31mred\x07", "long": "x" * 5000}
    path = write_sparse(tmp_path / "m.safetensors", small_shapes, metadata=metadata)
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["inspect", str(path), "--json", "--weights"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"] == metadata and found["prediction_type"] == "epsilon"
    assert found["weights"]["not_finite"] == {} and len(found["weights"]["all_zero"]) > 100
    assert {row["program"] for row in found["programs"]} >= {"ComfyUI", "sd.cpp"}
