"""What a run tells: one JSON object a line in `metrics.jsonl`, the same numbers in TensorBoard; and its sample log.

After a resume the files hold each step once: lines beyond the checkpoint are cut before new ones are written.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sumizome.distributed.runtime import Ranks
from sumizome.train.task import Batch, Place, StepLoss
from sumizome.train.wandb_writer import WandbWriter

__all__ = ["Metrics", "NoMetrics", "SampleLog", "Window", "read_metrics"]

_DECILES = 10


class NoMetrics:
    """What ranks other than the first write: nothing."""

    with_each: Mapping[str, Any] = MappingProxyType({})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Nothing."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Metrics:
    """Writes a run's numbers; `close` it, or use it as a context."""

    def __init__(self, run_dir: Path, steps_done: int, tensorboard: bool, wandb: WandbWriter | None = None) -> None:
        self.with_each: Mapping[str, Any] = {}
        """What stands in every record from now on, such as the stage."""
        path = run_dir / "metrics.jsonl"
        _cut(path, steps_done)
        self._file = path.open("a", encoding="utf-8")
        self._wandb = wandb
        self._writer: Any = None
        if tensorboard:
            # A heavy import, and only here: a run without TensorBoard does not pay for it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps_done + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of a step. A nested mapping becomes one scalar a key in TensorBoard."""
        self._file.write(json.dumps({"step": step, **self.with_each, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in _scalars(values):
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, dict(_scalars(values)))

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Records a picture [H, W, 3] uint8 in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.write_image(step, name, image)

    def close(self) -> None:
        """Flushes and closes all."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SampleLog:
    """What this rank trained on, a line a micro-batch; the lines of all ranks together are the step's, in any number.

    `place` is the micro-batch's in its step.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, steps_done: int) -> None:
        folder = run_dir / "samples"
        if ranks.is_first:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("rank-*.jsonl"):
                _cut(path, steps_done)
        ranks.gather(None)
        self._file = (folder / f"rank-{ranks.rank:05d}.jsonl").open("a", encoding="utf-8")

    def write(self, place: Place, batch: Batch, told: Mapping[str, Any]) -> None:
        """One micro-batch, its step counted from 1; `told` is what its task says of it."""
        line = {"step": place.step + 1, "place": place.micro_batch, "samples": batch.sample_ids}
        line |= {"epochs": batch.epochs, "seeds": batch.seeds.tolist(), **told}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


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
    # A run that begins anew writes its record of step 0 again.
    kept = [record for record in read_metrics(path) if record["step"] <= steps_done and steps_done > 0]
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
    """The losses of this rank's steps since the last record, as sums that ranks can add."""

    def __init__(self, num_timesteps: int) -> None:
        self._num_timesteps = num_timesteps
        self.forget()

    def forget(self) -> None:
        """Starts a new window."""
        self._losses: list[StepLoss] = []
        self._categories: list[Collection[str]] = []
        self.grad_norm = self.lr = 0.0
        self.grad_norm_of: dict[str, float] = {}
        """By part, of the window's last step."""

    def add_step(self, losses: list[StepLoss], batches: list[Batch], grad_norm: float, lr: float) -> None:
        """One step's micro-batches; each sample counts for every tag category that it bears."""
        # Detached: a graph that a metric holds on to is a memory leak.
        self._losses += [loss.detached() for loss in losses]
        self._categories += [categories for batch in batches for categories in batch.tag_categories]
        self.grad_norm, self.lr = grad_norm, lr

    def summary(self, ranks: Ranks) -> dict[str, Any]:
        """The window's part of a record: means over all ranks' samples, by tenth of the schedule too. Collective."""
        unweighted = _joined(loss.unweighted for loss in self._losses)
        count, cut = len(unweighted), sum(loss.captions_cut for loss in self._losses)
        names = sorted(set().union(*(loss.parts for loss in self._losses)))
        parts = [_joined(loss.parts[name] for loss in self._losses if name in loss.parts) for name in names]
        weighted = _joined(loss.weighted for loss in self._losses)
        mine = [float(count), float(cut), *(float(values.sum()) for values in (unweighted, weighted, *parts))]
        samples, captions_cut, loss, weighted_loss, *of_parts = ranks.sums(mine)
        return {
            "loss": loss / samples,
            "weighted_loss": weighted_loss / samples,
            **({"loss_of": {n: p / samples for n, p in zip(names, of_parts, strict=True)}} if names else {}),
            **(self._by_timestep(unweighted, ranks) if self._num_timesteps else {}),
            "loss_by_category": self._by_category(unweighted, ranks),
            **({"captions_cut": int(captions_cut)} if self._num_timesteps else {}),
            "grad_norm": self.grad_norm,
            **({"grad_norm_of": self.grad_norm_of} if self.grad_norm_of else {}),
            "lr": self.lr,
        }

    def _by_timestep(self, unweighted: torch.Tensor, ranks: Ranks) -> dict[str, Any]:
        """The mean loss by tenth of the schedule, over all ranks. Collective."""
        timesteps = torch.cat([loss.timesteps for loss in self._losses if loss.timesteps is not None])
        deciles = timesteps * _DECILES // self._num_timesteps
        by_decile = torch.zeros(2, _DECILES, dtype=torch.float64)
        by_decile[0].index_add_(0, deciles, unweighted)
        by_decile[1].index_add_(0, deciles, torch.ones_like(unweighted))
        tenths = ranks.sums(by_decile.flatten().tolist())
        means = {
            f"{tenth * self._num_timesteps // _DECILES}": total / count
            for tenth, (total, count) in enumerate(zip(tenths[:_DECILES], tenths[_DECILES:], strict=True))
            if count
        }
        return {"loss_by_timestep": means}

    def _by_category(self, unweighted: torch.Tensor, ranks: Ranks) -> dict[str, float]:
        """The mean loss of the samples that bear a tag of each category, over all ranks. Collective."""
        mine: dict[str, tuple[float, int]] = {}
        for loss, categories in zip(unweighted.tolist(), self._categories, strict=True):
            for category in categories:
                total, count = mine.get(category, (0.0, 0))
                mine[category] = total + loss, count + 1
        gathered = ranks.gather(mine)
        names = sorted(set().union(*gathered))
        sums = {name: [each.get(name, (0.0, 0)) for each in gathered] for name in names}
        return {name: sum(t for t, _ in found) / sum(n for _, n in found) for name, found in sums.items()}


def _joined(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(values)).double().cpu()
