"""The plan at the report's scale: six million records opened, put into buckets, planned, held and shared by 256 ranks.

    python benchmarks/bench_plan.py [records]          # 6 000 000; the synthetic manifest is kept in build/bench

Each figure is taken in a process of its own. "held" is anonymous memory (/proc/self/smaps_rollup) beyond that of one
that has only imported the same modules. Pages of mapped files are not in it: all processes of a machine share them, and
the kernel takes them back when it needs them. Cost of a micro-batch = pixels of its bucket.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measurement import peak_memory, record
from synthetic_manifest import made_sizes, make_manifest

from sumizome.data.batch_plan import BatchPlan
from sumizome.data.buckets import BucketConfig, assign_buckets, bucket_classes, bucket_report, bucket_table
from sumizome.data.index_cache import mapped_index
from sumizome.data.latent_index import LatentIndex, column_parts
from sumizome.data.latent_plan import CachePlan, Fingerprint
from sumizome.data.latents import LatentCache
from sumizome.data.loader import build_loader
from sumizome.data.manifest import picture_sizes
from sumizome.data.shard_files import LocalShards
from sumizome.data.stored_manifest import open_manifest
from sumizome.data.tags import TagWeightConfig

FOLDER = Path("build/bench")
SIZE, RANKS = 16, 256
REPORT_TABLE = BucketConfig(area=(512, 768), min_side=256, max_side=1024)
SDXL_TABLE = BucketConfig()
OBJECTS = 200_000


def manifest_path(records: int) -> Path:
    return FOLDER / f"manifest-{records}.parquet"


def private_mb() -> float:
    """MB (10⁶) of this process that no file backs and no other process can share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024 / 1e6


def plan_of(sizes: np.ndarray, repeats: np.ndarray, config: BucketConfig = SDXL_TABLE) -> BatchPlan:
    table = bucket_table(config)
    return BatchPlan(
        assign_buckets(sizes, table).bucket,
        repeats,
        micro_batch_size=SIZE,
        micro_batches_per_step=RANKS,
        seed=1,
        class_of_bucket=bucket_classes(table).tolist(),
    )


# ── One figure a process: each returns numbers ──


def start(records: int) -> dict[str, float]:
    """From the file to the first step of the first epoch; every check is made, and peak memory taken."""
    began, cpu = time.perf_counter(), time.process_time()
    columns = open_manifest(manifest_path(records), ["height", "width", "repeats"])
    opened = time.perf_counter() - began
    plan_of(picture_sizes(columns), columns.column("repeats")).step(0, 0, RANKS)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "opened": opened, "cpu": time.process_time() - cpu, "peak": peak_memory() / 1e6}


def plain_read(records: int) -> dict[str, float]:
    began = time.perf_counter()
    table = pq.read_table(manifest_path(records))
    seconds = time.perf_counter() - began
    assert len(table) == records
    return {"seconds": seconds, "peak": peak_memory() / 1e6}


class ImageObject:
    """One object a picture, with a dict: how trainers that grew from scripts hold a set."""

    def __init__(self, row: dict[str, Any], buckets: list[tuple[int, int]]) -> None:
        self.image_key = self.absolute_path = f"/pictures/{row['path']}"
        self.caption = ", ".join(row["tags"])
        self.num_repeats = row["repeats"]
        self.image_size = (row["width"], row["height"])
        aspect = row["width"] / row["height"]
        self.bucket_reso = min(buckets, key=lambda canvas: abs(canvas[1] / canvas[0] - aspect))
        self.latents_npz = self.absolute_path + ".npz"


def objects(records: int) -> dict[str, float]:
    file = pq.ParquetFile(manifest_path(records))
    table = file.read_row_groups(list(range(min(2, file.num_row_groups)))).slice(0, OBJECTS)
    before, began = private_mb(), time.perf_counter()
    buckets = [(height, width) for height, width in bucket_table(SDXL_TABLE).tolist()]
    held = {row["id"]: ImageObject(row, buckets) for batch in table.to_batches(2048) for row in batch.to_pylist()}
    order = list(held)
    random.Random(0).shuffle(order)
    factor = records / len(held)
    return {"seconds": (time.perf_counter() - began) * factor, "held": (private_mb() - before) * factor}


