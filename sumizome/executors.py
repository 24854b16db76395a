"""Who works on the units of a preparation: this process, several here, the ranks of torchrun, or Ray.

Owns the one interface and the processes of this machine; `executor_torchrun` and `executor_ray` are the other two. The
invariant: whichever works, and with however many workers, the folder ends up the same to the last bit, because a unit
depends on nothing but itself. A worker that fails is named, and the others go on to the end.
"""

import multiprocessing
import os
import queue
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import AutoencoderKL

from sumizome.device import choose_device
from sumizome.errors import ConfigError, DataError, SumizomeError
from sumizome.interrupts import ignore_interrupts, interrupts_held
from sumizome.prepare_work import Event, Work, work_through

__all__ = ["Executor", "LocalExecutor", "in_turn", "local_devices"]


@runtime_checkable
class Executor(Protocol):
    """Makes units of a preparation."""

    def make(self, work: Work, vae: AutoencoderKL, units: Sequence[int]) -> Iterator[Event]:
        """Ends when all these units are finished, by whomever; yields what was done.

        Raises: SumizomeError as `work_through` does, when no worker is left.
        """
        ...


def in_turn(units: Sequence[int], worker: int, workers: int) -> list[int]:
    """The units in the order that one of several workers takes them: its own share, then what others may leave."""
    own = set(units[worker::workers])
    return sorted(units, key=lambda unit: unit not in own)


def local_devices(name: str, workers: int = 0) -> tuple[str, ...]:
    """The devices of this machine's workers: for "auto" each CUDA device, else the CPU; several may share one.

    Raises: ConfigError for a device that is not there.
    """
    if workers < 0:
        raise ConfigError(f"workers is {workers}; give 0 for one a device, or how many")
    count = torch.cuda.device_count() if name in ("auto", "cuda") else 0
    names = [f"cuda:{number}" for number in range(count)] if count > 1 else [str(choose_device(name))]
    return tuple(names[number % len(names)] for number in range(workers or len(names)))


@dataclass(frozen=True)
class LocalExecutor:
    """This process; or, given devices, one process on each, such as ("cuda:0", "cuda:1")."""

    devices: tuple[str, ...] = ()

    def make(self, work: Work, vae: AutoencoderKL, units: Sequence[int]) -> Iterator[Event]:
        """See `Executor`."""
        if len(self.devices) < 2 or not units:
            yield from work_through(work, vae, units)
        else:
            yield from self._make_in_processes(work, vae, units)

    def _make_in_processes(self, work: Work, vae: AutoencoderKL, units: Sequence[int]) -> Iterator[Event]:
        context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
        events: Any = context.Queue()
        workers = [
            context.Process(
                target=_work, args=(events, number, device, work, vae, in_turn(units, number, len(self.devices)))
            )
            for number, device in enumerate(self.devices)
        ]
        failures: dict[int, BaseException] = {}
        try:
            with interrupts_held():
                for worker in workers:
                    worker.start()
            yield from _gather(events, workers, failures)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
        if len(failures) == len(workers):
            raise next(iter(failures.values()))
        for number, failure in failures.items():
            yield Event(
                note=f"worker {number} on {self.devices[number]} failed, the others finished its units: {failure}"
            )


def _gather(events: Any, workers: Sequence[Any], failures: dict[int, BaseException]) -> Iterator[Event]:
    """The events of all workers until each has ended; how one failed goes to `failures`."""
    ended: set[int] = set()
    while len(ended) < len(workers):
        # Asked before the queue is: what a worker said before it died is still heard.
        dead = [number for number, worker in enumerate(workers) if worker.exitcode is not None]
        try:
            number, event = events.get(timeout=0.5)
        except queue.Empty:
            for number in dead:
                if number not in ended:
                    ended.add(number)
                    failures[number] = DataError(f"the process ended without a word (exit {workers[number].exitcode})")
            continue
        if isinstance(event, Event):
            if not event.by_others:  # each worker sees what the other ones finish
                yield event
        else:
            ended.add(number)
            if event is not None:
                failures[number] = event


def _work(events: Any, number: int, device: str, work: Work, vae: AutoencoderKL, units: Sequence[int]) -> None:
    """A worker process: events, then None or the error that ended it. It ends with the process that started it."""
    ignore_interrupts()
    parent = os.getppid()
    outcome: BaseException | None = None
    try:
        vae = vae.to(torch.device(device))
        for event in work_through(work, vae, units, alive=lambda: os.getppid() == parent):
            events.put((number, event))
    except SumizomeError as error:
        outcome = error
    except Exception:
        outcome = RuntimeError(traceback.format_exc())
    events.put((number, outcome))
