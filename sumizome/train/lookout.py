"""Whether a look at a run may go on: a stop ends it, because what asked for one kills half a minute later.

A look calls one of the two words between its pieces of work, and lets `LookEnded` through. The invariant: where ranks
meet again within the look, all of them end it or none does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from sumizome.distributed.runtime import Ranks

__all__ = ["LookEnded", "Lookout"]


class LookEnded(Exception):
    """A stop was asked for: what was looked at so far is dropped. The training loop catches it."""


@dataclass(frozen=True)
class Lookout:
    """What a look asks between two batches or sampler steps; each question is a sign of life, too."""

    ranks: Ranks = field(default_factory=Ranks)
    stop: Callable[[], bool] = lambda: False
    """Whether this rank was asked to stop."""
    alive: Callable[[], None] = lambda: None

    def together(self, *, ended: bool = False) -> None:
        """Raises: LookEnded on every rank if any was asked to stop, or brings an `ended` look. Collective."""
        self.alive()
        if self.ranks.sums([float(ended or self.stop())])[0]:
            raise LookEnded

    def alone(self) -> None:
        """Raises: LookEnded if this rank was asked to stop; for ranks that do unequal work and meet afterwards."""
        self.alive()
        if self.stop():
            raise LookEnded