def joined_index(records: int) -> LatentIndex:
    """The index that `open_latents` would join, made of the manifest's rows in units of 2 048."""
    table = bucket_table(SDXL_TABLE)

    def units() -> Iterator[pa.Table]:
        # Not read as a dictionary: each part of 2 048 rows would carry the vocabulary of 131 072.
        for batch in pq.ParquetFile(manifest_path(records)).iter_batches(2048):
            tags = batch["tags"]
            tags = pa.ListArray.from_arrays(tags.offsets, tags.values.dictionary_encode())
            sizes = np.stack([batch["height"].to_numpy(), batch["width"].to_numpy()], axis=1)
            canvas = table[assign_buckets(sizes, table).bucket].astype(np.int32)
            row = np.arange(len(batch), dtype=np.int32)
            facts = {"bucket_h": canvas[:, 0], "bucket_w": canvas[:, 1], "row": row, "crc32": row.astype(np.uint32)}
            facts |= {"original_h": batch["height"], "original_w": batch["width"], "crop_top": row, "crop_left": row}
            facts["variant"] = np.zeros(len(batch), np.int16)
            yield pa.table(facts | {"tags": tags} | {name: batch[name] for name in ("id", "kept_tags", "repeats")})

    return mapped_index(FOLDER / "index", f"bench-{records}", lambda: column_parts(units(), fingerprint()))


def fingerprint() -> Fingerprint:
    buckets = tuple((height, width) for height, width in bucket_table(SDXL_TABLE).tolist())
    return Fingerprint("v", 8, (0.0,) * 4, (1.0,) * 4, buckets, 4.0, "random", 0, "none", "m")


