"""Train a model, or go on training: on a run directory that holds checkpoints the same command resumes.

    sumizome train run.toml
    sumizome train run.toml --steps 20000 --optim.lr 2e-5

Ctrl-C or SIGTERM finishes the step, writes a checkpoint and stops.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from sumizome.train.config import TrainConfig as Command

if TYPE_CHECKING:
    from sumizome.train.trainer import StepReport, Trainer

__all__ = ["Command", "run"]

_LINES = 20
"""Progress lines of a whole run where there is no terminal to draw a bar on."""


def run(command: Command) -> None:
    """Trains, showing progress; what the run writes is described in `sumizome.train.run_dir`."""
    from sumizome.train.run_dir import hold_run_dir
    from sumizome.train.trainer import build_trainer

    with hold_run_dir(command.run_dir):
        trainer, warnings = build_trainer(command)
        for warning in warnings:
            print(f"sumizome: warning: {warning}")
        print(_opening(trainer))
        if trainer.steps_done >= command.steps:
            print(f"{command.run_dir}: already at step {trainer.steps_done}; raise --steps to train further")
            return
        _train(trainer)


def _opening(trainer: "Trainer") -> str:
    config, count = trainer.config, sum(p.numel() for p in trainer.parameters.values())
    batch = config.micro_batch_size * config.micro_batches_per_step
    start = f"resuming at step {trainer.steps_done}" if trainer.steps_done else "from the base model"
    return (
        f"{config.run_dir}: {count / 1e6:.1f} M parameters on {trainer.device.type} ({config.precision}), "
        f"{trainer.loader.plan.samples_per_epoch} images an epoch, "
        f"{len(trainer.loader.validation_rows)} held out for validation, {batch} a step, {config.steps} steps, {start}"
    )


def _train(trainer: "Trainer") -> None:
    steps = trainer.config.steps
    with _stop_signals() as stop, _progress(trainer.steps_done, steps) as show, closing(trainer.steps()) as reports:
        for report in reports:
            show(report)
            if stop:
                break
    if trainer.steps_done < steps:
        print(f"stopped after step {trainer.steps_done}, saved; the same command goes on from there")
    else:
        run_dir = trainer.config.run_dir
        print(f"{run_dir}: step {steps} saved; try `sumizome sample --model {run_dir} --prompt … --out pictures`")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM asks the run to stop; a second signal ends it at once."""
    received: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _progress(done: int, steps: int) -> Iterator["Callable[[StepReport], None]"]:
    """Something to call with each report: a progress bar on a terminal, now and then a line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.1f} images/s  epoch {task.fields[epoch]}  left"),
        TimeRemainingColumn(),
    )
    smoothed = _Smoothed()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps, completed=done, loss=float("nan"), speed=0.0, epoch=0)

        def show(report: "StepReport") -> None:
            loss, speed = smoothed(report)
            bar.update(task, completed=report.steps_done, loss=loss, speed=speed, epoch=report.epoch)
            notes = [note for note in report.notes if note != "checkpoint"]
            if notes:
                console.print(f"step {report.steps_done}: {'; '.join(notes)}", highlight=False, soft_wrap=True)
            elif not console.is_terminal and report.steps_done % max(1, steps // _LINES) == 0:
                print(f"step {report.steps_done}/{steps}: loss {loss:.4f}, {speed:.1f} images/s", flush=True)

        yield show


class _Smoothed:
    """Loss and images/s as running means over about 20 steps: single steps jump with their timesteps."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.seconds: float | None = None

    def __call__(self, report: "StepReport") -> tuple[float, float]:
        seconds = 1 / report.images_per_second
        self.loss = report.loss if self.loss is None else 0.95 * self.loss + 0.05 * report.loss
        self.seconds = seconds if self.seconds is None else 0.95 * self.seconds + 0.05 * seconds
        return self.loss, 1 / self.seconds
