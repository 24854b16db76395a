"""A trainer at work for whoever started it: signals, a progress bar, the words before and after, the exit status.

What `sumizome train` and `sumizome vae train` share. Ctrl-C or SIGTERM finishes the step, writes a checkpoint and
stops; SIGUSR1 writes a checkpoint and goes on.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from sumizome.distributed.runtime import Ranks
    from sumizome.train.task import Batches, RunSettings, Task
    from sumizome.train.trainer import Asked, StepReport, Trainer

    _Trainer = TypeVar("_Trainer", bound=Trainer[RunSettings, Task, Batches])

__all__ = ["EXIT_STOPPED", "run_session"]

EXIT_STOPPED = 75
"""Asked to stop, and saved: what a job script starts again (EX_TEMPFAIL)."""
_LINES = 20
"""Progress lines of a whole run where there is no terminal to draw a bar on."""


def run_session(
    config: Any,
    build: "Callable[[Any, Ranks], tuple[_Trainer, list[str]]]",
    opening: "Callable[[_Trainer], str]",
    closing_words: "Callable[[_Trainer], str]",
) -> None:
    """Builds the trainer and trains to the end. Raises: SystemExit(EXIT_STOPPED) when it was asked to stop before."""
    from sumizome.distributed.runtime import join_ranks
    from sumizome.train.run_dir import hold_run_dir

    # A collective outlasts the watchdog, which can name who is missing.
    with (
        join_ranks(config.device, timeout=2 * config.parallel.hang_timeout + 600) as ranks,
        _named_by_rank(ranks),
        hold_run_dir(config.run_dir, ranks),
    ):
        trainer, warnings = build(config, ranks)
        say: Callable[[str], None] = print if ranks.is_first else lambda _: None
        for warning in warnings:
            say(f"sumizome: warning: {warning}")
        say(opening(trainer))
        finished = _train(trainer, config.steps, say, closing_words)
    if not finished:
        raise SystemExit(EXIT_STOPPED)


def _train(
    trainer: "_Trainer", steps: int, say: Callable[[str], None], closing_words: "Callable[[_Trainer], str]"
) -> bool:
    """Whether all steps are done."""
    if trainer.steps_done >= steps:
        say(f"{trainer.config.run_dir}: already at step {trainer.steps_done}; raise --steps to train further")
        return True
    try:
        with (
            _signals(trainer.asked),
            _progress(trainer.steps_done, steps, shown=trainer.ranks.is_first) as show,
            closing(trainer.steps()) as reports,
        ):
            for report in reports:
                show(report)
    finally:
        # Of the last save, and of closing the logs: both end after the last step's report.
        for complaint in [*trainer.saver.complaints, *trainer.complaints]:
            say(f"sumizome: warning: {complaint}")
    if trainer.steps_done < steps:
        done = f"after step {trainer.steps_done}, saved" if trainer.steps_done else "before the first step"
        say(f"stopped {done}; the same command goes on from there")
        return False
    say(closing_words(trainer))
    return True


@contextmanager
def _named_by_rank(ranks: "Ranks") -> Iterator[None]:
    """An error of another rank than the first says whose it is."""
    from sumizome.errors import SumizomeError

    try:
        yield
    except SumizomeError as error:
        raise error if ranks.is_first else type(error)(f"rank {ranks.rank}: {error}") from error


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
