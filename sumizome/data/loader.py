"""From the plan and the latents to what a step trains on: micro-batches with captions, sizes, weights and seeds.

Owns `TrainBatch`, the split that holds pictures out for validation, and prefetching. The invariant: the micro-batches
of a step are a function of (latents, settings, seed, step), the same bits with or without prefetching, in a new
process, and whatever steps came before.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sumizome.data.batch_plan import BatchPlan, MicroBatch
from sumizome.data.captions import CaptionConfig, build_caption, plain_caption
from sumizome.data.latents import LatentCache
from sumizome.data.tag_table import load_tag_table
from sumizome.data.tags import TagWeightConfig, tag_loss_weights
from sumizome.errors import ConfigError
from sumizome.seeds import derive_seed
from sumizome.shapes import Latents, PerSample, TimeIds

__all__ = ["BatchLoader", "StepBatches", "TrainBatch", "build_loader", "split_validation"]


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """One micro-batch: samples of one bucket."""

    latents: Latents
    """Clean and normalised, float32."""
    captions: list[str]
    time_ids: TimeIds
    """Pixels: original (height, width), crop (top, left) in the resized picture, target (height, width); float32."""
    tag_weight: PerSample
    """Loss weight of each sample, float32."""
    sample_ids: list[str]
    epochs: list[int]
    """Each sample's own epoch: whole passes over its bucket before this one."""
    seeds: Int[Tensor, " b"]
    """int64: each sample's noise and timestep follow from it."""


def split_validation(ids: pa.ChunkedArray, count: int) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " v"]]:
    """(rows to train on, rows held out), each rising: `count` pictures chosen by a hash of their id.

    The choice of a picture does not depend on the others' order, and adding pictures to a set replaces few of those
    held out. A byte-identical copy of a held-out picture ("…-2") is in neither part: training on it would be cheating.
    Raises: ConfigError if nothing would be left to train on.
    """
    if count == 0:
        return np.arange(len(ids)), np.arange(0)
    pictures = [sample_id.partition("-")[0] for chunk in ids.iterchunks() for sample_id in chunk.to_pylist()]
    hashes = b"".join(hashlib.blake2b(f"validation {name}".encode(), digest_size=8).digest() for name in pictures)
    _, first, picture = np.unique(np.frombuffer(hashes, np.uint64), return_index=True, return_inverse=True)
    train = np.flatnonzero(picture >= count)
    if len(train) == 0:
        raise ConfigError(f"{count} pictures are to be held out for validation, but there are {len(first)} in all")
    return train, np.sort(first[:count])


def build_loader(
    cache: LatentCache,
    *,
    seed: int,
    micro_batch_size: int,
    micro_batches_per_step: int = 1,
    validation_count: int = 0,
    captions: CaptionConfig | None = None,
    tag_weights: TagWeightConfig | None = None,
    categories: Mapping[str, str] | None = None,
    prefetch: int = 2,
) -> "BatchLoader":
    """The loader of a run; `prefetch` steps are made ahead, 0 = none.

    `categories` maps tags to their category; by default it is what came with the pictures. Those of `tag_weights.table`
    go before either.

    Raises: ConfigError, DataError if nothing can be trained so.
    """
    categories = cache.plan.categories if categories is None else categories
    tag_weights, given = tag_weights or TagWeightConfig(), None
    if tag_weights.table is not None:
        edited = load_tag_table(tag_weights.table)
        categories, given = {**categories, **edited.categories}, edited.weights
    # Rows that are planned are pictures; which of its variants a showing takes is chosen when it is made.
    pictures = cache.index.pictures()
    ids = cache.index.id.take(pa.array(pictures)) if cache.index.variants > 1 else cache.index.id
    train, validation = (pictures[chosen] for chosen in split_validation(ids, validation_count))
    repeats = np.zeros(len(cache), np.int64)
    repeats[train] = cache.index.repeats[train]
    weights = np.zeros(len(cache))
    weights[train] = tag_loss_weights(cache.index.table(train), tag_weights, categories, given)
    plan = BatchPlan(
        cache.index.bucket,
        repeats,
        micro_batch_size=micro_batch_size,
        micro_batches_per_step=micro_batches_per_step,
        seed=derive_seed(seed, "order"),
    )
    return BatchLoader(cache, plan, validation, weights, captions or CaptionConfig(), categories, seed, prefetch)


