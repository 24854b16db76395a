"""A1111's .yaml and the model that it belongs to: never one of a new pair beside one of an old; refused in time.

A tiny model has no sidecar; here it is taken for one of SDXL's size, which is the only thing that is not real.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sumizome import export_metadata
from sumizome.cli.main import main
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.errors import ExportError
from sumizome.export import write_single_file
from sumizome.inspection import inspect_model
from sumizome.mend_decision import MendConfig
from sumizome.mending import mend_model
from sumizome.models.prediction_marks import sidecar_of
from sumizome.models.sdxl import SDXLModel, load_model

Write = Callable[[Path], object]


@pytest.fixture(autouse=True)
def as_if_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_metadata, "_is_full_size", lambda model: True)


@pytest.fixture
def epsilon(tiny: SDXLModel) -> SDXLModel:
    return replace(tiny, prediction_type="epsilon", schedule_config=ScheduleConfig(zero_terminal_snr=False))


@pytest.fixture(params=["export", "mend"])
def write(request: pytest.FixtureRequest, tiny: SDXLModel, tiny_file: Path) -> Write:
    """Writes the v model with its sidecar, over what stands there."""
    if request.param == "export":
        return lambda path: write_single_file(tiny, path, overwrite=True, verify_step=False)
    return lambda path: mend_model(tiny_file, path, MendConfig(verify_step=False), overwrite=True)


def seen_after_each_rename(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[tuple[str, str]]:
    """(what the model at `path` is, what its sidecar says) after every rename, which is where a crash may come."""
    moments: list[tuple[str, str]] = []

    def watched(move: Callable[..., Path]) -> Callable[..., Path]:
        def moved(self: Path, target: Path) -> Path:
            done = move(self, target)
            marked = path.exists() and b'"v_pred"' in path.read_bytes()[:1_000_000]
            says = sidecar_of(path)[1]
            moments.append(("v" if marked else "epsilon" if path.exists() else "none", says or "nothing"))
            return done

        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    return iter(moments)


@pytest.mark.parametrize("before", ["nothing", "epsilon", "epsilon and its sidecar", "a sidecar"])
def test_at_no_moment_is_a_model_seen_beside_a_sidecar_that_is_not_its_own(
    write: Write, epsilon: SDXLModel, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    if "epsilon" in before:
        write_single_file(epsilon, path, verify_step=False)
    if "sidecar" in before:
        path.with_suffix(".yaml").write_text("target: sgm.EpsScaling\n")
    moments = seen_after_each_rename(monkeypatch, path)
    write(path)
    seen = list(moments)
    assert seen[-1] == ("v", "v_prediction") and ("none", "v_prediction") in seen
    assert ("v", "nothing") not in seen and ("v", "epsilon") not in seen and ("epsilon", "v_prediction") not in seen
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.safetensors", "model.yaml"]


def test_written_again_over_itself_the_model_never_leaves_its_place(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    write(path)
    moments = seen_after_each_rename(monkeypatch, path)
    write(path)
    assert set(moments) == {("v", "v_prediction")}


@pytest.mark.parametrize("fails", ["model.yaml", "model.safetensors"])
def test_what_the_disk_refuses_leaves_both_as_they_were(
    write: Write, epsilon: SDXLModel, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sidecar = tmp_path / "model.safetensors", tmp_path / "model.yaml"
    write_single_file(epsilon, path, verify_step=False)
    sidecar.write_text("target: sgm.EpsScaling\n")
    before, rename = path.read_bytes(), Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp" and Path(target).name == fails:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ExportError, match="Input/output error"):
        write(path)
    assert path.read_bytes() == before and "EpsScaling" in sidecar.read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.safetensors", "model.yaml"]


@pytest.mark.parametrize("folder", ["model.yaml", "model.safetensors"])
def test_a_folder_in_the_way_stays(write: Write, folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "cat.png").write_bytes(b"precious")
    with pytest.raises(ExportError, match=f"{folder}: it is a folder"):
        write(tmp_path / "model.safetensors")
    assert (tmp_path / folder / "cat.png").read_bytes() == b"precious"
    assert [entry.name for entry in tmp_path.iterdir()] == [folder]


def test_a_sidecar_in_the_way_is_refused_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, folder, out = tmp_path / "m.yaml", tmp_path / "folder", tmp_path / "m.safetensors"
    taken.write_text("mine")
    assert main(["export", str(tiny_folder), "--folder", str(folder), "--file", str(out)]) == 2
    error = capsys.readouterr().err
    assert "m.yaml exists" in error and error.count("\n") == 1
    assert main(["mend", str(tiny_folder), "--out", str(out)]) == 2
    assert "m.yaml exists" in capsys.readouterr().err
    assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]


def test_a_sidecar_that_would_be_false_is_refused_before_anything_is_written(
    epsilon: SDXLModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_single_file(epsilon, tmp_path / "source.safetensors", verify_step=False)
    false = tmp_path / "m.yaml"
    false.write_text("target: sgm.modules.denoiser_scaling.VScaling\n")
    folder, out = str(tmp_path / "folder"), str(tmp_path / "m.safetensors")
    for command in (
        ["export", str(source), "--folder", folder, "--file", out, "--overwrite"],
        ["mend", str(source), "--out", out, "--overwrite"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "would make programs read m.safetensors wrongly" in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [false, source]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--unet", "m.safetensors"], "given twice"),
        (["--unet", "u.bin"], "must end in .safetensors"),
        (["--unet", "taken.safetensors"], "taken.safetensors exists"),
    ],
)
def test_no_target_is_written_if_another_is_refused(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    assert main(["export", str(tiny_folder), "--folder", "f", "--file", "m.safetensors", *flags]) == 2
    assert words in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.safetensors"]


def test_the_pair_is_read_as_what_it_is(tiny: SDXLModel, tmp_path: Path) -> None:
    path = write_single_file(tiny, tmp_path / "model.safetensors", dtype="bf16")
    findings = inspect_model(path)
    stated = {key.removeprefix("modelspec."): value for key, value in findings.metadata.items()}
    assert stated["architecture"] == "stable-diffusion-xl-v1-base" and stated["implementation"] == "sgm"
    assert stated["sai_model_spec"] == "1.0.1" and stated["resolution"] == "1024x1024" and stated["title"]
    assert findings.sidecar == path.with_suffix(".yaml") and findings.problems == ()
    forge: Any = next(row for row in findings.programs if row.program == "Forge")
    assert forge.right and load_model(path, components=()).prediction_type == "v_prediction"
