"""Ctrl-C goes to every process of a terminal, but is meant for the one that people talk to: it ends the others.

Owns how those are spared. Invariant: a process that was started within `interrupts_held` and begins with
`ignore_interrupts` never sees one, not even while it imports; the one that started it loses none.
"""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

__all__ = ["ignore_interrupts", "interrupts_held"]


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds an interrupt back to the end of the block; a process that is started in it inherits the holding back."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing's own; its start would let interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """The first thing that a worker does: whoever started it will end it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