class WithoutLatents(LatentCache):
    """A cache whose latents are zeros of the right shape: what is measured here is everything else."""

    def read(self, rows: np.ndarray) -> torch.Tensor:
        height, width = self.buckets[self.index.bucket[rows[0]]].tolist()
        return torch.zeros(len(rows), 4, height // 8, width // 8)


def held(records: int, strength: float = 0.5) -> dict[str, float]:
    """What a training process holds; the joined index is there already, as for all but the first process."""
    before, began = private_mb(), time.perf_counter()
    plan, none = CachePlan(fingerprint(), records, 2048, "none"), LocalShards(lambda _: FOLDER, "none")
    cache = WithoutLatents(FOLDER, plan, joined_index(records), none)
    loader = build_loader(
        cache,
        seed=1,
        micro_batch_size=SIZE,
        micro_batches_per_step=RANKS,
        validation_count=2000,
        tag_weights=TagWeightConfig(strength=strength),
        rank=3,
        world=RANKS,
    )
    seconds = time.perf_counter() - began
    batches = timed(lambda step: loader.step(step), range(1000, 1200))
    return {"seconds": seconds, "held": private_mb() - before, "batch_ms": batches, "peak": peak_memory() / 1e6}


def timed(work: Callable[[int], Any], steps: range) -> float:
    """Milliseconds, the mean: a plan works out many steps at once, so most calls cost nothing and a few cost it all."""
    began = time.perf_counter()
    for step in steps:
        work(step)
    return (time.perf_counter() - began) / len(steps) * 1e3


def steps(records: int) -> dict[str, float]:
    """The time from a step's number to the rows of its micro-batches."""
    sizes, repeats = made_sizes(records), np.ones(records, np.int32)  # the manifest's
    plan = plan_of(sizes, repeats)
    # The first call of a process is mostly numpy's own first calls, wherever it begins.
    first, jump = (timed(lambda step: plan.step(step, 3, RANKS), range(step, step + 1)) for step in (100_000, 200_000))
    per_epoch = int(plan.steps_per_epoch)
    classes = plan_of(sizes, repeats, BucketConfig(areas=(512, 768, 1024)))
    return {
        "first_at_100000": first,
        "jump_to_200000": jump,
        "at_0": timed(lambda step: plan.step(step, 3, RANKS), range(320)),
        "at_100000": timed(lambda step: plan.step(step, 3, RANKS), range(100_000, 100_320)),
        "over_an_epoch_end": timed(
            lambda step: plan.step(step, 3, RANKS), range(max(0, per_epoch - 160), per_epoch + 160)
        ),
        "whole_step": timed(plan.step, range(100_000, 100_064)),
        "with_classes": timed(lambda step: classes.step(step, 3, RANKS), range(100_000, 100_320)),
    }


def listed_order(records: int) -> dict[str, float]:
    """The other way: a new epoch's order as an array."""
    began = time.perf_counter()
    np.random.Generator(np.random.PCG64(1)).permutation(records)
    return {"ms": (time.perf_counter() - began) * 1e3}


def epoch(records: int, areas: tuple[int, ...] = ()) -> dict[str, float]:
    """All steps of an epoch: how evenly 256 ranks are busy, and that every picture comes once or is carried."""
    config = BucketConfig(areas=areas)
    plan, table = plan_of(made_sizes(records), np.ones(records, np.int32), config), bucket_table(config)
    area = table.prod(axis=1)
    seen, busy = np.zeros(records, np.uint8), []
    count = int(plan.steps_per_epoch)
    for step in range(count):
        batches = plan.step(step)
        cost = np.array([area[batch.bucket] for batch in batches])
        busy.append(cost.mean() / cost.max())
        rows = np.concatenate([batch.rows[batch.epochs == 0] for batch in batches])
        np.add.at(seen, rows, 1)
    assert seen.max() == 1, "a picture came twice in an epoch"
    carried = int((seen == 0).sum())
    return {"utilisation": float(np.mean(busy)), "least": float(np.min(busy)), "carried": carried, "steps": count}


def fit(records: int) -> dict[str, float]:
    sizes, found = made_sizes(records), {}
    for name, config in (("report", REPORT_TABLE), ("sdxl", SDXL_TABLE)):
        report = bucket_report(sizes, bucket_table(config), 4.0)
        found |= {f"{name}_error": report.mean(report.aspect_error), f"{name}_crop": report.mean(report.crop_share)}
    return found


PARTS = {part.__name__: part for part in (start, plain_read, objects, held, steps, listed_order, epoch, fit)}


def measure(name: str, records: int, *more: str) -> dict[str, float]:
    command = [sys.executable, __file__, str(records), name, *more]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(json.loads(lines[-1]))


def main(records: int) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_manifest(manifest_path(records), records)
    found, plain, python = (measure(name, records) for name in ("start", "plain_read", "objects"))
    of = f"{records / 1e6:g} M records"
    lower: dict[str, Any] = {"better": "lower"}
    reading = "pyarrow.parquet.read_table, nothing checked"
    one_each = f"one object a picture, {OBJECTS} extrapolated, file already read"
    record(f"{of}: opened, checked, in buckets, planned", found["seconds"], "s", target=20, **lower)
    record("the same, beside", found["seconds"], "s", peer=reading, peer_value=plain["seconds"], **lower)
    record("the same, beside", found["seconds"], "s", peer=one_each, peer_value=python["seconds"], **lower)
    record("the same, processor time", found["cpu"], "s", **lower)
    record("peak memory of it", found["peak"], "MB", target=1500, peer=reading, peer_value=plain["peak"], **lower)
    began = time.perf_counter()
    joined_index(records)
    record("joined index made, once a machine (or found)", time.perf_counter() - began, "s", **lower)
    mine = measure("held", records)
    record(
        "held by a training process", mine["held"], "MB", target=300, peer=one_each, peer_value=python["held"], **lower
    )
    record("loader built, index mapped and verified, tag weights made", mine["seconds"], "s", **lower)
    record("one micro-batch of 16 with captions, without latents", mine["batch_ms"], "ms", **lower)
    cost, listed = measure("steps", records), measure("listed_order", records)["ms"]
    numpy = "numpy's permutation of all records, at an epoch's start"
    record("step to a rank's rows, step 0 on", cost["at_0"], "ms", target=1, **lower)
    record("step to a rank's rows, step 100 000 on", cost["at_100000"], "ms", target=1, **lower)
    record(
        "the first step of a run resumed at 100 000",
        cost["first_at_100000"],
        "ms",
        peer=numpy,
        peer_value=listed,
        **lower,
    )
    record("a jump to 200 000 after that, in the same process", cost["jump_to_200000"], "ms", **lower)
    record("step to a rank's rows, over an epoch's end", cost["over_an_epoch_end"], "ms", target=1, **lower)
    record("step to a rank's rows, with area classes", cost["with_classes"], "ms", target=1, **lower)
    record("the rows of all 256 micro-batches of a step", cost["whole_step"], "ms", **lower)
    for areas in ((), ("512", "768", "1024")):
        shared = measure("epoch", records, *areas)
        name = f"utilisation of {RANKS} ranks" + (", area classes 512 768 1024" if areas else "")
        record(name, shared["utilisation"], "share", target=0.97, better="higher")
        record(f"carried into the next epoch, of {records}; none twice", shared["carried"], "pictures", **lower)
    shape = measure("fit", records)
    at = "report, 5.3 M pictures of its own"
    record("mean aspect error, 19 buckets", shape["report_error"], "", peer=at, peer_value=0.033, **lower)
    record("mean share cropped, 19 buckets", shape["report_crop"], "share", **lower)
    record("mean aspect error, 1024² buckets", shape["sdxl_error"], "", **lower)
    record("mean share cropped, 1024² buckets", shape["sdxl_crop"], "share", **lower)


if __name__ == "__main__":
    count, *part = sys.argv[1:] or ["6000000"]
    if part:
        result = epoch(int(count), tuple(map(int, part[1:]))) if part[0] == "epoch" else PARTS[part[0]](int(count))
        print(json.dumps(result))
    else:
        main(int(count))
