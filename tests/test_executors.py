"""Who works leaves no trace: processes, two preparers at once, torchrun's ranks and Ray write the same bytes.

What needs new interpreters, a cluster or many kills is slow: `make test-faults` runs it all.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from preparing import (
    CONFIG,
    COUNT,
    drawn_set,
    exit_code,
    finish,
    seconds_undisturbed,
    small_vae,
    start_preparer,
    tree_digest,
)

from sumizome import prepare_encoder
from sumizome.data.buckets import BucketConfig
from sumizome.data.latents import open_latents
from sumizome.data.manifest import Manifest
from sumizome.errors import ConfigError, DataError
from sumizome.executor_ray import RayExecutor
from sumizome.executors import Executor, LocalExecutor, in_turn
from sumizome.prepare import PrepareConfig, PrepareProgress, prepare_latents

PACKAGE = Path(prepare_encoder.__file__).parents[1]
SMALL_UNITS = replace(CONFIG, unit_size=3)
"""Seven units, for several to share."""


@dataclass(frozen=True)
class Case:
    manifest: Manifest
    path: Path
    vae: AutoencoderKL
    expected: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("executors")
    _, manifest = drawn_set(root, "m.parquet")
    vae = small_vae()
    finish(manifest, vae, root / "expected", SMALL_UNITS)
    return Case(manifest, root / "m.parquet", vae, root / "expected")


def finish_by(executor: Executor, case: Case, out: Path) -> list[PrepareProgress]:
    steps = list(prepare_latents(case.manifest, case.vae, out, SMALL_UNITS, executor=executor))
    assert (steps[-1].written, steps[-1].rejected) == (COUNT - 1, 1)
    return steps


def test_each_units_own_share_first() -> None:
    assert in_turn(range(5), 1, 2) == [1, 3, 0, 2, 4]
    assert [sorted(in_turn([4, 7, 9], worker, 4)) for worker in range(4)] == [[4, 7, 9]] * 4


@pytest.mark.slow  # like all that start an interpreter, which imports for seconds
def test_two_processes(case: Case, tmp_path: Path) -> None:
    steps = finish_by(LocalExecutor(("cpu", "cpu")), case, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(case.expected)
    assert steps[-1].vae_seconds > 0
    assert finish_by(LocalExecutor(("cpu", "cpu")), case, tmp_path / "out")[-1].found == COUNT


@pytest.mark.slow
def test_a_device_that_is_not_there_is_named_and_the_other_worker_goes_on(case: Case, tmp_path: Path) -> None:
    steps = finish_by(LocalExecutor(("cpu", "cuda:7")), case, tmp_path / "out")
    told = [note for step in steps for note in step.notes]
    assert any("worker 1 on cuda:7 failed" in note and "the others finished" in note for note in told)
    assert tree_digest(tmp_path / "out") == tree_digest(case.expected)


@pytest.mark.slow
def test_ray_tasks(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    finish_by(RayExecutor(device="cpu", num_cpus=2), case, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(case.expected)


@pytest.mark.slow
def test_ray_names_the_failure(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    away = replace(case.manifest, sources=(tmp_path / "unmounted",))
    with pytest.raises(DataError, match="Is a drive missing"):
        steps = RayExecutor(device="cpu", num_cpus=2)
        list(prepare_latents(away, case.vae, tmp_path / "out", replace(CONFIG, unit_size=10), executor=steps))


def test_a_ray_cluster_that_is_not_there_is_named_at_once(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        finish_by(RayExecutor(address="127.0.0.1:1"), case, tmp_path / "other")


# ── torchrun: the command itself, two ranks ──


def torchrun(*arguments: str, breaks: str = "") -> subprocess.CompletedProcess[str]:
    """The command under torchrun, with `breaks` run first in each rank."""
    start = f"import os, sys; sys.argv[0] = 'sumizome'\n{breaks}\nfrom sumizome.cli.main import main; main()"
    script = Path(arguments[arguments.index("--out") + 1]).with_suffix(".py")
    script.write_text(start)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def by_one(case: Case, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The command's words, and what one process makes of them."""
    from sumizome.models.sdxl import load_model

    out = tmp_path_factory.mktemp("one") / "out"
    vae = load_model(tiny_folder, components=("vae",), device=torch.device("cpu")).vae
    config = PrepareConfig(BucketConfig(area=64, step=16), unit_size=3)
    words = ["prepare", str(case.path), "--model", str(tiny_folder), "--area", "64", "--step", "16", "--device", "cpu"]
    words += ["--unit-size", "3"]
    command = " ".join(["sumizome", *words])
    for _ in prepare_latents(case.manifest, vae, out, config, command=command):
        pass
    return words, out


def without_command(root: Path) -> dict[str, str]:
    """Digests of all but the plan, which holds the command and so the folder's own name."""
    return {name: digest for name, digest in tree_digest(root).items() if name != "latents.json"}


