"""The header reader agrees with the safetensors library on good files, and names what is wrong with the others."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sumizome.errors import ModelError
from sumizome.models.tensor_header import MAX_HEADER_BYTES, read_header


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_a_good_file_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(12.0).reshape(3, 4), "v_pred": torch.tensor([]), "h": torch.ones(5).bfloat16()}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"k": "v"})
    header = read_header(tmp_path / "m.safetensors")
    assert header.metadata == {"k": "v"} and header.file_bytes == (tmp_path / "m.safetensors").stat().st_size
    assert {name: found.shape for name, found in header.tensors.items()} == {"b": (3, 4), "v_pred": (0,), "h": (5,)}
    raw = (tmp_path / "m.safetensors").read_bytes()[header.data_start :]
    place = header.tensors["b"]
    assert place.dtype == "F32" and raw[place.start : place.stop] == tensors["b"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "b overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "b leaves a hole"),
        ({"a": entry([2], 0, 8)}, 4, "cut off"),
        ({"a": entry([2], 0, 8)}, 12, "belong to no tensor"),
        ({"a": entry([2], 0, 8, "F16")}, 8, "wrong dtype or shape"),
        ({"a": entry([2], 0, 8, "F33")}, 8, "'F33'"),
        ({"a": entry([-2], 0, 8)}, 8, "malformed"),
        ({"a": entry([2**40, 2**40], 0, 8)}, 8, "wrong dtype or shape"),
        ({"a": {"dtype": "F32"}}, 0, "malformed"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4, "malformed"),
        ({"a\x1b[31m": entry([1], 0, 4)}, 4, "malformed"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4, "malformed"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "malformed"),
        ({"__metadata__": {"k": 1}}, 0, "__metadata__"),
        (b'{"a": 1, "a": 2}', 0, "twice"),
        (b"[1]", 0, "no JSON object"),
        (b"[" * 100_000, 0, "nested deeper"),
        (b"\xff\xfe", 0, "no safetensors file"),
    ],
)
def test_each_kind_of_damage_is_one_line(tmp_path: Path, header: Any, data: int, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read_header(write(tmp_path / "m.safetensors", header, bytes(data)))
    assert "m.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"abc", "cut off"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"PK\x03\x04 and more", "is a zip archive"),
        (b"\x80\x02}q\x00X and more", "is a pickled checkpoint under another name"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00 and more", "is a GGUF file"),
    ],
)
def test_what_is_no_safetensors_file_says_so(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_header(tmp_path / "m.safetensors")


def test_a_header_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(90_000_000)
    with pytest.raises(ModelError, match="10,000,001"):
        read_header(path)


def test_a_name_that_stands_twice_among_many_is_found_at_once(tmp_path: Path) -> None:
    """Comparing each name with each other one took two minutes for 30 000, and hours for a header of 10 MB."""
    names = [*range(30_000), 29_999]
    header = b"{" + b",".join(b'"%d":0' % name for name in names) + b"}"
    started = time.monotonic()
    with pytest.raises(ModelError, match="'29999' stands in it twice"):
        read_header(write(tmp_path / "m.safetensors", header, b""))
    assert time.monotonic() - started < 5


def test_a_pickle_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pickled"):
        read_header(tmp_path / "model.ckpt")


@given(st.integers(0, 400), st.integers(0, 255))
def test_whatever_byte_is_changed_it_reads_or_is_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    """And where it reads, the library reads the same shapes."""
    path = tmp_path_factory.mktemp("flip") / "m.safetensors"
    raw = json.dumps({"__metadata__": {"a": "b"}, "x": entry([2, 3], 0, 24), "y": entry([0], 24, 24)}).encode()
    content = bytearray(len(raw).to_bytes(8, "little") + raw + bytes(24))
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        shapes = {name: found.shape for name, found in read_header(path).tensors.items()}
    except ModelError:
        return
    try:
        with safe_open(path, "pt") as opened:
            assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == shapes  # noqa: SIM118
    except SafetensorError:
        pass  # the library may be stricter, in the characters of a JSON string for one