@dataclass(frozen=True, eq=False)
class BatchLoader:
    """The micro-batches of any step, and of validation."""

    cache: LatentCache
    plan: BatchPlan
    """Over the rows of the cache; those held out have no repeats."""
    validation_rows: Int[np.ndarray, " v"]
    tag_weight: Float[np.ndarray, " n"]
    captions: CaptionConfig
    categories: Mapping[str, str]
    seed: int
    prefetch: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 hex of what the latents were made from; a run goes on only with the same."""
        return self.cache.fingerprint.digest

    def step(self, step: int) -> list[TrainBatch]:
        """The micro-batches of one step, counted from 0.

        Raises: ShardError naming the picture whose latent is damaged.
        """
        return [self._train_batch(planned) for planned in self.plan.step(step)]

    def from_step(self, step: int) -> "StepBatches":
        """The micro-batches of step `step`, the next, and so on for ever: an iterator, and a context that ends it."""
        return StepBatches(self, step, self.prefetch)

    def validation_batches(self, micro_batch_size: int) -> Iterator[TrainBatch]:
        """The held-out pictures, once each, bucket by bucket: plain captions, weight 1, seeds that never change."""
        bucket_of_row = self.cache.index.bucket[self.validation_rows]
        for bucket in np.unique(bucket_of_row):
            rows = self.validation_rows[bucket_of_row == bucket]
            for part in np.split(rows, range(micro_batch_size, len(rows), micro_batch_size)):
                yield self._validation_batch(part)

    def _train_batch(self, planned: MicroBatch) -> TrainBatch:
        index, rows = self.cache.index, planned.rows
        epochs, ids = planned.epochs.tolist(), index.ids(rows)
        showings = list(zip(epochs, ids, planned.repeats.tolist(), strict=True))
        tagged = zip(index.tag_lists(rows), index.kept_tags[rows].tolist(), strict=True)
        captions = [
            build_caption(
                tags,
                kept_tags,
                self.captions,
                seed=self.seed,
                epoch=epoch,
                sample_id=sample_id,
                repeat=repeat,
                categories=self.categories,
            )
            for (tags, kept_tags), (epoch, sample_id, repeat) in zip(tagged, showings, strict=True)
        ]
        seeds = [derive_seed(self.seed, "sample", *showing) for showing in showings]
        return self._assemble(rows + self._variants(showings), ids, captions, epochs, seeds, self.tag_weight[rows])

    def _variants(self, showings: list[tuple[int, str, int]]) -> Int[np.ndarray, " b"]:
        """Which of its stored crops and flips each showing (epoch, id, repeat) is; a function of it and the seed.

        A picture's variants come in turn, from one that its id decides: n epochs show n different ones.
        """
        count = self.cache.index.variants
        if count == 1:
            return np.zeros(len(showings), np.int64)
        first = (derive_seed(self.seed, "variant", sample_id, repeat) for _, sample_id, repeat in showings)
        return np.array([(start + epoch) % count for start, (epoch, _, _) in zip(first, showings, strict=True)])

    def _validation_batch(self, rows: Int[np.ndarray, " b"]) -> TrainBatch:
        index = self.cache.index
        ids = index.ids(rows)
        tagged = zip(index.tag_lists(rows), index.kept_tags[rows].tolist(), strict=True)
        captions = [plain_caption(tags, kept, self.captions, categories=self.categories) for tags, kept in tagged]
        # Not the run's seed: the validation losses of two runs are to be compared.
        seeds = [derive_seed("validation", sample_id) for sample_id in ids]
        return self._assemble(rows, ids, captions, [0] * len(ids), seeds, np.ones(len(ids)))

    def _assemble(
        self,
        rows: Int[np.ndarray, " b"],
        ids: list[str],
        captions: list[str],
        epochs: list[int],
        seeds: list[int],
        weights: Float[np.ndarray, " b"],
    ) -> TrainBatch:
        return TrainBatch(
            latents=self.cache.normalise(self.cache.read(rows)),
            captions=captions,
            time_ids=torch.from_numpy(self._time_ids(rows)),
            tag_weight=torch.from_numpy(weights).float(),
            sample_ids=ids,
            epochs=epochs,
            seeds=torch.tensor(seeds, dtype=torch.int64),
        )

    def _time_ids(self, rows: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b 6"]:
        """SDXL's micro-conditioning. Source: SDXL 2307.01952 §2.2."""
        index = self.cache.index
        parts = (index.original[rows], index.crop[rows], self.cache.buckets[index.bucket[rows]])
        return np.concatenate(parts, axis=1).astype(np.float32)


class StepBatches:
    """The micro-batches of a step and of all that follow. One thread makes them ahead, in order; it raises here."""

    def __init__(self, loader: BatchLoader, step: int, ahead: int) -> None:
        self._loader = loader
        self._steps = itertools.count(step)
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if ahead else None
        self._made: deque[Future[list[TrainBatch]]] = deque()

    def __iter__(self) -> "StepBatches":
        return self

    def __next__(self) -> list[TrainBatch]:
        if self._pool is None:
            return self._loader.step(next(self._steps))
        while len(self._made) <= self._ahead:
            self._made.append(self._pool.submit(self._loader.step, next(self._steps)))
        batches = self._made[0].result()  # raises what the thread raised, and again if asked again
        self._made.popleft()
        return batches

    def close(self) -> None:
        """Stops the thread; what it made ahead is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "StepBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
