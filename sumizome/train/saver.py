"""Saving while training goes on: the state is copied to main memory, and a thread writes it.

The stall is the copy alone. One save is under way at a time: the next waits for the one before. A save that fails
leaves the earlier checkpoints as they are; training goes on and tries again when the next is due, and ends when
that happens `_FAILURES_AT_MOST` times in a row.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sumizome.distributed.parallelize import local
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError
from sumizome.train.checkpoint import Checkpoint, prune_checkpoints, verify_checkpoint, write_checkpoint
from sumizome.train.mirror import CheckpointMirror

__all__ = ["Saver"]

_FAILURES_AT_MOST = 3
_WAIT = 1.0
"""Seconds between two looks at whether a save gets on."""


class Saver:
    """Writes the checkpoints of a run below `directory`. Its methods are collective."""

    def __init__(
        self,
        directory: Path,
        ranks: Ranks,
        *,
        keep: int,
        asynchronous: bool = True,
        mirror: CheckpointMirror | None = None,
    ) -> None:
        self.directory, self.ranks, self.keep, self.asynchronous = directory, ranks, keep, asynchronous
        self.mirror = mirror
        self.complaints: list[str] = []
        """What went wrong with a save or its mirror and ended nothing, for the user; whoever shows it empties it."""
        self.stall = 0.0
        """Seconds that the last save kept training waiting."""
        self.saved_step: int | None = None
        """The newest step that is known to be on disk."""
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[Path] | None = None
        self._reserving: Future[Checkpoint] | None = None
        self._verified: list[Path] = []
        self._failures = 0
        self.while_waiting: Callable[[], None] = lambda: None
        """Called now and then while a save is waited for that gets on: a slow disk or mirror is no hang."""
        self._files_done = 0

    def reserve(self, state: Checkpoint) -> None:
        """Makes the memory for such a state ready while training goes on: the first save then waits no longer than any.

        Nothing that is copied now is used: it may change meanwhile.
        """
        if self.asynchronous:
            self._reserving = self._thread.submit(self._share, state)

    def save(self, state: Checkpoint) -> None:
        """Starts to save the state, which may change as soon as this returns.

        Raises: CheckpointError if saves failed too often.
        """
        started = time.perf_counter()
        problem = self.settle()
        if problem is not None:
            self.complaints.append(problem)
        if self._reserving is not None:
            self._reserving.result()
            self._reserving = None
        self._under_way = self._thread.submit(self._write, self._share(state))
        if not self.asynchronous:
            self._wait(self._under_way)  # whoever settles it hears what came of it, as of any other save
        self.stall = time.perf_counter() - started

    @property
    def failed(self) -> bool:
        """Whether the save under way is known to have failed; ranks learn it at different moments."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def settle(self) -> str | None:
        """Waits for the save under way; returns what went wrong with it, the same on every rank.

        Raises: CheckpointError if it was one failure too many.
        """
        try:
            self.finish()
        except CheckpointError as error:
            self._failures += 1
            if self._failures >= _FAILURES_AT_MOST:
                raise
            return str(error)
        return None

    def finish(self) -> None:
        """Waits for the save under way. Raises: CheckpointError if it failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._wait(under_way)
            path = under_way.result()
            self._failures = 0
            self.saved_step = int(path.name.removeprefix("step-"))

    def _wait(self, under_way: Future[Path]) -> None:
        """Until it is done, whatever came of it. A save that does not get on is left to the watchdog."""
        before = self._progress()
        while wait([under_way], _WAIT).not_done:
            now = self._progress()
            if now != before:
                self.while_waiting()
            before = now

    def _progress(self) -> tuple[int, int]:
        """What grows while the save under way gets on: files that are through, and what this rank has written."""
        written = 0
        with contextlib.suppress(OSError):  # renamed or removed meanwhile
            for path in self.directory.glob(f".unfinished-*/*/shard-{self.ranks.rank + 1:05d}-*"):
                written += path.stat().st_size
        return self._files_done, written

    def _file_is_done(self) -> None:
        self._files_done += 1

    def close(self) -> None:
        """Waits for the thread, whatever came of its save."""
        self._thread.shutdown()

    def _write(self, state: Checkpoint) -> Path:
        path = write_checkpoint(self.directory, state, self.ranks, self._file_is_done)
        problem = self._forget_old(path) if self.ranks.is_first else None
        # A word to all, so that a save succeeded on every rank or on none.
        (problem, *_) = self.ranks.gather(problem, self.ranks.saving)
        if problem is not None:
            raise CheckpointError(problem)
        if self.mirror is not None:
            self.complaints.extend(self.mirror.put(path, self.ranks, self._file_is_done))
        return path

    def _forget_old(self, newest: Path) -> str | None:
        """Reads the newest back, removes old ones; returns what went wrong."""
        try:
            verify_checkpoint(newest, file_is_done=self._file_is_done)
            self._verified = [*self._verified[-1:], newest]
            prune_checkpoints(self.directory, self.keep, self._verified)
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{self.directory}: old checkpoints cannot be removed ({error.strerror})"
        return None

    def _share(self, state: Checkpoint) -> Checkpoint:
        return replace(
            state,
            weights=self._copied("weights", state.weights),
            ema=self._copied("ema", state.ema),
            optimizer=self._copied("optimizer", state.optimizer),
        )

    def _copied(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's share in main memory. The memory is kept for the next save: fresh pages cost more than a copy."""
        # What every rank has whole is dealt out, largest first. Of what is cut up each rank has its own.
        plain = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
        dealt = set(self.ranks.share(sorted(plain, key=lambda name: (-tensors[name].numel(), name))))
        others = set(plain) - dealt
        copies = {name: self._copy(f"{part}/{name}", t.detach()) for name, t in tensors.items() if name not in others}
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return copies

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = tensor.to("cpu", copy=True)
            if tensor.is_cuda and not isinstance(buffer, DTensor):
                buffer = buffer.pin_memory()
            self._buffers[key] = buffer
            return buffer
        local(buffer).copy_(local(tensor), non_blocking=True)
        return buffer
