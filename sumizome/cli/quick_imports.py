"""The slow libraries, imported without Python's collector looking again and again at what they bring."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quick_imports"]


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports within go without garbage collection, and what they made is never looked at again.

    torch, diffusers and transformers make a million objects that stay to the end: a sixteenth of their import went
    into searching these for cycles, and every full collection of a long run would search them once more.
    """
    known, collecting = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:  # else a program that calls again would keep its garbage for ever
            gc.freeze()
        if collecting:
            gc.enable()