@pytest.mark.slow
def test_two_ranks(by_one: tuple[list[str], Path], tmp_path: Path) -> None:
    words, expected = by_one
    done = torchrun(*words, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote 19 latents") == 1, "one rank speaks"
    assert without_command(tmp_path / "out") == without_command(expected)
    assert open_latents(tmp_path / "out").fingerprint == open_latents(expected).fingerprint


BREAKS_RANK_1 = """
if os.environ["RANK"] == "1":
    from sumizome import prepare_encoder
    def broken(vae, pixels):
        raise RuntimeError("CUDA error: device-side assert")
    prepare_encoder.encode_pixels = broken
"""


@pytest.mark.slow
def test_a_rank_that_fails_is_named_and_the_other_finishes(by_one: tuple[list[str], Path], tmp_path: Path) -> None:
    words, expected = by_one
    done = torchrun(*words, "--out", str(tmp_path / "out"), breaks=BREAKS_RANK_1)
    assert done.returncode != 0
    assert "rank 1 on" in done.stdout and "CUDA error" in done.stdout and "finished its units" in done.stdout
    assert without_command(tmp_path / "out") == without_command(expected)


# ── Two preparers ──


def start(case: Case, out: Path) -> BaseProcess:
    return start_preparer(case.manifest, case.vae, out, SMALL_UNITS)


def test_two_preparers_share_the_units(case: Case, tmp_path: Path) -> None:
    children = [start(case, tmp_path / "out") for _ in range(2)]
    steps = list(prepare_latents(case.manifest, case.vae, tmp_path / "out", SMALL_UNITS))
    assert [exit_code(child) for child in children] == [0, 0]
    assert steps[-1].written + steps[-1].rejected == COUNT
    assert tree_digest(tmp_path / "out") == tree_digest(case.expected)


def kill_preparers(case: Case, out: Path, *, at_once: int, kills: int, longest: float) -> int:
    """Keeps some preparers at work on one folder and kills one of them again and again; returns how many died.

    One that had finished before it could be killed does not count.
    """
    rng = np.random.default_rng(0)
    running = [start(case, out) for _ in range(at_once)]
    died = 0
    for _ in range(kills):
        time.sleep(float(rng.uniform(0, longest)))
        victim = running.pop(int(rng.integers(len(running))))
        victim.kill()
        died += exit_code(victim) == -signal.SIGKILL
        running.append(start(case, out))
    assert [exit_code(child) for child in running] == [0] * at_once
    return died


def test_two_preparers_and_three_kills(case: Case, tmp_path: Path) -> None:
    whole = seconds_undisturbed(case.manifest, case.vae, tmp_path, SMALL_UNITS)
    assert kill_preparers(case, tmp_path / "out", at_once=2, kills=3, longest=whole / 2) > 0
    assert tree_digest(tmp_path / "out") == tree_digest(case.expected)


@pytest.mark.slow
def test_eight_preparers_and_twenty_kills(case: Case, tmp_path: Path) -> None:
    """Reliability test 18: the output tree is the undisturbed run's; written + rejected = planned."""
    died = attempt = 0
    while died < 20:
        out = tmp_path / f"out{attempt}"
        attempt += 1
        died += kill_preparers(case, out, at_once=8, kills=8, longest=0.3)
        assert tree_digest(out) == tree_digest(case.expected)
        assert len(open_latents(out)) == COUNT - 1


@pytest.mark.slow
def test_killed_at_twenty_random_moments(case: Case, tmp_path: Path) -> None:
    """kill −9 of one preparer, started again each time, until twenty have died."""
    rng = np.random.default_rng(1)
    died = attempt = 0
    while died < 20:
        out = tmp_path / f"out{attempt}"
        attempt += 1
        for _ in range(4):
            child = start(case, out)
            time.sleep(float(rng.uniform(0.02, 0.8)))
            child.kill()
            died += exit_code(child) == -signal.SIGKILL
        finish(case.manifest, case.vae, out, SMALL_UNITS)
        assert tree_digest(out) == tree_digest(case.expected)


# ── A full disk ──


def test_a_full_disk_costs_one_line_and_no_unit(case: Case, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        ballast = small / "ballast"
        ballast.write_bytes(bytes(200 * 1024))
        with pytest.raises(DataError, match=r"^cannot write .*: No space left on device\.$"):
            finish(case.manifest, case.vae, small / "out", SMALL_UNITS)
        units = list((small / "out" / "units").iterdir())
        assert len([path for path in units if path.suffix == ".json"]) < 7
        assert not [path for path in units if path.name.startswith(".")], "nothing half-written stays"
        ballast.unlink()
        finish(case.manifest, case.vae, small / "out", SMALL_UNITS)
        assert tree_digest(small / "out") == tree_digest(case.expected)
    finally:
        subprocess.run(["umount", str(small)], check=True)
