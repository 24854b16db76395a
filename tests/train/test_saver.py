"""Saving in the background: what is written is the state at the call, failures surface, and training is told."""

import threading
from pathlib import Path

import pytest
import torch

from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError
from sumizome.train import saver as module
from sumizome.train.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from sumizome.train.saver import Saver


def state(step: int, weight: torch.Tensor) -> Checkpoint:
    return Checkpoint(step, {"unet.w": weight}, {"unet.w": weight}, {"unet.w/exp_avg": weight})


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, honest = threading.Event(), module.write_checkpoint

    def slow(directory: Path, checkpoint: Checkpoint, ranks: Ranks) -> Path:
        assert may_write.wait(60)
        return honest(directory, checkpoint, ranks)

    monkeypatch.setattr(module, "write_checkpoint", slow)
    saver, weight = Saver(tmp_path, Ranks(), keep=3), torch.ones(4)
    saver.save(state(1, weight))
    weight.fill_(2)  # training goes on while the thread has not begun
    assert list_checkpoints(tmp_path) == []
    may_write.set()
    saver.save(state(2, weight))
    saver.finish()
    assert saver.saved_step == 2
    found = [open_checkpoint(path).read("ema")["unet.w"] for path in list_checkpoints(tmp_path)]
    assert [float(tensor[0]) for tensor in found] == [1.0, 2.0]


def test_a_failed_save_is_reported_once_and_too_many_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = True

    def flush(_: Path) -> None:
        if full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sumizome.train.checkpoint.flush_to_disk", flush)
    saver, weight = Saver(tmp_path, Ranks(), keep=3), torch.ones(4)
    for step in (1, 2):
        saver.save(state(step, weight))
        assert "No space left on device" in str(saver.settle())
        assert saver.settle() is None
    full = False
    saver.save(state(3, weight))
    saver.finish()
    assert saver.complaints == []
    full = True
    for step in (4, 5):
        saver.save(state(step, weight))
    saver.save(state(6, weight))
    # The next save is what waited for them: nobody else has heard of it.
    assert ["step-00000004" in saver.complaints[0], "step-00000005" in saver.complaints[1]] == [True, True]
    with pytest.raises(CheckpointError, match="No space left"):
        saver.settle()  # the third in a row
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    saver.close()
