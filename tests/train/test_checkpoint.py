"""Checkpoints: whole or not at all, every damage named, the previous one used, nothing unpickled."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sumizome.errors import CheckpointError
from sumizome.train import checkpoint as module
from sumizome.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    read_checkpoint,
    remove_unfinished,
    write_checkpoint,
)


def made(step: int) -> Checkpoint:
    tensors = {"unet.a": torch.arange(6.0).reshape(2, 3) + step, "unet.b": torch.ones(4, dtype=torch.bfloat16)}
    return Checkpoint(
        step, tensors, {k: v.float() * 2 for k, v in tensors.items()}, {"unet.a/step": torch.tensor(step)}
    )


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, made(7))
    read = read_checkpoint(path)
    assert read.step == 7
    for name in ("weights", "ema", "optimizer"):
        written, found = getattr(made(7), name), getattr(read, name)
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


FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("damage", [truncate, flip, zero, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_named_and_the_previous_checkpoint_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    write_checkpoint(tmp_path, made(1))
    newest = write_checkpoint(tmp_path, made(2))
    damage(newest / name)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(newest)
    checkpoint, complaints = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert name in complaints[0]


def test_all_damaged_is_an_error_and_none_is_a_fresh_start(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") == (None, [])
    truncate(write_checkpoint(tmp_path, made(1)) / "ema.safetensors")
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
    assert read_checkpoint(tmp_path / "step-00000001").step == 1


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
    state = Checkpoint(3, parameters, {}, optimizer_tensors(optimizer, parameters))
    read = read_checkpoint(write_checkpoint(tmp_path, state))
    other_parameters = {f"unet.{name}": p for name, p in other.named_parameters()}
    for name, parameter in other_parameters.items():
        parameter.data.copy_(read.weights[name])
    resumed = optimizer_for(other)
    load_optimizer(resumed, other_parameters, read.optimizer)
    for number in range(3, 6):
        step(layer, optimizer, number)
        step(other, resumed, number)
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
