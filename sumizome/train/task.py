"""What a run learns, as the loop sees it: the one seam between training and its subject.

The loop knows batches, gradients, ranks and checkpoints; a `Task` knows what the numbers mean. There are two: noised
latents and a U-Net (`denoising`), pictures and a VAE's decoder (`sumizome.vae.decoding`). The invariant: what a task
draws and computes is a function of the batch, its seeds and its `Place`, so that a task has no state of its own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from sumizome.data.loader import Prepare
from sumizome.distributed.parallelize import ParallelConfig
from sumizome.shapes import PerSample, Timesteps
from sumizome.train.config import CheckpointConfig
from sumizome.train.ema import EmaConfig
from sumizome.train.optim import OptimConfig
from sumizome.train.stages import Span

__all__ = ["Batch", "Batches", "Place", "PlacedBatch", "RunSettings", "StepLoss", "Task"]


@dataclass(frozen=True)
class Place:
    """Where a micro-batch stands in its run."""

    step: int
    """Counted from 0."""
    micro_batch: int
    """Its place in the step, over all ranks."""
    micro_batches: int
    """How many the step has."""


@dataclass(frozen=True)
class PlacedBatch:
    """A micro-batch where it stands, and what its task drew for it."""

    place: Place
    batch: Any
    drawn: Any


@dataclass(frozen=True)
class StepLoss:
    """The loss of each sample of a micro-batch, and where on the schedule it was taken."""

    weighted: PerSample
    """What is minimised."""
    unweighted: PerSample
    """The plain mean squared error, comparable between runs of different weights."""
    timesteps: Timesteps | None = None
    """On the CPU. None where nothing is noised."""
    captions_cut: int = 0
    """Captions whose end did not fit into the chunks."""
    canvas: tuple[int, int] = (0, 0)
    """(height, width) px of the batch; (0, 0) where nobody asks."""
    tokens: int = 0
    """Rows of the text condition."""
    parts: Mapping[str, PerSample] = field(default_factory=dict)
    """What `weighted` is the sum of, before its weights, where it is a sum; for the record."""

    def detached(self) -> "StepLoss":
        """The same numbers without the graph that they came from."""
        parts = {name: part.detach() for name, part in self.parts.items()}
        return replace(self, weighted=self.weighted.detach(), unweighted=self.unweighted.detach(), parts=parts)


@runtime_checkable
class Batch(Protocol):
    """What the loop itself asks of a micro-batch."""

    sample_ids: list[str]
    epochs: list[int]
    seeds: Int[Tensor, " b"]
    tag_categories: list[Collection[str]]


@runtime_checkable
class Batches(Protocol):
    """What the loop asks of a run's data.

    `from_step` is an iterator of what `prepare` makes of each step's micro-batches, and a context; its `make_ahead`
    says when those of later steps may be made.
    """

    def from_step(self, step: int, prepare: Prepare | None = None) -> Any: ...

    def take_faults(self) -> list[str]: ...


@runtime_checkable
class Task(Protocol):
    """What a run learns."""

    @property
    def num_timesteps(self) -> int:
        """Of the noise schedule; 0 where nothing is noised."""

    @property
    def clipped_apart(self) -> Sequence[str]:
        """Networks, by the beginning of their parameters' names, whose gradients have a norm of their own."""

    def draw(self, batch: Any, place: Place) -> Any:
        """What a micro-batch needs beside itself: its timesteps, or how far a warm-up is. A thread may ask ahead."""

    def loss(self, batch: Any, drawn: Any) -> StepLoss:
        """The loss of each sample; gradients flow to whatever requires them."""

    def log_line(self, batch: Any, drawn: Any) -> Mapping[str, Any]:
        """What was shown, for the sample log."""


@runtime_checkable
class RunSettings(Protocol):
    """The settings that the loop itself reads; each task's own config, a frozen dataclass, has them, among others."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def run_dir(self) -> Path: ...
    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def tensorboard(self) -> bool: ...
    @property
    def wandb(self) -> str: ...
    @property
    def log_samples(self) -> bool: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def ema(self) -> EmaConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    def spans(self) -> tuple[Span, ...]: ...
