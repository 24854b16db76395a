"""One measurement, one JSON object a line: the form in which every benchmark of this repository speaks.

Speed is a ratio: `peer_value` is what a named peer, or the bare limit, did in the same run on the same machine.
"""

import json
import os
import platform
import sys
from typing import Literal

__all__ = ["machine", "progress", "record"]


def record(
    name: str,
    value: float,
    unit: str,
    *,
    target: float | None = None,
    better: Literal["higher", "lower"],
    peer: str | None = None,
    peer_value: float | None = None,
    ratio: float | None = None,
) -> None:
    """Prints one measurement. `ratio` is value / peer_value unless it is given; `target` has the value's unit, or is a
    ratio where the name says so."""
    if ratio is None and peer_value:
        ratio = value / peer_value
    line = {
        "name": name,
        "value": _rounded(value),
        "unit": unit,
        "target": target,
        "better": better,
        "peer": peer,
        "peer_value": _rounded(peer_value),
        "ratio": _rounded(ratio),
        "machine": machine(),
    }
    print(json.dumps(line), flush=True)


def progress(text: str) -> None:
    """Says on standard error what is being done, at once: measuring takes minutes."""
    print(text, file=sys.stderr, flush=True)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def machine() -> str:
    """The processor's kind and the cores this process may use; the accelerator where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores"
