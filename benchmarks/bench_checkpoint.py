"""How long a save keeps training waiting: a 2 GB state, saved in the background, against torch's own asynchronous save.

python benchmarks/bench_checkpoint.py [--gigabytes 2]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measurement import record

from sumizome.distributed.runtime import Ranks
from sumizome.train.checkpoint import Checkpoint
from sumizome.train.saver import Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    gigabytes = parser.parse_args().gigabytes
    # Weights, average and two moments, in tensors of 4 MB.
    count = round(gigabytes * 1e9 / 4 / 4e6)
    parts = [{f"unet.{i}": torch.randn(1000, 1000) for i in range(count)} for _ in range(4)]
    moments = {f"{name}/exp_avg": t for name, t in parts[2].items()}
    moments |= {f"{name}/exp_avg_sq": t for name, t in parts[3].items()}
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder) / "ours", Ranks(), keep=2)
        saver.reserve(Checkpoint(0, parts[0], parts[1], moments))
        time.sleep(3 * gigabytes)  # a trainer's steps between its first one and its first save
        stalls, writes = [], []
        for step in (1, 2, 3):
            started = time.perf_counter()
            saver.save(Checkpoint(step, parts[0], parts[1], moments))
            stalls.append(saver.stall)
            saver.finish()
            writes.append(time.perf_counter() - started)
        saver.close()
        theirs = _torch_async(
            Path(folder) / "theirs", {**parts[0], **{f"ema.{k}": v for k, v in parts[1].items()}, **moments}
        )
    size = f"{gigabytes:g} GB"
    record(
        f"stall of a save, {size}, first",
        stalls[0],
        "s",
        target=1.0,
        better="lower",
        peer="dcp.async_save",
        peer_value=theirs[0],
    )
    record(
        f"stall of a save, {size}, later",
        stalls[-1],
        "s",
        target=1.0,
        better="lower",
        peer="dcp.async_save",
        peer_value=theirs[-1],
    )
    record(f"whole save with digests, fsync and read-back, {size}", writes[-1], "s", better="lower")


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
