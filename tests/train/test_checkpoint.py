"""Checkpoints: whole or not at all, every damage named, the previous one used, nothing unpickled."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sumizome.errors import CheckpointError
from sumizome.train import checkpoint as module
from sumizome.train.checkpoint import (
    PARTS,
    Checkpoint,
    SavedCheckpoint,
    latest_checkpoint,
    list_checkpoints,
    open_checkpoint,
    prune_checkpoints,
    remove_unfinished,
    verify_checkpoint,
    write_checkpoint,
)
from sumizome.train.ema import Ema, EmaConfig
from sumizome.train.optim import OptimConfig, OptimizerName, build_optimizer
from sumizome.train.state import _empty_moments, optimizer_tensors, restore


def made(step: int) -> Checkpoint:
    tensors = {"unet.a": torch.arange(6.0).reshape(2, 3) + step, "unet.b": torch.ones(4, dtype=torch.bfloat16)}
    return Checkpoint(
        step, tensors, {k: v.float() * 2 for k, v in tensors.items()}, {"unet.a/step": torch.tensor(step)}
    )


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    read = open_checkpoint(write_checkpoint(tmp_path, made(7)))
    assert read.step == 7
    for name in PARTS:
        written, found = getattr(made(7), name), read.read(name)
        assert written.keys() == found.keys()
        for key in written:
            torch.testing.assert_close(found[key], written[key], rtol=0, atol=0)
    assert not list(tmp_path.glob(".unfinished*"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


SHARD = "shard-00001-model-00001-of-00001.safetensors"
FILES = (f"weights/{SHARD}", f"ema/{SHARD}", f"optimizer/{SHARD}", "state.json", "manifest.json")


@pytest.mark.parametrize("damage", [truncate, flip, zero, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_named_and_the_previous_checkpoint_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    write_checkpoint(tmp_path, made(1))
    newest = write_checkpoint(tmp_path, made(2))
    damage(newest / name)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(newest)
    checkpoint, complaints = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert name in complaints[0]


def test_all_damaged_is_an_error_and_none_is_a_fresh_start(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") == (None, [])
    truncate(write_checkpoint(tmp_path, made(1)) / "ema" / SHARD)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        latest_checkpoint(tmp_path)


def test_a_save_that_fails_leaves_the_earlier_ones_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, made(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "flush_to_disk", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(tmp_path, made(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert open_checkpoint(tmp_path / "step-00000001").step == 1


def test_a_killed_save_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path, made(1))
    shutil.copytree(whole, tmp_path / ".unfinished-step-00000002-123")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_pruning_keeps_the_last_two_whatever_is_asked(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, made(step))
    prune_checkpoints(tmp_path, keep=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]


def test_a_file_that_nobody_vouches_for_is_not_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, made(1))
    shutil.copy(path / "weights" / SHARD, path / "weights" / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"shard-00002.*not in manifest"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "weights/../../x.safetensors", "weights/a.pkl"]
)
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, made(1))
    listed = json.loads((path / "manifest.json").read_text())["sha256"] | {name: "0" * 64}
    (path / "manifest.json").write_text(json.dumps({"sha256": listed}))
    with pytest.raises(CheckpointError, match="no checkpoint of this program"):
        open_checkpoint(path)


def test_pruning_counts_only_checkpoints_that_verify(tmp_path: Path) -> None:
    for step in range(1, 5):
        write_checkpoint(tmp_path, made(step))
    flip(tmp_path / "step-00000003" / "ema" / SHARD)
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003", "step-00000004"]
    verify_checkpoint(tmp_path / "step-00000002")


def test_large_states_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE_BYTES", 1000)
    tensors = {f"unet.{name}": torch.randn(100) for name in "abcdefg"}
    saved = open_checkpoint(write_checkpoint(tmp_path, Checkpoint(1, tensors, tensors, {})))
    assert len(list((saved.path / "weights").iterdir())) == 4  # 2800 bytes, two tensors a file
    assert all(torch.equal(saved.read("weights")[name], value) for name, value in tensors.items())
    assert saved.read("optimizer") == {}


def test_a_checkpoint_of_version_1_still_loads(tmp_path: Path) -> None:
    state, folder = made(5), tmp_path / "step-00000005"
    folder.mkdir()
    for part in PARTS:
        save_file(dict(getattr(state, part)), folder / f"{part}.safetensors")
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": 5, "facts": {"latents": "x"}}))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"sha256": digests}))
    saved, complaints = latest_checkpoint(tmp_path)
    assert saved is not None
    assert (saved.step, saved.facts, complaints) == (5, {"latents": "x"}, [])
    for part in PARTS:
        for name, value in getattr(state, part).items():
            assert torch.equal(saved.read(part)[name], value)
    flip(folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        open_checkpoint(folder)


def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def optimizer_for(layer: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def step(layer: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        layer(torch.full((1, 3), float(number))).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    optimizer = optimizer_for(layer)
    for number in range(3):
        step(layer, optimizer, number)
    parameters = {f"unet.{name}": p for name, p in layer.named_parameters()}
    average = Ema(EmaConfig(), parameters).average
    state = Checkpoint(3, parameters, average, optimizer_tensors(optimizer, parameters))
    saved = open_checkpoint(write_checkpoint(tmp_path, state))
    other_parameters = {f"unet.{name}": p for name, p in other.named_parameters()}
    resumed = optimizer_for(other)
    restore(saved, other_parameters, resumed, Ema(EmaConfig(), other_parameters))
    for number in range(3, 6):
        step(layer, optimizer, number)
        step(other, resumed, number)
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("name", "device"), [("adamw", "meta"), ("adafactor", "cpu")])
def test_steps_are_counted_where_the_optimizer_looks_for_them(name: OptimizerName, device: str) -> None:
    """Moments lie beside the weights; a count that an optimizer reads would make it wait for a GPU at each weight."""
    parameters = {"unet.w": nn.Parameter(torch.empty(4, 3, device="meta"))}
    optimizer = build_optimizer(OptimConfig(name=name), parameters)

    class Saved(SavedCheckpoint):
        def shapes(self, part: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
            shapes = {"step": (), "row_var": (4, 1), "exp_avg": (4, 3)}
            return {f"unet.w/{moment}": (torch.Size(shape), torch.float32) for moment, shape in shapes.items()}

    moments = _empty_moments(Saved(Path(), 1, {}), parameters, optimizer)
    assert {key: moment.device.type for key, moment in moments.items()} == {
        "unet.w/step": device,
        "unet.w/row_var": "meta",
        "unet.w/exp_avg": "meta",
    }
