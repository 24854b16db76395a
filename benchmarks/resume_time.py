"""From the start of a process to its first finished step after a resume: `sumizome train` itself, then its parts.

The clock stops at the line that `sumizome train` prints after the step, so it holds all that a user waits for: imports,
base model and its digests, latents, the checkpoint with every digest, the first batch and step.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from measurement import progress, record
from tiny_run import tiny_config

from sumizome.settings import to_toml

__all__ = ["measure_resume"]

_SAVED_AT = 5
_PARTS = """
import sys, time
started = time.perf_counter()
from pathlib import Path
from sumizome.settings import read_toml
from sumizome.train.build import build_trainer
from sumizome.train.checkpoint import latest_checkpoint
from sumizome.train.config import TrainConfig
from sumizome.train.run_dir import hold_run_dir
imported = time.perf_counter()
config = read_toml(Path(sys.argv[1]), TrainConfig)
with hold_run_dir(config.run_dir):
    latest_checkpoint(config.run_dir / "checkpoints")
    verified = time.perf_counter()
    trainer, _ = build_trainer(config)
    built = time.perf_counter()
    assert trainer.steps_done
    steps = trainer.steps()
    next(steps)
    stepped = time.perf_counter()
    steps.close()
verify = verified - imported
print(imported - started, verify, built - verified - verify, stepped - built)
"""
_LIBRARIES = """
import time
started = time.perf_counter()
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection
print(time.perf_counter() - started)
"""
"""What no trainer on these libraries starts without."""
_NAMES = ("imports", "checkpoint found, every digest checked", "model, latents and state loaded", "first step")


def measure_resume(folder: Path, target: float) -> None:
    """Prints the time of a resume, and of its parts, of the tiny model below `folder`.

    diffusers and transformers import bitsandbytes and SciPy wherever they find them, so that an environment with the
    test extra starts a third later than one with Sumizome alone.
    """
    config = replace(tiny_config(folder, steps=_SAVED_AT), run_dir=folder / "resumed")
    settings = folder / "resumed.toml"
    settings.write_text(to_toml(config), encoding="utf-8")
    train = [sys.executable, "-m", "sumizome", "train", str(settings)]
    progress(f"a run of {_SAVED_AT} steps, to be resumed")
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment())
    progress("resumed")
    clock, cpu = _first_step([*train, "--steps", str(_SAVED_AT + 5)])
    record("resume: process start to first step", clock, "s", target=target, better="lower")
    record("resume: the whole process, 5 steps and a save included", cpu, "CPU s", better="lower")
    settings.write_text(to_toml(replace(config, steps=_SAVED_AT + 10)), encoding="utf-8")
    progress("resumed again, part by part")
    found = _printed(_PARTS, str(settings))
    libraries = _printed(_LIBRARIES)[0]
    for name, seconds in zip(_NAMES, found, strict=True):
        beside = {"peer": "torch, diffusers, transformers alone", "peer_value": libraries} if name == "imports" else {}
        record(f"resume: {name}", seconds, "s", better="lower", **beside)


def _environment() -> dict[str, str]:
    """This process's, but compiled modules are kept, as they are wherever nobody forbids it: an installation has them
    from its first start, and a machine that compiles them anew at each start takes three times as long.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _printed(script: str, *arguments: str) -> list[float]:
    """The numbers that a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True, env=_environment()
    )
    return [float(number) for number in done.stdout.split()]


def _first_step(command: list[str]) -> tuple[float, float]:
    """Seconds until the first step is reported, and CPU seconds of the whole process."""
    before, started = os.times(), time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_environment()
    ) as process:
        assert process.stdout is not None
        # Where there is no terminal, a run of so few steps prints a line each.
        line = next(line for line in process.stdout if line.startswith(f"step {_SAVED_AT + 1}/"))
        seconds = time.perf_counter() - started
        process.stdout.read()
    after = os.times()
    assert line and process.returncode == 0
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system
