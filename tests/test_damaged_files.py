"""Damaged and hostile files: every command that reads a model says what is wrong in one line and exits with 2."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sumizome.cli.main import main
from sumizome.errors import ModelError
from sumizome.models import tensor_file
from sumizome.models.sdxl import load_model

_LAST = "model.diffusion_model.out.2.bias"


def _header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _with_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, data = _header_of(path)
        change(header)
        raw = json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)

    return damage


def _overlap(header: dict[str, Any]) -> None:
    """A tensor placed on its neighbour: two names for the same bytes."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    filled = sorted((e for e in entries if e["shape"] != [0]), key=lambda entry: entry["data_offsets"])
    first, second = filled[1:3]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]


def _bomb(path: Path) -> None:
    with path.open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(90_000_100)


def _deep(path: Path) -> None:
    raw = b"[" * 200_000
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"tail")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "0 bytes": (lambda path: path.write_bytes(b""), "is empty"),
    "7 bytes": (lambda path: path.write_bytes(b"1234567"), "less than its header says"),
    "truncated header": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "less than its header says"),
    "truncated data": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "was cut off"),
    "a tail": (_grow, "belong to no tensor"),
    "header bomb": (_bomb, "90,000,000"),
    "nested header": (_deep, "nested deeper than any model's"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>" * 9), "is a web page"),
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x"), "git lfs pull"),
    "overlapping offsets": (_with_header(_overlap), "overlaps"),
    "hole": (_with_header(lambda header: header.pop(_LAST)), "hole"),
    "dtype of another size": (_with_header(lambda header: header[_LAST].update(dtype="F64")), "wrong dtype or shape"),
    "dtype of no kind": (_with_header(lambda header: header[_LAST].update(dtype="F33")), "does not know"),
    "shape of another size": (_with_header(lambda header: header[_LAST].update(shape=[2**40])), "wrong dtype or shape"),
    "negative shape": (_with_header(lambda header: header[_LAST].update(shape=[-4])), "malformed"),
    "offsets missing": (_with_header(lambda header: header[_LAST].pop("data_offsets")), "malformed"),
    "metadata of numbers": (_with_header(lambda header: header.update(__metadata__={"a": 1})), "no table of strings"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_names_the_file_and_the_damage_in_one_line(
    damage: str, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "broken.safetensors", tmp_path / "out.safetensors"
    shutil.copyfile(tiny_file, path)
    DAMAGES[damage][0](path)
    words = DAMAGES[damage][1]
    commands = {
        "inspect": ["inspect", str(path)],
        "inspect --weights": ["inspect", str(path), "--weights"],
        "mend": ["mend", str(path), "--out", str(out)],
        "mend --vae": ["mend", str(tiny_file), "--out", str(out), "--vae", str(path)],
        "merge": ["merge", str(tiny_file), str(path), "--out", str(out)],
        "export": ["export", str(path), "--file", str(out)],
    }
    for name, command in commands.items():
        assert main(command) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("sumizome: ") and error.count("\n") == 1, name
        assert "broken.safetensors" in error and words in error, (name, error)
        assert "recursion" not in error and "Errno" not in error, (name, error)
    with pytest.raises(ModelError, match=r"broken\.safetensors"):
        load_model(path)
    assert not out.exists()


@pytest.mark.parametrize("broken", ["0 bytes", "truncated data", "overlapping offsets"])
def test_a_damaged_part_of_a_folder_is_named(
    broken: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "folder"))
    part = folder / "unet/diffusion_pytorch_model.safetensors"
    DAMAGES[broken][0](part)
    for command in (["inspect", str(folder)], ["mend", str(folder), "--out", str(tmp_path / "m.safetensors")]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert str(part) in error and error.count("\n") == 1
    with pytest.raises(ModelError, match="unet"):
        load_model(folder)


ODD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a missing file": (lambda where: where / "none.safetensors", "none.safetensors cannot be read: No such file"),
    "a folder without a model": (lambda where: where, "holds no model: model_index.json is missing"),
    "a folder named like a file": (lambda where: _made(where / "d.safetensors"), "model_index.json is missing"),
    "a pickle": (lambda where: _written(where / "m.ckpt", b"\x80\x04cos\nsystem\n"), "pickled checkpoint"),
    "a zip": (lambda where: _written(where / "m.safetensors", b"PK\x03\x04" + bytes(99)), "is a zip archive"),
    "another pickle": (lambda where: _written(where / "m.safetensors", b"\x80\x02}q" + bytes(9)), "pickled checkpoint"),
}  # fmt: skip


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _made(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_model_file_is_one_line_everywhere(
    odd: str, tiny_file: Path, tiny_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    path, words = ODD[odd][0](tmp_path / "here"), ODD[odd][1]
    out = tmp_path / "out.safetensors"
    for command in (
        ["inspect", str(path)],
        ["mend", str(path), "--out", str(out)],
        ["mend", str(tiny_file), "--out", str(out), "--vae", str(path)],
        ["merge", str(tiny_file), str(path), "--out", str(out)],
        ["export", str(path), "--file", str(out)],
        ["train", "--model", str(path), "--latents", str(tiny_latents), "--run-dir", str(tmp_path / "run")],
        ["sample", "--model", str(path), "--prompt", "p", "--out", str(tmp_path / "pictures")],
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert error.startswith("sumizome: ") and error.count("\n") == 1, error
        assert words in error or (command[0] == "mend" and "--vae" in command and "holds no" in error), error


def test_a_file_that_may_not_be_read_says_so(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told by hand: root, as which tests often run, may read everything."""
    opened = Path.open

    def refused(self: Path, *rest: Any, **named: Any) -> Any:
        if self == tiny_file:
            raise PermissionError(13, "Permission denied")
        return opened(self, *rest, **named)

    monkeypatch.setattr(Path, "open", refused)
    assert main(["inspect", str(tiny_file)]) == 2
    error = capsys.readouterr().err
    assert "cannot be read: Permission denied" in error and error.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_a_file_of_whole_numbers_is_told_and_refused(
    dtype: torch.dtype, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As quantisers write them: every matrix of the U-Net in a dtype that is no floating-point one."""
    tensors = load_file(tiny_file)
    stored = {torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64", torch.bool: "BOOL"}[dtype]
    quantised = [n for n, t in tensors.items() if n.startswith("model.diffusion_model.") and t.ndim == 2]
    path = tmp_path / "model.safetensors"
    save_file({n: t.to(dtype) if n in quantised else t for n, t in tensors.items()}, path)
    assert main(["inspect", str(path), "--weights"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    count = sum(tensors[name].numel() for name in quantised)
    assert f"unet has {count:,} weights of dtype {stored}" in text
    for command, words in (
        (["mend", str(path), "--out", str(tmp_path / "m.safetensors")], f"dtype {stored} are quantised"),
        (
            ["merge", str(path), str(tiny_file), "--out", str(tmp_path / "m.safetensors")],
            f"dtype {stored} are quantised",
        ),
        (["export", str(path), "--file", str(tmp_path / "m.safetensors")], "whole numbers"),
        (["sample", "--model", str(path), "--prompt", "p", "--out", str(tmp_path / "o")], "whole numbers"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_ztsnr_without_v_pred_is_told_and_mend_asks(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {n: t for n, t in load_file(tiny_file).items() if n not in ("v_pred", "alphas_cumprod")}
    path, out = tmp_path / "half-marked.safetensors", tmp_path / "m.safetensors"
    save_file(tensors, path)
    loaded = load_model(path, components=())
    assert (loaded.prediction_type, loaded.schedule_config.zero_terminal_snr) == ("epsilon", False)
    assert main(["inspect", str(path)]) == 0
    assert "holds ztsnr without v_pred" in " ".join(capsys.readouterr().out.split())
    assert main(["mend", str(path), "--out", str(out)]) == 2
    assert "--prediction v or --prediction epsilon" in capsys.readouterr().err
    assert main(["mend", str(path), "--out", str(out), "--prediction", "v", "--zero-terminal-snr"]) == 0
    mended = load_model(out, components=())
    assert (mended.prediction_type, mended.schedule_config.zero_terminal_snr) == ("v_prediction", True)


def test_integer_weights_are_refused_by_the_loader(tiny_file: Path, tmp_path: Path) -> None:
    """The right size and the wrong kind: four bytes each, but whole numbers."""
    tensors = load_file(tiny_file)
    tensors[_LAST] = tensors[_LAST].to(torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="whole numbers"):
        load_model(tmp_path / "model.safetensors")


def test_a_name_that_is_no_utf8_is_as_good_as_any(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors takes UTF-8 alone, and the file was called damaged; stdout could not print its name."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/Tusche \xfc.safetensors"))
    try:
        shutil.copyfile(tiny_file, path)
    except OSError:
        pytest.skip("this file system takes no such name")
    out = path.with_name(f"copy of {path.name}")
    assert main(["inspect", str(path), "--weights"]) == 0
    assert r"Tusche \udcfc.safetensors" in capsys.readouterr().out
    assert main(["mend", str(path), "--title", path.stem, "--out", str(out)]) == 0
    expected = load_file(tiny_file)
    shutil.copyfile(out, tmp_path / "utf8.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(tmp_path / "utf8.safetensors").items())
    assert _header_of(out)[0]["__metadata__"]["modelspec.title"] == "Tusche ?"
    folder = path.with_name(f"{path.stem} folder")
    assert main(["export", str(path), "--folder", str(folder), "--dtype", "fp32"]) == 0
    assert main(["merge", str(path), str(folder), "--out", str(out), "--overwrite"]) == 0
    monkeypatch.setattr(tensor_file, "_OPEN_FILES", "/none")
    capsys.readouterr()
    assert main(["mend", str(path), "--out", str(out), "--overwrite"]) == 2
    assert capsys.readouterr().err.endswith("its name is not UTF-8, and cannot be opened here: rename it.\n")
