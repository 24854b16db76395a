"""What a run tells: one JSON object a line in `metrics.jsonl`, the same numbers in TensorBoard.

After a resume the file holds each step once: lines beyond the checkpoint are cut before new ones are written.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sumizome.train.step import StepLoss

__all__ = ["Metrics", "Window", "read_metrics"]

_DECILES = 10


class Metrics:
    """Writes a run's numbers; `close` it, or use it as a context."""

    def __init__(self, run_dir: Path, steps_done: int, tensorboard: bool) -> None:
        path = run_dir / "metrics.jsonl"
        _cut(path, steps_done)
        self._file = path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            # A heavy import, and only here: a run without TensorBoard does not pay for it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps_done + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of a step. A nested mapping becomes one scalar a key in TensorBoard."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in _scalars(values):
                self._writer.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Records a picture [H, W, 3] uint8 in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a `metrics.jsonl`; a line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _cut(path: Path, steps_done: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= steps_done]
    if path.exists():
        unfinished = path.with_suffix(".jsonl.unfinished")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        unfinished.replace(path)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


class Window:
    """What the steps since the last record did."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = self.waited = 0.0
        self.grad_norm = self.lr = 0.0
        self.losses: list[StepLoss] = []

    def add_step(self, losses: list[StepLoss], grad_norm: float, lr: float) -> None:
        self.steps += 1
        # Detached: a graph that a metric holds on to is a memory leak.
        self.losses += [replace(l, weighted=l.weighted.detach(), unweighted=l.unweighted.detach()) for l in losses]
        self.grad_norm, self.lr = grad_norm, lr

    def add_time(self, seconds: float, waited: float) -> None:
        self.seconds += seconds
        self.waited += waited

    def summary(self, images_per_step: int, num_timesteps: int) -> dict[str, Any]:
        """The record of metrics.jsonl: means over the window, and the unweighted loss by tenth of the schedule."""
        unweighted = torch.cat([loss.unweighted for loss in self.losses]).cpu()
        timesteps = torch.cat([loss.timesteps for loss in self.losses])
        deciles = timesteps * _DECILES // num_timesteps
        by_timestep = {
            f"{int(d) * num_timesteps // _DECILES}": float(unweighted[deciles == d].mean()) for d in deciles.unique()
        }
        return {
            "loss": float(unweighted.mean()),
            "weighted_loss": float(torch.cat([loss.weighted for loss in self.losses]).mean()),
            "loss_by_timestep": by_timestep,
            "captions_cut": sum(loss.captions_cut for loss in self.losses),
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "images_per_second": self.steps * images_per_step / self.seconds if self.seconds else 0.0,
            "data_wait": self.waited / self.seconds if self.seconds else 0.0,
        }
