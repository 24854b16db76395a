"""Stands in for the workers' decoder: some pictures kill the process, some hold it for ever.

A module of its own, because each worker that starts anew imports it.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

from sumizome.data import verification

_real_inspect_chunk = verification._inspect_chunk


def inspect_chunk(tasks: list[Any], background: Any) -> list[Any]:
    """`verification._inspect_chunk`, but for pictures with "kill", "crash", "spin" or "sleep" in their names."""
    for task in tasks:
        if "kill" in task.path:
            os.kill(os.getpid(), signal.SIGKILL)
        if "crash" in task.path:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "sleep" in task.path:
            verification.MAX_SECONDS = 0.2
            verification._inspect = _sleep
        if "spin" in task.path:
            verification.MAX_CPU_SECONDS = 0.1
            verification._inspect = _spin
    return _real_inspect_chunk(tasks, background)


def _sleep(task: Any, background: Any) -> None:
    time.sleep(3600)


def _spin(task: Any, background: Any) -> NoReturn:
    while True:
        pass


def write_file(path: str) -> str | None:
    """What stops a worker that writes."""
    try:
        Path(path).write_bytes(b"taken over")
    except OSError as error:
        return error.strerror
    return None


def open_files(count: int) -> str | None:
    """What stops a worker that opens many files."""
    try:
        files = [open(os.devnull) for _ in range(count)]  # noqa: PTH123, SIM115
    except OSError as error:
        return error.strerror
    return str(len(files))
