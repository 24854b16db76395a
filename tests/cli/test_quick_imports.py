"""What is imported quickly is not looked at again; a program that imports nothing new keeps its collector as it was."""

import gc
import subprocess
import sys

from sumizome.cli.quick_imports import quick_imports


def test_modules_are_frozen_once() -> None:
    script = """
import gc
from sumizome.cli.quick_imports import quick_imports
with quick_imports():
    assert not gc.isenabled()
    import sumizome.diffusion.schedule
first = gc.get_freeze_count()
assert gc.isenabled() and first > 10_000, first
with quick_imports():
    import sumizome.diffusion.schedule
assert gc.get_freeze_count() == first
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    try:
        with quick_imports():
            raise ImportError
    except ImportError:
        pass
    assert gc.isenabled()
