"""The fault matrix, each fault a few times; `make test-faults` tries them as often as the page promises."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_promise_holds() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_matrix.py")), "--quick"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout
