"""A run of the tiny model on synthetic latents, as `make demo` trains it: 16 pictures of 64² px a step, made in code.

Owns the folder with model and latents that training benchmarks share, and the config; it trains nothing.
"""

from pathlib import Path

import numpy as np
from synthetic_tags import synthetic_tags, vocabulary

from sumizome.data.latent_plan import CachePlan, Fingerprint, write_plan
from sumizome.data.shards import commit_unit
from sumizome.export import write_diffusers_folder
from sumizome.models.tiny import build_tiny_model
from sumizome.models.vae import vae_digest
from sumizome.train.config import CheckpointConfig, TrainConfig, ValidationConfig
from sumizome.train.ema import EmaConfig
from sumizome.train.optim import OptimConfig

__all__ = ["BATCH", "SIDE", "make_inputs", "tiny_config"]

SIDE = 64  # px
BATCH = 16
_UNIT, _COUNT, _MEAN_TAGS = 512, 4096, 12


def make_inputs(folder: Path) -> None:
    """The tiny model and latents for it, below `folder`."""
    model = build_tiny_model(seed=0)
    write_diffusers_folder(model, folder / "tiny")
    fingerprint = Fingerprint(
        vae_digest(model.vae), 4, (0.0,) * 4, (1.0,) * 4, ((SIDE, SIDE),), 4.0, "random", 0, "synthetic", "m" * 64
    )
    plan = CachePlan(fingerprint, _COUNT, _UNIT, "benchmark")
    write_plan(folder / "latents", plan)
    random = np.random.default_rng(0)
    tags = synthetic_tags(_COUNT, _MEAN_TAGS, vocabulary(5000)).to_pylist()
    for unit in range(plan.units):
        rows = list(plan.rows(unit))
        same, zeros = [SIDE] * len(rows), [0] * len(rows)
        columns = {"id": [f"id{row}" for row in rows], "bucket_h": same, "bucket_w": same, "original_h": same}
        columns |= {"original_w": same, "crop_top": zeros, "crop_left": zeros, "kept_tags": zeros}
        columns |= {"tags": [list(dict.fromkeys(tags[row])) for row in rows], "repeats": [1] * len(rows)}
        latents = [random.standard_normal((4, SIDE // 4, SIDE // 4)).astype(np.float16) for _ in rows]
        commit_unit(folder / "latents", plan, unit, latents, columns, [])


def tiny_config(folder: Path, steps: int, *, checkpoint_every: int = 0) -> TrainConfig:
    """The run's settings; logging, TensorBoard, EMA, clipping and prefetching are on, as they are by default."""
    return TrainConfig(
        model=folder / "tiny",
        latents=folder / "latents",
        run_dir=folder / "run",
        steps=steps,
        micro_batch_size=BATCH,
        max_chunks=1,
        device="cpu",
        optim=OptimConfig(lr=1e-4, warmup_steps=0),
        ema=EmaConfig(decay=0.995),
        validation=ValidationConfig(every=0),
        checkpoint=CheckpointConfig(every=checkpoint_every),
    )
