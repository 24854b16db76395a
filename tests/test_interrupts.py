"""Ctrl-C reaches every process of a terminal: workers go on, also while they start, and their parent hears of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sumizome.data import matching
from sumizome.data.ingest import ingest
from sumizome.data.source_config import SourceConfig

PROGRAM = """
import multiprocessing, os, signal
from sumizome.interrupts import ignore_interrupts, interrupts_held

def work():
    ignore_interrupts()
    print("worked", flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started ignoring it
    process = multiprocessing.get_context("spawn").Process(target=work)
    try:
        with interrupts_held():
            process.start()
            os.kill(process.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            print("held", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    process.join()
    print(process.exitcode)
"""


def test_a_worker_that_is_starting_is_spared_and_its_parent_is_not(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ended = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True)
    assert (ended.stdout.split(), ended.stderr) == (["held", "interrupted", "worked", "0"], "")


@pytest.fixture
def interrupted_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every worker of a pool gets Ctrl-C as soon as it is started, and with each task."""
    submit: Callable[..., Future[Any]] = ProcessPoolExecutor.submit

    def submit_and_interrupt(self: ProcessPoolExecutor, *arguments: Any, **options: Any) -> Future[Any]:
        future = submit(self, *arguments, **options)
        for process in list(self._processes.values()):
            os.kill(process.pid, signal.SIGINT)
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit_and_interrupt)


@pytest.mark.usefixtures("interrupted_workers")
def test_workers_of_ingest_leave_interrupts_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_FEW", 1)
    monkeypatch.setattr(matching, "_CHUNK", 1)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.png.json").write_text(json.dumps({"tags": [f"tag{number}"]}))
    result = ingest([SourceConfig(tmp_path, "gallery-dl")], workers=2)
    assert result.manifest.table["tags"].to_pylist() == [["tag0"], ["tag1"], ["tag2"]]
    assert result.rejects == []
