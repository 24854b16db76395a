"""Damaged and hostile files: every command that reads a model says what is wrong in one line and exits with 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sumizome.cli.main import main
from sumizome.errors import ModelError
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
    "nested header": (_deep, "header"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>" * 9), "less than its header says"),
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


def test_integer_weights_are_refused_by_the_loader(tiny_file: Path, tmp_path: Path) -> None:
    """The right size and the wrong kind: four bytes each, but whole numbers."""
    tensors = load_file(tiny_file)
    tensors[_LAST] = tensors[_LAST].to(torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="whole numbers"):
        load_model(tmp_path / "model.safetensors")
