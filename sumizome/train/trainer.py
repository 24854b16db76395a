"""The training loop: batch, loss, gradient, step, average; and around it checkpoints and whatever watches.

`Trainer.steps` trains and yields a report a step, so that the progress bar, and the decision to stop, belong to the
caller. Every rank runs this same loop; `build.build_trainer` makes what it needs. Every random number is a function of
the run's seed and of what it is for (epoch and sample, or step and position), so weights, optimizer, average and step
are the whole state. The invariant: ranks branch alike, on sums that all of them have.
"""

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from sumizome.data.batch_plan import share
from sumizome.distributed.parallelize import Parallel
from sumizome.distributed.runtime import Ranks
from sumizome.distributed.watchdog import Watchdog
from sumizome.errors import NonFiniteError
from sumizome.settings import as_mapping
from sumizome.train.checkpoint import Checkpoint
from sumizome.train.efficiency import Efficiency, memory_in_use
from sumizome.train.ema import Ema
from sumizome.train.fused_backward import FusedBackward
from sumizome.train.gradient_norms import GradientNorms, global_norm
from sumizome.train.lookout import LookEnded, Lookout
from sumizome.train.metrics import Metrics, NoMetrics, SampleLog, Window
from sumizome.train.observers import Observer
from sumizome.train.optim import apply_lr, lr_factor
from sumizome.train.pace import Pace, slow_ranks
from sumizome.train.precision import Precision
from sumizome.train.saver import Saver
from sumizome.train.stages import samples_before, span_at
from sumizome.train.state import optimizer_tensors
from sumizome.train.task import Batch, Batches, Place, PlacedBatch, RunSettings, StepLoss, Task
from sumizome.train.wandb_writer import WandbWriter, check_wandb

__all__ = ["Asked", "StepReport", "Trainer"]

_CLIP_EPS = 1e-6
"""What torch adds to a norm before it divides by it."""


@dataclass(frozen=True)
class StepReport:
    """What one step did, for whoever watches."""

    steps_done: int
    epoch: int
    loss: float
    """Unweighted mean squared error of the step."""
    images_per_second: float
    notes: tuple[str, ...] = ()
    """Events in plain words: a checkpoint, a validation."""


@dataclass
class Asked:
    """What is wanted of the run: a signal's handler sets it on one rank, and at the next step all ranks hear of it."""

    stop: bool = False
    save: bool = False


# Covariant: what a trainer was built with is never assigned anew.
_Settings = TypeVar("_Settings", bound=RunSettings, covariant=True)
_Task = TypeVar("_Task", bound=Task, covariant=True)
_Batches = TypeVar("_Batches", bound=Batches, covariant=True)


