"""A small latent cache on disk, of known content, that several test files damage."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from sumizome.data.latent_index import LatentIndex
from sumizome.data.latent_plan import CachePlan, Fingerprint, write_plan
from sumizome.data.shards import commit_unit

FINGERPRINT = Fingerprint(
    vae_digest="v" * 64,
    vae_factor=8,
    latent_mean=(0.0, 0.0, 0.0, 0.0),
    latent_std=(1.0, 1.0, 1.0, 1.0),
    buckets=((64, 32), (32, 64)),
    max_aspect_error=4.0,
    crop="random",
    crop_seed=0,
    resize="pillow-lanczos-1",
    manifest_digest="m" * 64,
)
PLAN = CachePlan(FINGERPRINT, images=24, unit_size=8, command="sumizome prepare m.parquet --model x --out y")


def latent(number: int) -> np.ndarray:
    """Picture number's latent: both buckets in turn."""
    height, width = FINGERPRINT.buckets[number % 2]
    return np.random.default_rng(number).normal(0, 7, (4, height // 8, width // 8)).astype(np.float16)


def write_cache(root: Path) -> Path:
    """Three units of eight pictures."""
    write_plan(root, PLAN)
    for unit in range(PLAN.units):
        numbers = list(PLAN.rows(unit))
        sides = [FINGERPRINT.buckets[number % 2] for number in numbers]
        columns = {
            "id": [f"id{number}" for number in numbers],
            "bucket_h": [height for height, _ in sides],
            "bucket_w": [width for _, width in sides],
            "original_h": [height for height, _ in sides],
            "original_w": [width for _, width in sides],
            "crop_top": [0] * len(numbers),
            "crop_left": [0] * len(numbers),
            "tags": [[f"tag {number}"] for number in numbers],
            "kept_tags": [0] * len(numbers),
            "repeats": [1] * len(numbers),
        }
        commit_unit(root, PLAN, unit, [latent(number) for number in numbers], columns, [])
    return root


def tag_table(index: LatentIndex, rows: np.ndarray) -> pa.Table:
    """Columns `tags` and `repeats` of some rows, as `tags.tag_loss_weights` takes them."""
    tags = pa.array(index.tag_lists(rows), pa.list_(pa.string()))
    return pa.table({"tags": tags, "repeats": np.asarray(index.repeats[rows])})
