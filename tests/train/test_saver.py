"""Saving in the background: what is written is the state at the call, failures surface, and training is told."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError
from sumizome.train import saver as module
from sumizome.train.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from sumizome.train.mirror import CheckpointMirror
from sumizome.train.saver import Saver


def state(step: int, weight: torch.Tensor) -> Checkpoint:
    return Checkpoint(step, {"unet.w": weight}, {"unet.w": weight}, {"unet.w/exp_avg": weight})


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, honest = threading.Event(), module.write_checkpoint

    def slow(*arguments: Any) -> Path:
        assert may_write.wait(60)
        return honest(*arguments)

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


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_the_same_warning_whoever_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    def flush(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sumizome.train.checkpoint.flush_to_disk", flush)
    saver, weight = Saver(tmp_path, Ranks(), keep=3, asynchronous=asynchronous), torch.ones(4)
    for step in (1, 2, 3):
        saver.save(state(step, weight))
    assert [f"step-{step:08d}" in told for step, told in zip((1, 2), saver.complaints, strict=True)] == [True, True]
    with pytest.raises(CheckpointError, match="No space left"):
        saver.settle()  # the third in a row
    saver.close()


def test_who_waits_for_a_slow_save_gives_signs_of_life_while_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror takes file after file; between two there is nothing to be told, as when it hangs."""
    signs, when_nothing_moved = 0, -1

    def alive() -> None:
        nonlocal signs
        signs += 1

    class SlowMirror(CheckpointMirror):
        def put(self, checkpoint: Path, ranks: Ranks, file_is_done: Callable[[], None] = lambda: None) -> list[str]:
            nonlocal when_nothing_moved
            for _ in range(3):
                before, patience = signs, time.monotonic() + 60
                while signs == before and time.monotonic() < patience:
                    file_is_done()
                    time.sleep(0.01)
            time.sleep(0.2)
            before = signs
            time.sleep(0.2)
            when_nothing_moved = signs - before
            return []

    monkeypatch.setattr(module, "_WAIT", 0.01)
    saver = Saver(tmp_path, Ranks(), keep=3, mirror=SlowMirror(str(tmp_path / "there"), 3))
    saver.while_waiting = alive
    saver.save(state(1, torch.ones(4)))
    saver.finish()
    saver.close()
    assert signs >= 3
    assert when_nothing_moved == 0
