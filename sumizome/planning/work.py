"""What a run would train on, stage by stage: how much, and on which canvases."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sumizome.data.buckets import BucketConfig, bucket_table
from sumizome.data.shards import load_plan, plan_path
from sumizome.data.store import is_remote
from sumizome.train.config import TrainConfig

__all__ = ["StageWork", "largest", "work_of"]

Canvas = tuple[int, int]
"""(height, width) px"""


@dataclass(frozen=True)
class StageWork:
    """A stage's share of the work. A run without stages has one."""

    canvases: tuple[Canvas, ...]
    """Each is taken as often as any other."""
    images: int
    """Showings in all."""


def work_of(config: TrainConfig, buckets: BucketConfig, images: int = 0) -> tuple[StageWork, ...]:
    """The work of each stage: that of its steps, or `images` showings where they are given (for a run of one stage).

    Canvases are those of the stage's latents; of `buckets` where these are not here, or in a store.
    Raises: ShardError if latents are here and damaged.
    """
    return tuple(
        StageWork(_canvases(Path(span.latents), buckets), images or span.images_per_step * (span.last - span.first))
        for span in config.spans()
    )


def _canvases(latents: Path, buckets: BucketConfig) -> tuple[Canvas, ...]:
    if not is_remote(latents) and plan_path(latents).is_file():
        table: Sequence[Sequence[int]] = load_plan(latents).fingerprint.buckets
    else:
        table = bucket_table(buckets).tolist()
    return tuple((int(height), int(width)) for height, width in table)


def largest(canvases: Sequence[Canvas]) -> Canvas:
    """The canvas of the most pixels."""
    return max(canvases, key=lambda canvas: canvas[0] * canvas[1])
