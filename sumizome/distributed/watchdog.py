"""A thread in every rank that notices when one of them hangs, names it, and ends this process.

Each rank's thread writes a sign of life to torchrun's key-value store: a count that grows while the process runs at
all, and the place in the step that the training thread has reached. A rank whose count stands still was stopped or has
lost its machine; where all live and none gets on, the one that is furthest behind holds up the others. Ending is not
graceful on purpose: a collective that waits for a dead rank cannot be left otherwise. torchrun then ends the rest.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from sumizome.distributed.runtime import Ranks

__all__ = ["EXIT_HANG", "Sign", "Watchdog", "read_signs", "verdict"]

EXIT_HANG = 70
"""The exit status of a rank that gave up waiting for another."""


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life."""

    alive: int
    """Grows while the process runs."""
    step: int = 0
    """The step that it is at, from 1; 0 before any."""
    place: int = 0
    """How far into the step."""
    doing: str = "starting"
    host: str = ""
    is_first: bool = False
    """Whether its process has not finished a step yet, wherever in the run it began: that may compile for long."""

    def encode(self) -> str:
        return f"{self.alive}|{self.step}|{self.place}|{int(self.is_first)}|{self.doing}|{self.host}"

    @staticmethod
    def decode(text: str) -> "Sign":
        alive, step, place, is_first, doing, host = text.split("|", 5)
        return Sign(int(alive), int(step), int(place), doing, host, bool(int(is_first)))


def read_signs(store: Any, before: Sequence[Sign]) -> list[Sign]:
    """Each rank's newest sign of life; the one of `before` for a rank that has not written any."""
    keys = [str(rank) for rank in range(len(before))]
    if not store.check(keys):  # `multi_get` would wait for them
        return [Sign.decode(store.get(key).decode()) if store.check([key]) else before[int(key)] for key in keys]
    return [Sign.decode(text.decode()) for text in store.multi_get(keys)]


def verdict(signs: Sequence[Sign], silent_for: Sequence[float], stuck_for: Sequence[float], timeout: float) -> str:
    """Who holds up the run, in words; empty if nobody has for `timeout` seconds.

    `silent_for`, `stuck_for` [s]: since when each rank's `alive`, and its place, have not changed.
    """
    silent = [rank for rank, seconds in enumerate(silent_for) if seconds > timeout]
    if silent:
        return "; ".join(
            f"{_named(rank, signs[rank])} has given no sign of life for {timeout:.0f} s" for rank in silent
        )
    if min(stuck_for) <= timeout or any(sign.step == 0 or sign.is_first for sign in signs):
        return ""
    places = [(sign.step, sign.place) for sign in signs]
    behind = [rank for rank, place in enumerate(places) if place == min(places)]
    if len(behind) == len(signs):
        return f"all ranks have stood still for {timeout:.0f} s (step {signs[0].step}, {signs[0].doing})"
    return "; ".join(f"{_named(rank, signs[rank])} has stood still for {timeout:.0f} s" for rank in behind)


def _named(rank: int, sign: Sign) -> str:
    return f"rank {rank} on {sign.host} (step {sign.step}, {sign.doing})"


@dataclass
class Watchdog:
    """Watches within its context; the training thread calls `at` as it goes. Does nothing for a single rank.

    A first step that never ends is not seen here: the timeout of its collectives ends it.
    """

    ranks: Ranks
    timeout: float
    sign: Sign = field(default_factory=lambda: Sign(0, host=os.uname().nodename.replace("|", ""), is_first=True))
    """Where the training thread is. Only that thread sets it, so that no place is lost to a write of the other."""
    _hosts: Sequence[str] = ()
    """Of all ranks."""
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def at(self, step: int, doing: str) -> None:
        """The training thread stands at this step (from 1) and does this: a few hundred nanoseconds."""
        now = self.sign
        place = now.place + 1 if step == now.step else 0
        self.sign = Sign(0, step, place, doing, now.host, now.is_first)

    def step_is_done(self) -> None:
        """The first step of this process is over, and with it whatever was compiled."""
        if self.sign.is_first:
            self.sign = replace(self.sign, is_first=False)

    def __enter__(self) -> "Watchdog":
        if self.ranks.world > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._hosts = self.ranks.gather(self.sign.host)  # the clock starts when all are there
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _watch(self) -> None:
        try:
            self._watch_store(self._connect())
        except Exception as error:
            if not self._ended.is_set():
                self._end(f"the store of rank 0's machine cannot be reached ({str(error).splitlines()[0]})")

    def _connect(self) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        patience = timedelta(seconds=max(5.0, self.timeout))
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
        return PrefixStore(f"sumizome/signs/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _watch_store(self, store: Any) -> None:
        seen = [
            Sign(0, host=host, is_first=True) for host in self._hosts
        ]  # a rank may be stopped before its first sign
        alive_at = [time.monotonic()] * self.ranks.world
        moved_at = list(alive_at)
        alive = 0
        while not self._ended.wait(min(5.0, self.timeout / 4)):
            alive += 1
            store.set(str(self.ranks.rank), replace(self.sign, alive=alive).encode())
            now = time.monotonic()
            for rank, (before, sign) in enumerate(zip(seen, read_signs(store, seen), strict=True)):
                if sign.alive != before.alive:
                    alive_at[rank] = now
                if (sign.step, sign.place) != (before.step, before.place):
                    moved_at[rank] = now
                seen[rank] = sign
            found = verdict(seen, [now - at for at in alive_at], [now - at for at in moved_at], self.timeout)
            if found and not self._ended.is_set():
                self._end(found)

    def _end(self, found: str) -> None:
        sys.stderr.write(
            f"sumizome: {found}; rank {self.ranks.rank} ends, and the job with it. The last checkpoint is whole: "
            "see to that machine and run the same command again\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_HANG)
