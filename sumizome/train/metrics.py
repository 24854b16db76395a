"""What a run tells: one JSON object a line in `metrics.jsonl`, the same numbers in TensorBoard; and its sample log.

After a resume the files hold each step once: lines beyond the checkpoint are cut before new ones are written. The
invariant: what cannot be written (a full disk) is told and lost, whole; it never ends a run, since one rank that raised
here would leave the others waiting.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from sumizome.distributed.runtime import Ranks
from sumizome.errors import SumizomeError
from sumizome.files import AppendedFile
from sumizome.train.task import Batch, Place, StepLoss
from sumizome.train.tensorboard_writer import TensorBoardWriter
from sumizome.train.wandb_writer import WandbWriter

__all__ = ["Metrics", "NoMetrics", "SampleLog", "Window", "read_metrics"]

_DECILES = 10

_T = TypeVar("_T")


class _Losses:
    """Tries to write, and remembers what could not be written: once for as long as it lasts, not at every record."""

    def __init__(self) -> None:
        self._lasting: set[str] = set()
        self._untold: list[str] = []

    def keep(self, what: str, write: Callable[[], _T]) -> _T | None:
        """What `write` returns, or None where it could not: for writing alone, in which no other rank has a part."""
        try:
            written = write()
        except (OSError, SumizomeError) as error:
            if what not in self._lasting:
                reason = getattr(error, "strerror", None) or str(error).rstrip(".")
                remedy = ": free some disk, or see to where it is written" if isinstance(error, OSError) else ""
                self._untold.append(f"{what} cannot be written ({reason}); training goes on without it{remedy}")
            self._lasting.add(what)
            return None
        self._lasting.discard(what)
        return written

    def take_complaints(self) -> list[str]:
        """What a user should be told since the last call."""
        taken, self._untold = self._untold, []
        return taken


class _Lines:
    """A file of whole JSON lines, opened by the first, and again by each one for as long as it cannot be opened."""

    def __init__(self, path: Path, prepare: Callable[[], None] = lambda: None) -> None:
        """`prepare` comes before the opening."""
        self._path, self._prepare = path, prepare
        self._file: AppendedFile | None = None

    def open(self) -> AppendedFile:
        """The file. Raises: OSError."""
        if self._file is None:
            self._prepare()
            self._file = AppendedFile(self._path)
        return self._file

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line. Raises: OSError, with nothing appended."""
        self.open().write((json.dumps(record) + "\n").encode())

    def close(self) -> None:
        """Closes the file. Raises: OSError."""
        if self._file is not None:
            self._file.close()


class NoMetrics:
    """What ranks other than the first write: nothing."""

    with_each: Mapping[str, Any] = MappingProxyType({})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Nothing."""

    def keep(self, what: str, write: Callable[[], _T]) -> _T | None:
        """Nothing."""
        return None

    def take_complaints(self) -> list[str]:
        """None."""
        return []

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Metrics:
    """Writes a run's numbers; `close` it, or use it as a context."""

    def __init__(
        self,
        run_dir: Path,
        steps_done: int,
        tensorboard: bool,
        begin_wandb: Callable[[], WandbWriter] | None = None,
    ) -> None:
        self.with_each: Mapping[str, Any] = {}
        """What stands in every record from now on, such as the stage."""
        self._losses = _Losses()
        self.keep, self.take_complaints = self._losses.keep, self._losses.take_complaints
        path = run_dir / "metrics.jsonl"
        self._lines = _Lines(path, lambda: _cut(path, steps_done))
        self.keep("metrics.jsonl", self._lines.open)
        self._wandb = None if begin_wandb is None else self.keep("wandb", begin_wandb)
        self._tensorboard = TensorBoardWriter(run_dir / "tensorboard", steps_done + 1) if tensorboard else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of a step. A nested mapping becomes one scalar a key in TensorBoard."""
        record, scalars = {"step": step, **self.with_each, **values}, dict(_scalars(values))
        self.keep("metrics.jsonl", lambda: self._lines.write(record))
        if (tensorboard := self._tensorboard) is not None:
            self.keep("tensorboard", lambda: tensorboard.write(step, scalars))
        if (wandb := self._wandb) is not None:
            self.keep("wandb", lambda: wandb.write(step, scalars))

    def write_image(self, step: int, name: str, image: Any) -> None:
        """Records a picture [H, W, 3] uint8 in TensorBoard."""
        if (tensorboard := self._tensorboard) is not None:
            self.keep("tensorboard", lambda: tensorboard.write_image(step, name, image))
        if (wandb := self._wandb) is not None:
            self.keep("wandb", lambda: wandb.write_image(step, name, image))

    def close(self) -> None:
        """Flushes and closes all."""
        self.keep("metrics.jsonl", self._lines.close)
        if self._wandb is not None:
            self.keep("wandb", self._wandb.close)
        if self._tensorboard is not None:
            self.keep("tensorboard", self._tensorboard.close)

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
        self._losses = _Losses()
        self.take_complaints = self._losses.take_complaints

        def prepare() -> bool:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("rank-*.jsonl"):
                _cut(path, steps_done)
            return True

        # Where lines beyond the checkpoint could not be cut, more of them would make steps twice.
        is_ready = ranks.first(lambda: self._losses.keep("samples", prepare))
        self._lines = _Lines(folder / f"rank-{ranks.rank:05d}.jsonl") if is_ready else None

    def write(self, place: Place, batch: Batch, told: Mapping[str, Any]) -> None:
        """One micro-batch, its step counted from 1; `told` is what its task says of it."""
        line = {"step": place.step + 1, "place": place.micro_batch, "samples": batch.sample_ids}
        line |= {"epochs": batch.epochs, "seeds": batch.seeds.tolist(), **told}
        if (lines := self._lines) is not None:
            self._losses.keep("samples", lambda: lines.write(line))

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._losses.keep("samples", self._lines.close)


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
