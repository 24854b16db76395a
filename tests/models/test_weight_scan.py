"""The scan of every weight against torch's own idea of finite, in each floating dtype."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sumizome.errors import ModelError
from sumizome.models import weight_scan
from sumizome.models.tensor_header import read_header
from sumizome.models.weight_scan import WeightScan, scan_weights

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def scan(path: Path) -> WeightScan:
    return scan_weights([read_header(path)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_is_judged_as_torch_judges_it(tmp_path: Path, dtype: torch.dtype) -> None:
    small = dtype.itemsize < 4
    codes = torch.arange(2 ** (8 * dtype.itemsize)) if small else torch.randint(-(2**62), 2**62, (50_000,))
    integers = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensor = codes.to(integers).view(dtype)
    save_file({"all": tensor}, tmp_path / "m.safetensors")
    found = scan(tmp_path / "m.safetensors")
    wide = tensor.double()
    assert found.not_finite.get("all", 0) == int((~torch.isfinite(wide)).sum())
    largest = float(wide[torch.isfinite(wide)].abs().max())
    assert found.too_large == ({"all": largest} if largest >= 65520 else {})


def test_the_limit_of_float16_is_where_it_rounds_to_infinity(tmp_path: Path) -> None:
    numbers = {"under": torch.tensor([65519.0]), "over": torch.tensor([-65520.0])}
    assert [bool(torch.isfinite(t.half()).all()) for t in numbers.values()] == [True, False]
    save_file(numbers, tmp_path / "m.safetensors")
    assert list(scan(tmp_path / "m.safetensors").too_large) == ["over"]


def test_zeros_and_the_hash_are_found_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_scan, "_PIECE_BYTES", 64)
    path = tmp_path / "m.safetensors"
    late = torch.zeros(300)
    late[299] = float("nan")
    save_file({"dead": torch.zeros(20, 20), "late": late, "bias": torch.zeros(4), "mark": torch.tensor([])}, path)
    found = scan(path)
    assert found.all_zero == ("dead",) and found.not_finite == {"late": 1}
    data = path.read_bytes()[read_header(path).data_start :]
    assert found.data_sha256 == {path.name: hashlib.sha256(data).hexdigest()} and found.bytes_read == len(data)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(100)}, path)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"m\.safetensors ended"):
        scan_weights([header])


def test_networks_of_a_folder_that_share_names_are_told_apart(tmp_path: Path) -> None:
    """Both text encoders have the same names in files of the same name: the second one's findings hid the first's."""
    headers, networks = [], ("text_encoder", "text_encoder_2")
    for network, value in zip(networks, (float("nan"), float("inf")), strict=True):
        (tmp_path / network).mkdir()
        path = tmp_path / network / "model.safetensors"
        save_file({"final_layer_norm.weight": torch.tensor([value, 1.0])}, path)
        headers.append(read_header(path))
    found = weight_scan.scan_weights(headers)
    assert set(found.not_finite) == {f"{network}/final_layer_norm.weight" for network in networks}
    assert len(found.data_sha256) == 2
