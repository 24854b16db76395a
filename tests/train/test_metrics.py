"""metrics.jsonl holds each step once, whatever was cut off or written twice."""

import contextlib
import json
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sumizome.distributed.runtime import Ranks
from sumizome.errors import StoreError
from sumizome.train.metrics import Metrics, SampleLog, read_metrics
from sumizome.train.task import Place
from sumizome.train.wandb_writer import WandbWriter


def test_a_resume_cuts_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, tensorboard=False) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with Metrics(tmp_path, 2, tensorboard=False) as metrics:
        metrics.write(3, {"loss": 30})
    assert read_metrics(path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 30}]


def test_every_line_is_json_and_tensorboard_gets_the_nested_scalars(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, tensorboard=True) as metrics:
        metrics.write(1, {"loss": 0.5, "validation_loss": {"999": 0.25}, "note": "text"})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["validation_loss"] == {"999": 0.25}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("validation_loss/999")] == [0.25]
    assert "note" not in events.Tags()["scalars"]


@contextlib.contextmanager
def files_no_larger_than(count: int) -> Iterator[None]:
    """The operating system takes a file's first bytes and refuses the rest, as a disk does that fills up."""
    before, compiled = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    # Python takes the first bytes of a compiled module for the whole, and keeps them.
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = compiled
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_once_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(tmp_path, 0, tensorboard=False) as metrics:
        metrics.write(1, {"loss": 1})
        with files_no_larger_than(path.stat().st_size + 5):
            for step in (2, 3):
                metrics.write(step, {"loss": step})
            assert path.read_text() == '{"step": 1, "loss": 1}\n'
        (told,) = metrics.take_complaints()
        assert told.startswith("metrics.jsonl cannot be written (File too large); training goes on")
        metrics.write(4, {"loss": 4})
        assert metrics.take_complaints() == []
        with files_no_larger_than(10):
            metrics.write(5, {"loss": 5})
        assert len(metrics.take_complaints()) == 1  # full again
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]


def test_tensorboard_survives_a_full_disk_without_a_word_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Metrics(tmp_path, 0, tensorboard=True) as metrics:
        metrics.write(1, {"loss": 1.0})
        with files_no_larger_than(100):
            for step in range(2, 8):
                metrics.write_image(step, "previews", np.zeros((64, 64, 3), np.uint8))
                metrics.write(step, {"loss": 0.5})
            (told,) = [told for told in metrics.take_complaints() if told.startswith("tensorboard")]
        assert told.startswith("tensorboard cannot be written (File too large); training goes on")
        metrics.write(8, {"loss": 0.25})
        metrics.write(9, {"loss": 0.125})

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (8, 0.25), (9, 0.125)]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_tensorboard_forgets_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    for steps_done, value in ((0, 1.0), (2, 2.0)):
        with Metrics(tmp_path, steps_done, tensorboard=True) as metrics:
            for step in range(steps_done + 1, 5):
                metrics.write(step, {"loss": value})

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_logs_that_cannot_be_opened_end_no_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n')
    path.with_suffix(".jsonl.unfinished").mkdir()  # so that nothing can be cut
    (tmp_path / "samples").write_text("")
    (tmp_path / "tensorboard").write_text("")
    with Metrics(tmp_path, 1, tensorboard=True) as metrics:
        metrics.write(2, {"loss": 20})
        assert [told.split(" (")[0] for told in metrics.take_complaints()] == [
            "metrics.jsonl cannot be written",
            "tensorboard cannot be written",
        ]
        path.with_suffix(".jsonl.unfinished").rmdir()
        metrics.write(3, {"loss": 30})
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [(1, 1), (3, 30)]
    batch: Any = SimpleNamespace(
        sample_ids=["a"], epochs=[0], seeds=torch.zeros(1, dtype=torch.int64), tag_categories=[()]
    )
    log = SampleLog(tmp_path, Ranks(), 0)
    log.write(Place(0, 0, 1), batch, {})
    log.close()
    (told,) = log.take_complaints()
    assert told.startswith("samples cannot be written (File exists); training goes on without it")


class LostWandb(WandbWriter):
    def __init__(self) -> None:
        pass

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        raise StoreError("the service is gone")

    def close(self) -> None:
        self.write(0, {})


def test_wandb_that_fails_ends_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, False, LostWandb) as metrics:
        for step in (1, 2):
            metrics.write(step, {"loss": 1})
        (told,) = metrics.take_complaints()
    assert told.startswith("wandb cannot be written (the service is gone)")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_sample_log_on_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    batch: Any = SimpleNamespace(
        sample_ids=["a"], epochs=[0], seeds=torch.zeros(1, dtype=torch.int64), tag_categories=[()]
    )
    log = SampleLog(tmp_path, Ranks(), 0)
    with files_no_larger_than(10):
        for step in (0, 1):
            log.write(Place(step, 0, 1), batch, {})
    assert len(log.take_complaints()) == 1
    log.write(Place(2, 0, 1), batch, {})
    log.close()
    (line,) = (tmp_path / "samples/rank-00000.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3
