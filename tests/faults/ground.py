"""The ground that faults are tried on: a small model, its latents, runs as forked processes, and states compared.

Everything heavy is imported once; a run is a fork, which starts in milliseconds and can be killed like any process.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch

import sumizome.train.build
from sumizome.cli.main import main
from sumizome.train.checkpoint import PARTS, list_checkpoints, open_checkpoint
from sumizome.train.metrics import read_metrics

__all__ = [
    "Ground",
    "Run",
    "equal",
    "farthest",
    "losses",
    "samples",
    "small_disk",
    "state",
    "until_training",
]

_FORK = multiprocessing.get_context("fork")


class Run:
    """Ranks at work on a run directory."""

    def __init__(self, ranks: list[Any], logs: list[Path]) -> None:
        self.ranks, self._logs = ranks, logs

    def signal(self, number: int, rank: int | None = None) -> None:
        for index, process in enumerate(self.ranks):
            if rank in (None, index) and process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds: float = 600.0) -> list[int | None]:
        """The exit status of each rank; None for one that was still running after so many seconds, and is killed."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        self.signal(signal.SIGKILL)
        for process in self.ranks:
            process.join()
        return codes

    def said(self, rank: int = 0) -> str:
        return self._logs[rank].read_text(errors="replace") if self._logs[rank].exists() else ""


class Ground:
    """Makes model and latents below `work`, and starts runs on them."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        child = _FORK.Process(target=_make, args=(work,))
        child.start()
        child.join()
        assert child.exitcode == 0, "the small model or its latents could not be made"

    def start(
        self, run_dir: Path, *flags: str, world: int = 1, first: Callable[[int], None] | None = None, **changes: Any
    ) -> Run:
        """Starts `sumizome train` on as many ranks; `first(rank)` runs in each before it, to prepare a fault."""
        run_dir.mkdir(parents=True, exist_ok=True)
        arguments = ["train", str(self.work / "run.toml"), "--run-dir", str(run_dir), *flags]
        for name, value in changes.items():
            arguments += [f"--{name.replace('__', '.').replace('_', '-')}", str(value)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [run_dir.parent / f"{run_dir.name}.rank-{rank}.log" for rank in range(world)]
        ranks = [
            _FORK.Process(target=_rank, args=(rank, world, port, logs[rank], arguments, first)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        return Run(ranks, logs)

    def train(self, run_dir: Path, *flags: str, world: int = 1, **changes: Any) -> None:
        """Trains to the end, undisturbed."""
        run = self.start(run_dir, *flags, world=world, **changes)
        codes = run.wait()
        assert codes == [0] * world, f"{codes}: {run.said()[-2000:]}"


def _rank(
    rank: int, world: int, port: int, log: Path, arguments: list[str], first: Callable[[int], None] | None
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status: Any = 1
    try:
        if first is not None:
            first(rank)
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(int(status or 0))


_TOML = """
model = "{work}/small"
latents = "{work}/latents"
run_dir = "{work}/run"
steps = {steps}
micro_batch_size = 2
micro_batches_per_step = 4
max_chunks = 1
log_every = 1
log_samples = true
tensorboard = false
device = "cpu"
[optim]
lr = 1e-4
eps = 1e-3
warmup_steps = 2
[captions]
tag_dropout = 0.2
caption_dropout = 0.2
[validation]
every = 0
[checkpoint]
every = 1
keep = 2
"""


def _make(work: Path) -> None:
    """A U-Net of SDXL's architecture with 0.5 M parameters, forty pictures, their latents, and the run's settings."""
    from dataclasses import replace

    import numpy as np
    from PIL import Image

    from sumizome.data.buckets import BucketConfig
    from sumizome.data.ingest import ingest
    from sumizome.export import write_diffusers_folder
    from sumizome.models.architecture import unet_config
    from sumizome.models.networks import build_network
    from sumizome.models.tiny import build_tiny_model
    from sumizome.prepare import PrepareConfig, prepare_latents

    torch.manual_seed(0)
    tiny = build_tiny_model()
    unet = unet_config(
        block_out_channels=(32, 64),
        transformer_layers=(0, 1),
        layers_per_block=1,
        cross_attention_dim=160,
        pooled_dim=96,
    )
    small = replace(tiny, networks={**tiny.networks, "unet": build_network("unet", unet).eval()})
    write_diffusers_folder(small, work / "small")
    pictures = work / "pictures"
    pictures.mkdir()
    colours = np.random.default_rng(0)
    for index in range(40):
        pixels = colours.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(pictures / f"{index:03d}.png")
        (pictures / f"{index:03d}.txt").write_text(f"picture, kind {index % 4}, hue {pixels[0, 0, 0] // 32}")
    manifest = ingest([pictures], workers=0).manifest
    for _ in prepare_latents(manifest, small.vae, work / "latents", PrepareConfig(BucketConfig(area=32, step=16))):
        pass
    (work / "run.toml").write_text(_TOML.format(work=work, steps=12))


def state(run_dir: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The newest checkpoint's step and every tensor, verified."""
    saved = open_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    return saved.step, {f"{part}:{name}": value for part in PARTS for name, value in saved.read(part).items()}


def samples(run_dir: Path) -> list[dict[str, Any]]:
    """What every step trained on, by all ranks, in the order of the global batch."""
    lines = [line for path in (run_dir / "samples").glob("rank-*.jsonl") for line in read_metrics(path)]
    return sorted(lines, key=lambda line: (line["step"], line["place"]))


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line}


def equal(one: Path, other: Path) -> bool:
    """Whether two runs stand at the same step with the same weights, moments, average and samples, bit for bit."""
    (step, a), (other_step, b) = state(one), state(other)
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return step == other_step and same and samples(one) == samples(other)


def farthest(one: Path, other: Path) -> float:
    """The largest absolute difference between two runs' weights and averages."""
    (_, a), (_, b) = state(one), state(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a if not name.startswith("optimizer"))


def until_training(run: Run, run_dir: Path, seconds: float = 120.0, lines: int = 1) -> bool:
    """Waits until the run has written that many lines of its sample log; False if it ended before."""
    before = len(samples(run_dir)) if (run_dir / "samples").exists() else 0
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.is_alive() for process in run.ranks):
        if (run_dir / "samples").exists() and len(samples(run_dir)) >= before + lines:
            return True
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[None]:
    """A tmpfs of that size at `path`. Raises: PermissionError where this user may not mount one."""
    path.mkdir(parents=True, exist_ok=True)
    if os.system(f"mount -t tmpfs -o size={megabytes}m tmpfs '{path}' 2>/dev/null"):
        raise PermissionError("mounting a tmpfs needs root")
    try:
        yield
    finally:
        os.system(f"umount -l '{path}'")


_ = sumizome.train.build  # imported for its weight: forks find it there
