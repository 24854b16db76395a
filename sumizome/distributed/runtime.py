"""Which process this is among how many, its device, and the few words that processes say to each other.

Owns starting and ending `torch.distributed`, and every collective that is not about gradients. The invariant: what
`Ranks` returns is the same on every rank, so that all ranks branch alike. One process is the case `world == 1`, in
which nothing here communicates. torchrun sets the environment that `join_ranks` reads.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sumizome.device import choose_device
from sumizome.errors import ConfigError, SumizomeError

__all__ = ["Ranks", "join_ranks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. All its methods are collective: every rank calls them, in one order."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Ranks on this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None
    """The process group of the words below: gloo, so that they wait for no GPU kernel."""
    saving: Any = None
    """A group of its own for the thread that writes checkpoints."""

    @property
    def is_first(self) -> bool:
        """Rank 0 writes what is written once: metrics, previews, the record of the run."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the ranks, in float64: the one small all-reduce of a step."""
        if self.world == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self.control)
        return [float(total) for total in totals]

    def gather(self, value: T, group: Any = None) -> list[T]:
        """Every rank's value, by rank. Also a barrier."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=group or self.control)
        return values

    def first(self, action: Callable[[], T]) -> T:
        """What rank 0's `action` returned, on every rank.

        Raises: on every rank, the error that a user can mend which rank 0 met.
        """
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except SumizomeError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a list that every rank has: every `world`-th item."""
        return list(items[self.rank :: self.world])


@contextlib.contextmanager
def join_ranks(device: str = "auto", timeout: float = 1800.0) -> Iterator[Ranks]:
    """This process among the ranks that torchrun started; a process started alone is the only rank.

    Under CUDA each rank takes the device of its place on the machine, and talks by NCCL; on CPUs by gloo. `timeout`
    [s] ends a collective that some rank never joins.
    Raises: ConfigError for an environment that torchrun did not make, or a device that is not there.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield Ranks(device=choose_device(device))
        return
    rank, local_rank, local_world = _number("RANK"), _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", world)
    chosen = choose_device(device)
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise ConfigError(f"device '{device}' names one card for {world} processes; give --device cuda")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    patience = timedelta(seconds=timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        timeout=patience,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=patience)
    saving = dist.new_group(backend="gloo", timeout=patience)
    yield Ranks(rank, world, local_rank, local_world, chosen, control, saving)
    # Only after a run that ended well: after an error the other ranks may be gone, and leaving would wait for them.
    dist.destroy_process_group()


def _number(name: str, otherwise: int | None = None) -> int:
    text = os.environ.get(name, "" if otherwise is None else str(otherwise))
    if not text.isdigit():
        raise ConfigError(f"{name} is '{text}' in the environment; start several processes with torchrun")
    return int(text)
