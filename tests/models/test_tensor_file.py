"""Damaged and hostile files: each is one ModelError that names the file, and none is executed."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sumizome.errors import ModelError
from sumizome.models.tensor_file import open_tensor_file


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([])}, path, metadata={"k": "v"})
    return path


def test_an_intact_file_is_read(intact: Path) -> None:
    file = open_tensor_file(intact)
    assert file.shapes == {"a": (3, 4), "b": (0,)} and file.metadata == {"k": "v"}
    assert torch.equal(file.read("a"), torch.arange(12.0).reshape(3, 4))


def _header(content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        _header(b"{", 2**63),
        _header(b"{" * 100),
        _header(b"[" * 100_000),
        _header(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode()) + b"1234",
        _header(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}).encode()) + b"1234",
        _header(json.dumps({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}).encode()) + b"1234",
        _header(b"\xff\xfe\x00 not json"),
        b"<!DOCTYPE html><html>404 Not Found</html>",
    ],
)
def test_damaged_headers_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        open_tensor_file(path)
    assert "\n" not in str(caught.value)


def test_a_header_bomb_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(_header(b"", 90_000_000))
        file.truncate(90_000_100)  # sparse: the size is right, so only the cap stands in the way
    with pytest.raises(ModelError, match="90,000,000"):
        open_tensor_file(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_every_truncation_is_found(intact: Path, keep: float) -> None:
    os.truncate(intact, int(intact.stat().st_size * keep))
    with pytest.raises(ModelError, match="again"):
        open_tensor_file(intact)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        open_tensor_file(tmp_path / "nowhere.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        open_tensor_file(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"fine": torch.ones(2), "unet.bad": torch.tensor([1.0, value])}, path)
    with pytest.raises(ModelError, match=r"unet\.bad"):
        open_tensor_file(path).read("unet.bad")


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(_Canary(tmp_path / "executed")))
    with pytest.raises(ModelError):
        open_tensor_file(path)
    assert not (tmp_path / "executed").exists()
