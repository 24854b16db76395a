"""What each part of the training loop that bare arithmetic lacks takes of a step, in CPU seconds of its own thread.

Sound on a busy machine too, where whole steps side by side are not.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from sumizome.data.loader import BatchLoader
from sumizome.train.denoising import Denoising
from sumizome.train.trainer import Trainer

__all__ = ["THREAD", "timed_parts"]

THREAD = "in a thread that works ahead"


@contextmanager
def timed_parts(trainer: Trainer) -> Iterator[dict[str, float]]:
    """CPU seconds by part, summed over the steps made within the block; "step" is all of the training thread's."""
    seconds: dict[str, float] = defaultdict(float)
    parts: list[tuple[Any, str, str]] = [
        (trainer, "_one_step", "step"),
        (trainer, "_clip", "gradient norm and clipping"),
        (trainer.ema, "update", "EMA"),
        (trainer, "_agree", "finite, stop and save of all ranks"),
        (trainer, "_after_step", "logs, saving, observers"),
        (BatchLoader, "step", f"latents and captions ({THREAD})"),
        (Denoising, "draw", f"timesteps, noise and tokens ({THREAD})"),
    ]
    with ExitStack() as stack:
        for owner, name, label in parts:
            timed = _timed(getattr(owner, name), label, seconds)
            stack.enter_context(patch.object(owner, name, timed))
        yield seconds


def _timed(function: Callable[..., Any], label: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            seconds[label] += time.thread_time() - started

    return timed
