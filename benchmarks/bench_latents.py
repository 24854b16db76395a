"""Reading cached latents warm: random rows in batches of 32, each record checked by its CRC-32, as float32 tensors.

Beside it in the same run: the same records by safetensors' slices, unchecked, and a numpy memory map, unchecked, which
is the limit. The sets are synthetic and lie in the page cache. `--threads` reads with several, as a loader does;
"per CPU second" is what one core does, also on a busy machine.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache as remembered
from pathlib import Path

import numpy as np
import torch
from measurement import record
from safetensors import safe_open

from sumizome.data.latent_plan import CachePlan, Fingerprint, write_plan
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.shards import commit_unit, tensor_name, unit_paths

SIDES = (64, 512, 1024)  # px
UNIT, BATCH, TARGET = 512, 32, 10_000


def write_set(root: Path, side: int, count: int) -> None:
    fingerprint = Fingerprint(
        "v" * 64, 8, (0.0,) * 4, (1.0,) * 4, ((side, side),), 4.0, "random", 0, "synthetic", "m" * 64
    )
    plan = CachePlan(fingerprint, count, UNIT, "benchmark")
    write_plan(root, plan)
    random = np.random.default_rng(0)
    for unit in range(plan.units):
        rows = list(plan.rows(unit))
        same = [side] * len(rows)
        zeros = [0] * len(rows)
        columns = {"id": [f"id{row}" for row in rows], "bucket_h": same, "bucket_w": same, "original_h": same}
        columns |= {"original_w": same, "crop_top": zeros, "crop_left": zeros, "kept_tags": zeros}
        columns |= {"tags": [["1girl"]] * len(rows), "repeats": [1] * len(rows)}
        latents = [random.standard_normal((4, side // 8, side // 8)).astype(np.float16) for _ in rows]
        commit_unit(root, plan, unit, latents, columns, [])


def rate(read: Callable[[np.ndarray], object], count: int, threads: int) -> tuple[float, float]:
    """Samples a second and a CPU second, each the best of three passes in three different orders."""
    best, best_cpu = 0.0, 0.0
    with ThreadPoolExecutor(threads) as pool:
        for seed in range(4):
            batches = np.split(np.random.default_rng(seed).permutation(count), range(BATCH, count, BATCH))
            started, started_cpu = time.perf_counter(), time.process_time()
            for _ in pool.map(read, batches):
                pass
            if seed:  # the first pass warms
                best = max(best, count / (time.perf_counter() - started))
                best_cpu = max(best_cpu, count / (time.process_time() - started_cpu))
    return best, best_cpu


def by_slices(cache: LatentCache, root: Path, side: int) -> Callable[[np.ndarray], torch.Tensor]:
    @remembered
    def opened(unit: int) -> object:
        return safe_open(unit_paths(root, unit)[0], framework="np").get_slice(tensor_name(side, side))

    def read(rows: np.ndarray) -> torch.Tensor:
        records = [opened(int(cache.index.unit[row]))[(at := int(cache.index.row[row])) : at + 1] for row in rows]
        return torch.from_numpy(np.concatenate(records)).float()

    return read


def by_memory_map(root: Path, side: int, count: int) -> Callable[[np.ndarray], torch.Tensor]:
    shape = (count, 4, side // 8, side // 8)
    np.lib.format.open_memmap(root / "all.npy", "w+", np.float16, shape)[:] = 1
    mapped = np.load(root / "all.npy", mmap_mode="r")
    return lambda rows: torch.from_numpy(mapped[rows]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=400, help="size of each set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for side in SIDES:
        size = 4 * (side // 8) ** 2 * 2
        count = min(16 * UNIT, arguments.megabytes * 10**6 // size)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_set(root, side, count)
            cache = open_latents(root, "size")
            for threads in sorted({1, arguments.threads}):
                ours = rate(cache.read, count, threads)
                what = f"cached latents of {side}x{side} px ({size} bytes), threads: {threads}"
                peers = {
                    "safetensors get_slice, unchecked": by_slices(cache, root, side),
                    "numpy memmap, unchecked (limit)": by_memory_map(root, side, count),
                }
                for peer, read in peers.items():
                    theirs = rate(read, count, threads)
                    for unit, mine, its in zip(("samples/s", "samples/CPU s"), ours, theirs, strict=True):
                        record(what, mine, unit, target=TARGET, better="higher", peer=peer, peer_value=its)


if __name__ == "__main__":
    main()
