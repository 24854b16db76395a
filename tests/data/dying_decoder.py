"""Stands in for the workers' decoder: some pictures kill the process, some hold it for ever.

A module of its own, because each worker that starts anew imports it.
"""

import os
import signal
from typing import Any, NoReturn

from sumizome.data import verification

_real_inspect_chunk = verification._inspect_chunk


def inspect_chunk(tasks: list[Any], background: Any) -> list[Any]:
    """`verification._inspect_chunk`, but for pictures with "kill" or "spin" in their names."""
    for task in tasks:
        if "kill" in task.path:
            os.kill(os.getpid(), signal.SIGKILL)
        if "spin" in task.path:
            verification.MAX_CPU_SECONDS = 0.1
            verification._inspect = _spin
    return _real_inspect_chunk(tasks, background)


def _spin(task: Any, background: Any) -> NoReturn:
    while True:
        pass
