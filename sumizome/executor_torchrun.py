"""A preparation under torchrun: ranks on any number of machines that share the folder of the latents.

Owns the process group and its end. Units need no collective: a rank takes them by lease, its own share first. The
invariant: a rank that fails is named by every other, which finish its units before the job ends.
"""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from sumizome.errors import ConfigError
from sumizome.executors import in_turn
from sumizome.prepare_work import Event, Work, work_through

__all__ = ["TorchrunExecutor", "is_under_torchrun", "local_device", "torchrun_ranks"]

_LONGEST = datetime.timedelta(days=30)
"""A rank that is done waits for the others as long as they work; one that dies is noticed by its connection."""
_TEXT_BYTES = 1000


def is_under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_device(name: str) -> str:
    """This rank's device: of "auto" and "cuda", the CUDA device of its number on this machine."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return name


@contextlib.contextmanager
def torchrun_ranks() -> Iterator["TorchrunExecutor"]:
    """The ranks that torchrun started, met.

    Raises: ConfigError where it did not.
    """
    if not is_under_torchrun():
        raise ConfigError("executor 'torchrun' needs torchrun: `torchrun --nproc-per-node 2 -m sumizome prepare …`")
    dist.init_process_group("gloo", timeout=_LONGEST)
    try:
        yield TorchrunExecutor(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class TorchrunExecutor:
    """This rank's part, and the news of the others."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def make(self, work: Work, vae: AutoencoderKL, units: Sequence[int]) -> Iterator[Event]:
        """See `executors.Executor`. Every rank calls it, whatever is left to do."""
        failure: Exception | None = None
        try:
            yield from work_through(work, vae, in_turn(units, self.rank, self.world_size))
        except Exception as error:  # whatever it is: the others must not hang at the end
            failure = error
        told = f"rank {self.rank} on {socket.gethostname()} failed: {failure}" if failure is not None else ""
        failures = [text for text in self._gather(told) if text]
        if failure is not None:
            raise failure
        for text in failures:
            yield Event(note=f"{text} (the other ranks finished its units)")

    def _gather(self, text: str) -> list[str]:
        """Every rank's text, as bytes: nothing that comes over the network is unpickled."""
        own = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        content = text.encode()[:_TEXT_BYTES]
        own[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        texts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(texts, own)
        return [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in texts]
