"""Where a step's time goes, and which rank holds up the others.

A rank's own time is what it needs until the first operation that waits for the others: up to the last micro-batch's
backward pass where each rank holds the whole model (DDP), up to the first forward pass where weights are gathered for
each (FSDP2: data and host work are told apart there, a slow card is not).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch

__all__ = ["Pace", "RankPace", "slow_ranks"]

_SLOW = 1.2
"""A rank is slow if its own time is so many times the median's, and that is felt."""
_FELT = 0.05
"""Share of the step that the others lose."""


@dataclass(frozen=True)
class RankPace:
    """Means over the steps of a window, in seconds."""

    step: float
    own: float
    data_wait: float


def slow_ranks(paces: Sequence[RankPace]) -> list[dict[str, Any]]:
    """The ranks that hold up the others: {rank, share}, share being the part of a step lost by waiting for it."""
    if len(paces) < 2:
        return []
    usual = median_low(pace.own for pace in paces)
    found = []
    for rank, pace in enumerate(paces):
        lost = (pace.own - usual) / pace.step if pace.step else 0.0
        if pace.own > _SLOW * usual and lost > _FELT:
            found.append({"rank": rank, "share": round(lost, 3)})
    return found


class Pace:
    """Measures this rank's steps; a GPU's work is timed by events on its stream, read when the step is over."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._met: float | None = None
        self.forget()

    def forget(self) -> None:
        """Starts a new window."""
        self._steps, self._step, self._own, self._waited = 0, 0.0, 0.0, 0.0

    def begin(self) -> None:
        """A step begins; next comes the wait for its data."""
        self._started, self._met = time.perf_counter(), None

    def data_is_there(self) -> None:
        """The data was waited for."""
        self._waited_now = time.perf_counter() - self._started
        self._first_event = self._event()

    def meets_others(self) -> None:
        """The next operation may wait for other ranks; only the first call in a step counts."""
        if self._met is None:
            self._met, self._last_event = time.perf_counter(), self._event()

    def end(self) -> float:
        """The step is over and its numbers were read; returns its seconds."""
        seconds = time.perf_counter() - self._started
        met = self._met or time.perf_counter()
        on_card = self._first_event.elapsed_time(self._last_event) / 1000 if self._cuda and self._met else 0.0
        self._steps += 1
        self._step += seconds
        self._waited += self._waited_now
        self._own += max(met - self._started, self._waited_now + on_card)
        return seconds

    @property
    def steps(self) -> int:
        """How many the window holds."""
        return self._steps

    def mean(self) -> RankPace:
        """The means of the window."""
        steps = max(1, self._steps)
        return RankPace(self._step / steps, self._own / steps, self._waited / steps)

    def _event(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
