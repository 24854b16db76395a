"""How long a save keeps training waiting: a 2 GB state, saved in the background, against torch's own asynchronous save,
a synchronous save of ours and a plain synchronous write of the same tensors.

    python benchmarks/bench_checkpoint.py [--gigabytes 2]
"""

import argparse
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from measurement import progress, record
from safetensors.torch import save_file

from sumizome.distributed.runtime import Ranks
from sumizome.train.checkpoint import PARTS, Checkpoint
from sumizome.train.saver import Saver

STALL = 1.0
"""s"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    gigabytes = parser.parse_args().gigabytes
    size = f"{gigabytes:g} GB"
    progress(f"a state of {size} is being made")
    state = _made_up_state(gigabytes)
    whole = {f"{part}.{name}": tensor for part in PARTS for name, tensor in getattr(state, part).items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress("torch's own asynchronous saves")
        theirs = _torch_async(folder / "theirs", whole)
        shutil.rmtree(folder / "theirs")
        progress("ours in the background")
        stalls, writes = _in_background(folder / "ours", state, gigabytes)
        shutil.rmtree(folder / "ours")
        for which, place in (("first", 0), ("later", -1)):
            record(
                f"stall of a save, {size}, {which}",
                stalls[place],
                "s",
                target=STALL,
                better="lower",
                peer="dcp.async_save",
                peer_value=theirs[place],
            )
        record(f"whole save with digests, fsync and read-back, {size}", writes[-1], "s", better="lower")
        progress("writing that training waits for")
        record(
            f"stall of a save, {size}, synchronous",
            _synchronous(folder / "synchronous", state),
            "s",
            better="lower",
            peer="safetensors.save_file and fsync, no digests",
            peer_value=_plain_write(folder / "plain.safetensors", whole),
        )


def _made_up_state(gigabytes: float) -> Checkpoint:
    """Weights, average and two moments, in tensors of 4 MB."""
    count = round(gigabytes * 1e9 / 4 / 4e6)
    parts = [{f"unet.{i}": torch.randn(1000, 1000) for i in range(count)} for _ in range(4)]
    moments = {f"{name}/exp_avg": t for name, t in parts[2].items()}
    return Checkpoint(1, parts[0], parts[1], moments | {f"{name}/exp_avg_sq": t for name, t in parts[3].items()})


def _in_background(folder: Path, state: Checkpoint, gigabytes: float) -> tuple[list[float], list[float]]:
    """Seconds that each of three saves keeps training waiting, and that it takes in all."""
    saver = Saver(folder, Ranks(), keep=2)
    saver.reserve(state)
    time.sleep(3 * gigabytes)  # a trainer's steps between its first one and its first save
    stalls, writes = [], []
    for step in (1, 2, 3):
        started = time.perf_counter()
        saver.save(replace(state, step=step))
        stalls.append(saver.stall)
        saver.finish()
        writes.append(time.perf_counter() - started)
        progress(f"save {step}: stall {stalls[-1]:.2f} s, written after {writes[-1]:.1f} s")
    saver.close()
    return stalls, writes


def _synchronous(folder: Path, state: Checkpoint) -> float:
    """Seconds that a save takes when training waits for all of it."""
    saver = Saver(folder, Ranks(), keep=2, asynchronous=False)
    saver.save(state)
    saver.close()
    return saver.stall


def _plain_write(path: Path, state: dict[str, torch.Tensor]) -> float:
    """Seconds that the least possible write of the same tensors takes until it is on the disk."""
    started = time.perf_counter()
    save_file(state, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _torch_async(folder: Path, state: dict[str, torch.Tensor]) -> list[float]:
    """Seconds that torch's asynchronous save of the same tensors takes to return."""
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    stalls = []
    for step in (1, 2):
        started = time.perf_counter()
        saved = dcp.async_save(dict(state), checkpoint_id=str(folder / str(step)))
        stalls.append(time.perf_counter() - started)
        getattr(saved, "upload_completion", saved).result()
    dist.destroy_process_group()
    return stalls


if __name__ == "__main__":
    main()