@dataclass
class Trainer(Generic[_Settings, _Task, _Batches]):
    """A run in progress: `parameters`, `optimizer`, `ema`, `steps_done` are its state; the rest is how.

    The loop knows settings, task and batches as `task` describes them; whoever built it knows them as what they are.
    """

    config: _Settings
    task: _Task
    loader: _Batches
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | FusedBackward
    ema: Ema
    saver: Saver
    facts: dict[str, Any]
    ranks: Ranks = field(default_factory=Ranks)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=lambda: Precision("cpu", torch.float32))
    observers: Sequence[Observer] = ()
    efficiency: Efficiency | None = None
    """None: FLOP are not counted."""
    steps_done: int = 0
    asked: Asked = field(default_factory=Asked)
    complaints: list[str] = field(default_factory=list)
    """What could not be written after the last step's report, for the user."""

    def __post_init__(self) -> None:
        self.device = self.ranks.device
        self._spans = self.config.spans()
        self._stage = span_at(self._spans, self.steps_done)
        self._window = Window(self.task.num_timesteps)
        self._gradient_norms = GradientNorms(self.parameters)
        self._clipped: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            self._clipped.setdefault(_network_apart(name, self.task.clipped_apart), []).append(parameter)
        self._pace = Pace(self.device)
        self._watchdog = Watchdog(self.ranks, self.config.parallel.hang_timeout)
        self.saver.while_waiting = lambda: self._watchdog.at(self.steps_done, "waiting for the checkpoint")
        self._sample_log: SampleLog | None = None
        self._agreed = Asked()
        self._save_failed = False
        self._reserved = False

    def steps(self) -> Generator[StepReport, None, None]:
        """Trains up to `config.steps`, yielding after each step; close the generator, or ask it, to stop after a step.

        The last finished step is in a checkpoint when it ends, is closed, or meets a number that is not finite.
        Raises: NonFiniteError when a loss or gradient is not finite; the weights are those of the step before.
            CheckpointError when the last state could not be saved, or saving failed again and again.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.saver.close)
            metrics = stack.enter_context(self._metrics())
            stack.enter_context(self._watchdog)
            self._batches = stack.enter_context(self.loader.from_step(self.steps_done, self._placed))
            try:
                self._enter_stage(metrics)
                if not self.steps_done:
                    self._look(metrics, [observer for observer in self.observers if observer.before_training])
                while self.steps_done < self.config.steps and not self._agreed.stop:
                    yield self._one_step(metrics)
            except (GeneratorExit, NonFiniteError) as stopped:
                # The weights are those of the last finished step, unless they moved within the one that failed.
                if not (self._moves_in_backward and isinstance(stopped, NonFiniteError)):
                    self._save_for_good()
                raise
            self._save_for_good()

    def _placed(self, step: int, batches: list[Batch]) -> list[PlacedBatch]:
        """A step's micro-batches with what the task draws for them, made ahead as they are."""
        count = span_at(self._spans, step).micro_batches_per_step
        places = [Place(step, place, count) for place in share(count, self.ranks.rank, self.ranks.world)]
        return [
            PlacedBatch(place, batch, self.task.draw(batch, place))
            for place, batch in zip(places, batches, strict=True)
        ]

    def _one_step(self, metrics: Any) -> StepReport:
        self._pace.begin()
        self._watchdog.at(self.steps_done + 1, "waiting for data")
        batches: list[PlacedBatch] = next(self._batches)
        self._pace.data_is_there()
        self._enter_stage(metrics)
        loss = self._train_step(batches)
        self._watchdog.step_is_done()
        seconds = self._pace.end()
        notes = self._after_step(metrics)
        epoch = max(max(placed.batch.epochs) for placed in batches)
        return StepReport(self.steps_done, epoch, loss, self._images_per_step / seconds, notes)

    def _enter_stage(self, metrics: Any) -> None:
        self._stage = span_at(self._spans, self.steps_done)
        if len(self._spans) > 1:
            metrics.with_each = {"stage": self._stage.name}

    def _train_step(self, placed: list[PlacedBatch]) -> float:
        """One optimizer step on the step's micro-batches; returns the unweighted loss over all ranks.

        A micro-batch is the mean over its samples, the step the mean over the micro-batches of all ranks.
        Raises: NonFiniteError, with nothing changed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        # Before the backward pass, in which a fused optimizer steps.
        stage = self._stage
        shape = lr_factor(self.config.optim, self.steps_done - stage.first, stage.last - stage.first)
        lr = apply_lr(self.optimizer, stage.lr_factor * shape)
        losses = [self._backward(one, of=len(placed), last=one is placed[-1]) for one in placed]
        batches = [one.batch for one in placed]
        grad_norm = self._clip()
        mean_loss = self._agree(losses, grad_norm, batches)
        self._watchdog.at(self.steps_done + 1, "updating the weights")
        self.optimizer.step()
        self.steps_done += 1
        self.ema.update(self.steps_done)
        self._window.add_step(losses, batches, float(grad_norm), lr)
        if self.efficiency is not None:
            self.efficiency.add_step(losses)
        return mean_loss

    def _backward(self, placed: PlacedBatch, *, of: int, last: bool) -> StepLoss:
        """Adds the gradients of one `of` this rank's micro-batches; after the last they are the mean over all ranks."""
        self._watchdog.at(self.steps_done + 1, "in forward and backward")
        batch, drawn = placed.batch, placed.drawn
        if self._sample_log is not None:
            self._sample_log.write(placed.place, batch, self.task.log_line(batch, drawn))
        with self.parallel.accumulating(last):
            if self.parallel.lockstep:
                self._pace.meets_others()
            with self.precision.autocast():
                loss = self.parallel.forward(self.task.loss, batch, drawn)
            if last:
                self._pace.meets_others()
            # Gradients need little Python (hooks and what is computed again apart); threads that make batches need it.
            self._batches.make_ahead()
            # DDP and FSDP2 take the mean over ranks, so that each divides by its own share.
            (loss.weighted.mean() / of).backward()
        return loss

    @property
    def _images_per_step(self) -> int:
        return self._stage.images_per_step

    def _clip(self) -> Tensor:
        """Scales the gradients down to the largest norm allowed; returns the norm that they had, all together."""
        if isinstance(self.optimizer, FusedBackward):
            return self.optimizer.grad_norm()
        norms = self._gradient_norms()
        if _due(self.steps_done + 1, self.config.log_every, self._stage.last):
            self._window.grad_norm_of = {part: float(norm) for part, norm in norms.items()}
        total, apart = global_norm(norms), self.task.clipped_apart
        for network, parameters in self._clipped.items():
            own = {part: norm for part, norm in norms.items() if _network_apart(part, apart) == network}
            if own:
                self._clip_together(parameters, global_norm(own) if apart else total)
        return total

    def _clip_together(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> None:
        limit = self.config.optim.max_grad_norm or math.inf
        # Below the limit all gradients would be multiplied by exactly 1. `_agree` reads the norm in any case.
        if float(norm) + _CLIP_EPS >= limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def _agree(self, losses: list[StepLoss], grad_norm: Tensor, batches: list[Batch]) -> float:
        """The step's one word between all ranks: the loss of all, and who met or was asked what.

        Raises: NonFiniteError on every rank, naming the samples of whichever rank met it.
        """
        self._watchdog.at(self.steps_done + 1, "waiting for the other ranks")
        weighted = torch.stack([loss.weighted.detach().isfinite().all() for loss in losses]).all()
        finite = bool(weighted) and math.isfinite(float(grad_norm))
        unweighted = float(torch.cat([loss.unweighted for loss in losses]).detach().mean())
        mine = [not finite, self.asked.stop, self.asked.save, self.saver.failed, unweighted if finite else 0.0]
        bad, stop, save, failed, loss_of_all = self.ranks.sums([float(word) for word in mine])
        if bad:
            self._refuse(losses, batches)
        self._agreed, self._save_failed = Asked(stop=stop > 0, save=save > 0), failed > 0
        if mine[2]:  # else a signal that came since it was read would be lost
            self.asked.save = False
        return loss_of_all / self.ranks.world

    def _refuse(self, losses: list[StepLoss], batches: list[Batch]) -> None:
        """Raises: NonFiniteError with the samples at fault, or all of the step's where only a gradient is."""
        mine = [
            sample
            for loss, batch in zip(losses, batches, strict=True)
            for sample, value in zip(batch.sample_ids, loss.weighted.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        trained_on = [sample for batch in batches for sample in batch.sample_ids]
        gathered = self.ranks.gather((mine, trained_on))
        at_fault = [sample for bad, _ in gathered for sample in bad]
        what = "loss" if at_fault else "gradient"
        samples = at_fault or [sample for _, all_of_rank in gathered for sample in all_of_rank]
        where = [str(rank) for rank, (bad, _) in enumerate(gathered) if bad]
        on_rank = f" (rank {', '.join(where)})" if self.ranks.world > 1 and where else ""
        self.optimizer.zero_grad(set_to_none=True)
        state = (
            "The weights of the step before are saved." if self.steps_done else "No step was done, nothing is saved."
        )
        if self._moves_in_backward:
            state = (
                "With optim.fused_backward other weights have moved already, so the last checkpoint is what there is."
            )
        raise NonFiniteError(
            f"step {self.steps_done + 1}: the {what} is not finite, in samples {', '.join(samples)}{on_rank}. {state} "
            "Look at these images; to go on with other settings, such as a lower optim.lr, export the run and train "
            "the export in a new run_dir"
        )

    @property
    def _moves_in_backward(self) -> bool:
        return isinstance(self.optimizer, FusedBackward)

    def _after_step(self, metrics: Any) -> tuple[str, ...]:
        """Whatever is due after a step; returns what was done, in words."""
        step, config = self.steps_done, self.config
        self._watchdog.at(step, "saving")
        # First of all: a checkpoint that is due must neither wait for what follows nor be lost to its failure.
        notes = self._save_if_due()
        # A record never holds steps of two stages.
        if _due(step, config.log_every, self._stage.last):
            notes += self._log(metrics)
        due = [observer for observer in self.observers if _due(step, observer.every, config.steps)]
        notes += self._look(metrics, due)
        return tuple(notes + metrics.take_complaints())

    def _look(self, metrics: Any, observers: Sequence[Observer]) -> list[str]:
        """Lets the observers look, for as long as no rank is asked to stop."""
        notes = []
        for observer in observers:
            if not self._agreed.stop:
                note = self._look_once(metrics, observer)
                notes += [note] if note else []
                if note is not None or not self._agreed.stop:
                    continue
            notes.append(f"asked to stop, so there is no {observer.name}")
        return notes

    def _look_once(self, metrics: Any, observer: Observer) -> str | None:
        """What one observer says; None, and a stop that all ranks know of, where one was asked for meanwhile."""

        def alive() -> None:
            self._watchdog.at(self.steps_done, observer.name)

        alive()
        lookout = Lookout(self.ranks, lambda: self.asked.stop, alive)
        note, ended = None, False
        try:
            with self.ema.applied():
                note = observer.look(self.steps_done, metrics, lookout)
        except LookEnded:
            ended = True
        # Some ranks may have been through before the stop, or had no part in the look.
        stop, unfinished = self.ranks.sums([float(self.asked.stop), float(ended)])
        if stop:
            self._agreed = replace(self._agreed, stop=True)
        return None if unfinished else note

    def _save_if_due(self) -> list[str]:
        notes, self.saver.complaints = self.saver.complaints, []
        if self._save_failed:
            problem = self.saver.settle()
            notes += [f"{problem}; training goes on, the next save is due as before"] if problem else []
        asked = self._agreed.save or self._agreed.stop
        if asked or _due(self.steps_done, self.config.checkpoint.every, self.config.steps):
            self.saver.save(self.state())
            notes.append("checkpoint")
        elif self.config.checkpoint.every and not self._reserved:
            self.saver.reserve(self.state())
        self._reserved = True
        return notes

    def _log(self, metrics: Any) -> list[str]:
        lost = self._sample_log.take_complaints() if self._sample_log is not None else []
        gathered = self.ranks.gather((self._pace.mean(), lost))
        paces = [pace for pace, _ in gathered]
        step_seconds = paces[0].step
        record = self._window.summary(self.ranks)
        if self.efficiency is not None:
            record |= self.efficiency.summary(self.ranks, step_seconds * self._pace.steps)
        record |= memory_in_use(self.device, self.ranks)
        record |= {
            "images_per_second": self._images_per_step / step_seconds if step_seconds else 0.0,
            "data_wait": max(pace.data_wait for pace in paces) / step_seconds if step_seconds else 0.0,
            "checkpoint_stall": self.saver.stall,
            "samples_seen": samples_before(self._spans, self.steps_done),
        }
        slow = slow_ranks(paces)
        metrics.write(self.steps_done, {**record, "slow_ranks": slow} if slow else record)
        self._window.forget()
        if self.efficiency is not None:
            self.efficiency.forget()
        self._pace.forget()
        notes = [f"rank {s['rank']} holds up the others: {s['share']:.0%} of each step is spent waiting" for s in slow]
        notes += sorted({complaint for _, of_rank in gathered for complaint in of_rank})
        return notes + _in_short(self.loader.take_faults())

    def state(self) -> Checkpoint:
        """The state after the last finished step: the very tensors that training goes on to change."""
        return Checkpoint(
            step=self.steps_done,
            weights=self.parameters,
            ema=self.ema.average,
            optimizer=optimizer_tensors(self.optimizer, self.parameters),
            facts=self.facts,
        )

    def _save_for_good(self) -> None:
        """The last finished step is on disk when this returns."""
        self.saver.settle()
        if self.steps_done and self.saver.saved_step != self.steps_done:
            self.saver.save(self.state())
            self.saver.finish()

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[Any]:
        config = self.config
        with contextlib.ExitStack() as stack:
            if config.log_samples:
                self._sample_log = SampleLog(config.run_dir, self.ranks, self.steps_done)
                stack.callback(self._sample_log.close)
            opened: list[Metrics] = []
            self.ranks.first(lambda: opened.append(_build_metrics(config, self.steps_done)))
            metrics = opened[0] if opened else NoMetrics()
            stack.callback(lambda: self.complaints.extend(metrics.take_complaints()))  # what closing met, too
            yield stack.enter_context(metrics)


_SHOWN = 5


def _in_short(notes: list[str]) -> list[str]:
    """The first of many notes, and how many more there are."""
    more = len(notes) - _SHOWN
    return notes if more <= 0 else [*notes[:_SHOWN], f"and {more:,} more of that kind"]


def _build_metrics(config: RunSettings, steps_done: int) -> Metrics:
    """Raises: ConfigError if wandb is wanted and not installed; what else it may want is told, as all that observes."""
    if not config.wandb:
        return Metrics(config.run_dir, steps_done, config.tensorboard)
    check_wandb(config.wandb)
    begin = partial(WandbWriter, config.run_dir, config.wandb, as_mapping(config))
    return Metrics(config.run_dir, steps_done, config.tensorboard, begin)


def _network_apart(name: str, apart: Sequence[str]) -> str:
    """Which of the networks that are clipped on their own a parameter or a part is of; "" for all others."""
    return next((network for network in apart if name.startswith(network)), "")


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
