"""metrics.jsonl holds each step once, whatever was cut off or written twice."""

import json
from pathlib import Path

from sumizome.train.metrics import Metrics, read_metrics


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
