"""Train a model, or go on training: on a run directory that holds checkpoints the same command resumes.

    sumizome train run.toml
    sumizome train run.toml --steps 20000 --optim.lr 2e-5
    torchrun --nproc-per-node 8 -m sumizome train run.toml        one process a card: DDP, or --parallel.strategy fsdp

Ctrl-C or SIGTERM finishes the step, writes a checkpoint and stops; SIGUSR1 writes a checkpoint and goes on.
Exit status: 0 all steps are done, 75 stopped and saved (run the same command again), 2 an error that the message
explains, 70 another rank hangs.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from sumizome.train.config import TrainConfig as Command

if TYPE_CHECKING:
    from sumizome.distributed.runtime import Ranks
    from sumizome.train.trainer import Asked, StepReport, Trainer

__all__ = ["EXIT_STOPPED", "Command", "run"]

EXIT_STOPPED = 75
"""Asked to stop, and saved: what a job script starts again (EX_TEMPFAIL)."""
_LINES = 20
"""Progress lines of a whole run where there is no terminal to draw a bar on."""


def run(command: Command) -> None:
    """Trains, showing progress; what the run writes is described in `sumizome.train.run_dir`."""
    from sumizome.distributed.runtime import join_ranks
    from sumizome.train.run_dir import hold_run_dir

    # A collective outlasts the watchdog, which can name who is missing.
    with (
        join_ranks(command.device, timeout=2 * command.parallel.hang_timeout + 600) as ranks,
        _named_by_rank(ranks),
        hold_run_dir(command.run_dir, ranks),
    ):
        finished = _train(command, ranks)
    if not finished:
        raise SystemExit(EXIT_STOPPED)


@contextmanager
def _named_by_rank(ranks: "Ranks") -> Iterator[None]:
    """An error of another rank than the first says whose it is."""
    from sumizome.errors import SumizomeError

    try:
        yield
    except SumizomeError as error:
        raise error if ranks.is_first else type(error)(f"rank {ranks.rank}: {error}") from error


def _train(command: Command, ranks: "Ranks") -> bool:
    """Whether all steps are done."""
    from sumizome.train.build import build_trainer

    trainer, warnings = build_trainer(command, ranks)
    say: Callable[[str], None] = print if ranks.is_first else lambda _: None
    for warning in warnings:
        say(f"sumizome: warning: {warning}")
    say(_opening(trainer))
    steps, run_dir = command.steps, command.run_dir
    if trainer.steps_done >= steps:
        say(f"{run_dir}: already at step {trainer.steps_done}; raise --steps to train further")
        return True
    with (
        _signals(trainer.asked),
        _progress(trainer.steps_done, steps, shown=ranks.is_first) as show,
        closing(trainer.steps()) as reports,
    ):
        for report in reports:
            show(report)
    if trainer.steps_done < steps:
        say(f"stopped after step {trainer.steps_done}, saved; the same command goes on from there")
        return False
    say(f"{run_dir}: step {steps} saved; try `sumizome sample --model {run_dir} --prompt … --out pictures`")
    return True


def _opening(trainer: "Trainer") -> str:
    config, count = trainer.config, sum(p.numel() for p in trainer.parameters.values())
    spans = config.spans()
    batch = spans[0].images_per_step
    stages = "".join(
        f"\nstage {span.name}: to step {span.last}, {span.images_per_step} images a step of {span.latents}"
        for span in spans
        if len(spans) > 1
    )
    start = f"resuming at step {trainer.steps_done}" if trainer.steps_done else "from the base model"
    ranks = trainer.ranks.world
    where = trainer.device.type if ranks == 1 else f"{ranks} × {trainer.device.type}, {trainer.parallel.strategy}"
    return (
        f"{config.run_dir}: {count / 1e6:.1f} M parameters on {where} ({config.precision}), "
        f"{trainer.loader.plan.samples_per_epoch} images an epoch, "
        f"{len(trainer.loader.validation_rows)} held out for validation, {batch} a step, "
        f"{config.steps} steps, {start}{stages}"
    )


@contextmanager
def _signals(asked: "Asked") -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to stop, SIGUSR1 to save; a second Ctrl-C ends it at once.

    A second SIGTERM does not: a batch system sends one to every process, and torchrun another to its own.
    """

    def stop(number: int, _: FrameType | None) -> None:
        asked.stop = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def save(number: int, _: FrameType | None) -> None:
        asked.save = True

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: save}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _progress(done: int, steps: int, *, shown: bool) -> Iterator["Callable[[StepReport], None]"]:
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
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=steps, completed=done, loss=float("nan"), speed=0.0, epoch=0)

        def show(report: "StepReport") -> None:
            if not shown:
                return
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
