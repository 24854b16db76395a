"""The stages of a run, one behind the other: their own latents, batches, learning rates; one optimizer and average.

Which stage is on is a function of the step, so a stage needs no state: a run resumes inside any of them. Each stage
has a data order of its own, and its learning rate runs through warm-up and shape anew. Pictures held out for
validation are the first stage's for the whole run, and no later stage trains on them: one line of comparable losses.
Source: report §3, less to more curated data.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from sumizome.data.batch_plan import BatchPlan
from sumizome.data.loader import BatchLoader, Prepare, StepBatches, TrainBatch
from sumizome.errors import ConfigError

__all__ = ["Span", "Stage", "StagedBatches", "StagedLoader", "lay_out", "samples_before", "span_at"]


@dataclass(frozen=True)
class Stage:
    """One `[[stage]]` of the settings. What is left out is as the run has it."""

    array_of_tables: ClassVar[str] = "stage"

    steps: int = 0
    """Optimizer steps; the last stage may leave it out, and goes on to the run's `steps`."""
    name: str = ""
    """As metrics name it; by default its number from 1."""
    latents: str = ""
    """Its data, and with that its resolution: a folder of latent shards, or s3://bucket/prefix."""
    lr: float = 0.0
    """Peak learning rate of the U-Net in place of optim.lr; those of text encoders and parts keep their ratio to it."""
    micro_batch_size: int = 0
    """Samples in one forward pass."""
    micro_batches_per_step: int = 0
    """Forward passes a step."""

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "micro_batch_size", "micro_batches_per_step"):
            if getattr(self, name) < 0:
                raise ConfigError(f"stage.{name} is {getattr(self, name)}; it cannot be negative")
        if not math.isfinite(self.lr):
            raise ConfigError(f"stage.lr is {self.lr}; give a learning rate above 0, or leave it out")


@dataclass(frozen=True)
class Span:
    """A stage in its place: steps `first` … `last` − 1, with every value filled in."""

    number: int
    """From 0."""
    name: str
    first: int
    last: int
    latents: Path | str
    lr_factor: float
    """Its peak learning rates over the run's."""
    micro_batch_size: int
    micro_batches_per_step: int

    @property
    def images_per_step(self) -> int:
        return self.micro_batch_size * self.micro_batches_per_step


def lay_out(
    stages: Sequence[Stage],
    steps: int,
    *,
    latents: Path | str,
    lr: float,
    micro_batch_size: int,
    micro_batches_per_step: int,
) -> tuple[Span, ...]:
    """The stages of a run of `steps` steps, end to end; a run without any is one. The rest is what stages leave out.

    Raises: ConfigError if they do not end where the run does.
    """
    spans: list[Span] = []
    first = 0
    for number, stage in enumerate(stages or [Stage()]):
        is_last = number + 1 >= len(stages)
        if not stage.steps and not is_last:
            raise ConfigError(f"stage {number + 1} has no steps; only the last one may leave them out")
        last = first + stage.steps if stage.steps else steps
        if last <= first or (is_last and last != steps):
            raise ConfigError(
                f"the stages before the last take {first} steps and all {max(first, last)}, but steps is {steps}; set "
                "steps to their sum, or leave out the last one's"
            )
        spans.append(
            Span(
                number=number,
                name=stage.name or str(number + 1),
                first=first,
                last=last,
                latents=stage.latents or latents,
                lr_factor=stage.lr / lr if stage.lr else 1.0,
                micro_batch_size=stage.micro_batch_size or micro_batch_size,
                micro_batches_per_step=stage.micro_batches_per_step or micro_batches_per_step,
            )
        )
        first = last
    return tuple(spans)


def span_at(spans: Sequence[Span], step: int) -> Span:
    """The stage of a step, counted from 0; the last one goes on for ever."""
    return next((span for span in spans if step < span.last), spans[-1])


def samples_before(spans: Sequence[Span], step: int) -> int:
    """Samples that the first `step` steps train on."""
    return sum(max(0, min(step, span.last) - span.first) * span.images_per_step for span in spans)


@dataclass(frozen=True, eq=False)
class StagedLoader:
    """The loaders of a run's stages as one: what a `BatchLoader` answers, by the run's own step."""

    spans: Sequence[Span]
    loaders: Sequence[BatchLoader]

    @property
    def plan(self) -> BatchPlan:
        """The first stage's."""
        return self.loaders[0].plan

    @property
    def categories(self) -> Mapping[str, str]:
        """The first stage's."""
        return self.loaders[0].categories

    @property
    def validation_rows(self) -> Int[np.ndarray, " v"]:
        """Held out of every stage; rows of the first stage's latents."""
        return self.loaders[0].validation_rows

    @property
    def fingerprint(self) -> str:
        """The first stage's."""
        return self.loaders[0].fingerprint

    @property
    def fingerprints(self) -> list[str]:
        """Each stage's."""
        return [loader.fingerprint for loader in self.loaders]

    @property
    def orders(self) -> list[str]:
        """Each stage's."""
        return [loader.order for loader in self.loaders]

    def take_faults(self) -> list[str]:
        """What went wrong in reading, and was made good, since this was last asked; in words."""
        return [fault for loader in self.loaders for fault in loader.take_faults()]

    def step(self, step: int) -> list[TrainBatch]:
        """This process's micro-batches of one step, counted from 0."""
        span = span_at(self.spans, step)
        return self.loaders[span.number].step(step - span.first)

    def from_step(self, step: int, prepare: Prepare | None = None) -> "StagedBatches":
        """As a `BatchLoader`'s."""
        return StagedBatches(self, step, prepare)

    def validation_batches(self, micro_batch_size: int) -> Iterator[TrainBatch]:
        """As a `BatchLoader`'s: the first stage's."""
        return self.loaders[0].validation_batches(micro_batch_size)


class StagedBatches:
    """The micro-batches of a step and of all that follow, through the stages."""

    def __init__(self, loader: StagedLoader, step: int, prepare: Prepare | None) -> None:
        self._loader, self._step, self._prepare = loader, step, prepare
        self._span = span_at(loader.spans, step)
        self._batches = self._open()

    def _open(self) -> StepBatches:
        first, prepare = self._span.first, self._prepare
        of_run = prepare and (lambda step, batches: prepare(first + step, batches))
        last = self._span.last - first  # what lies behind it would be made of this stage's pictures, in vain
        return self._loader.loaders[self._span.number].from_step(self._step - first, of_run, until=last)

    def __iter__(self) -> "StagedBatches":
        return self

    def __next__(self) -> list[Any]:
        span = span_at(self._loader.spans, self._step)
        if span is not self._span:
            self._batches.close()
            self._span = span
            self._batches = self._open()
        batches = next(self._batches)
        self._step += 1
        return batches

    def make_ahead(self) -> None:
        """As those of a `BatchLoader`."""
        self._batches.make_ahead()

    def close(self) -> None:
        """Stops what reads ahead."""
        self._batches.close()

    def __enter__(self) -> "StagedBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
