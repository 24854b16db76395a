"""From the plan and the latents to what a step trains on: micro-batches with captions, sizes, weights and seeds.

Owns `TrainBatch`, the split that holds pictures out for validation, and prefetching. The invariant: the micro-batches
of a step are a function of (latents, settings, seed, step), the same bits with or without prefetching, in a new
process, and whatever steps came before.
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor

from sumizome.data.batch_plan import BatchPlan, MicroBatch, check_world, share
from sumizome.data.buckets import bucket_classes
from sumizome.data.captions import CaptionConfig, build_caption, plain_caption
from sumizome.data.latent_index import LatentIndex
from sumizome.data.latents import LatentCache
from sumizome.data.tag_table import with_tag_table
from sumizome.data.tags import GENERAL, TagWeightConfig, loss_weights
from sumizome.errors import ConfigError
from sumizome.seeds import derive_seed
from sumizome.shapes import Latents, PerSample, TimeIds

__all__ = ["BatchLoader", "Prepare", "StepBatches", "TrainBatch", "build_loader", "split_validation"]

Prepare: TypeAlias = Callable[[int, list[Any]], list[Any]]
"""(step, its micro-batches) → what is handed out in their place; called by a thread that works ahead, so a function of
these alone."""


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
    tag_categories: list[Collection[str]]
    """The categories of the tags that each picture bears, whatever its caption shows of them."""

    def pinned(self) -> "TrainBatch":
        """The same with its tensors in page-locked memory. Needs a CUDA device."""
        tensors = {name: getattr(self, name).pin_memory() for name in ("latents", "time_ids", "tag_weight", "seeds")}
        return replace(self, **tensors)


def split_validation(
    hashes: UInt64[np.ndarray, " n"], count: int
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " v"]]:
    """(rows to train on, rows held out), each rising: the `count` pictures of least hash (`picture_hashes`).

    The choice of a picture does not depend on the others' order, and adding pictures to a set replaces few of those
    held out. A byte-identical copy of a held-out picture ("…-2") is in neither part: training on it would be cheating.
    Raises: ConfigError if nothing would be left to train on.
    """
    if count == 0:
        return np.arange(len(hashes)), np.arange(0)
    candidates = 2 * count
    while len(least := np.unique(_smallest(hashes, candidates))) <= count and candidates < len(hashes):
        candidates *= 2
    if len(least) <= count and candidates >= len(hashes):
        raise ConfigError(f"{count} pictures are to be held out for validation, but there are {len(least)} in all")
    low = np.flatnonzero(hashes <= least[count - 1])
    _, first = np.unique(hashes[low], return_index=True)
    return np.flatnonzero(hashes > least[count - 1]), np.sort(low[first])


def _smallest(numbers: UInt64[np.ndarray, " n"], count: int) -> UInt64[np.ndarray, " k"]:
    return np.asarray(numbers if count >= len(numbers) else np.partition(numbers, count)[:count])


def build_loader(
    cache: LatentCache,
    *,
    seed: int,
    micro_batch_size: int,
    micro_batches_per_step: int = 1,
    validation_count: int = 0,
    leave_out: UInt64[np.ndarray, " k"] | None = None,
    captions: CaptionConfig | None = None,
    tag_weights: TagWeightConfig | None = None,
    categories: Mapping[str, str] | None = None,
    prefetch: int = 16,
    workers: int = 1,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> "BatchLoader":
    """The loader of a run; `prefetch` steps are made ahead by `workers` threads, 0 of either = none.

    Neither number changes a bit of a batch, nor the order. `pin_memory` puts tensors where a CUDA device copies from
    while it works. Of `world` processes each takes its own part of every step's micro-batches, in order of `rank`.
    Where the latents have area classes, each step is of one class. Pictures whose hash is in `leave_out` are not
    trained on: what another stage of the run has held out.

    `categories` maps tags to their category; by default it is what came with the pictures. Those of `tag_weights.table`
    go before either.

    Raises: ConfigError, DataError if nothing can be trained so.
    """
    categories = cache.plan.categories if categories is None else categories
    tag_weights = tag_weights or TagWeightConfig()
    categories, given = with_tag_table(categories, tag_weights.table)
    if min(prefetch, workers) < 0:
        raise ConfigError(f"prefetch {prefetch} and workers {workers} must be at least 0")
    check_world(micro_batches_per_step, world)
    repeats, validation = _repeats(cache.index, validation_count, leave_out)
    plan = BatchPlan(
        cache.index.bucket,
        repeats,
        micro_batch_size=micro_batch_size,
        micro_batches_per_step=micro_batches_per_step,
        seed=derive_seed(seed, "order"),
        class_of_bucket=bucket_classes(cache.buckets).tolist(),
    )
    return BatchLoader(
        cache=cache,
        plan=plan,
        validation_rows=validation,
        tag_weight=_tag_weight(cache.index, repeats, tag_weights, categories, given),
        captions=captions or CaptionConfig(),
        categories=categories,
        seed=seed,
        prefetch=prefetch,
        workers=workers,
        pin_memory=pin_memory,
        rank=rank,
        world=world,
    )


def _repeats(
    index: LatentIndex, validation_count: int, leave_out: UInt64[np.ndarray, " k"] | None
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " v"]]:
    """(times that an epoch shows each row, rows held out).

    Rows that are planned are pictures; which of its variants a showing takes is chosen when it is made.
    """
    pictures = index.pictures()
    hashes = index.picture_hash[pictures] if index.variants > 1 else index.picture_hash
    train, validation = (pictures[chosen] for chosen in split_validation(hashes, validation_count))
    if leave_out is not None:
        train = train[~np.isin(index.picture_hash[train], leave_out)]
    repeats = np.zeros(len(index), index.repeats.dtype)
    repeats[train] = index.repeats[train]
    return repeats, validation


def _tag_weight(
    index: LatentIndex,
    repeats: Int[np.ndarray, " n"],
    config: TagWeightConfig,
    categories: Mapping[str, str],
    given: Mapping[str, float] | None,
) -> Float[np.ndarray, " n"] | None:
    """The rows' loss weights, float32; None where weighting is off."""
    if config.strength == 0 and given is None:
        return None
    return loss_weights(index.coded_tags(), repeats, config, categories, given).astype(np.float32)


@dataclass(frozen=True, eq=False)
class BatchLoader:
    """The micro-batches of any step, and of validation."""

    cache: LatentCache
    plan: BatchPlan
    """Over the rows of the cache; those held out have no repeats."""
    validation_rows: Int[np.ndarray, " v"]
    tag_weight: Float[np.ndarray, " n"] | None
    """None: all are 1."""
    captions: CaptionConfig
    categories: Mapping[str, str]
    seed: int
    prefetch: int
    workers: int = 1
    pin_memory: bool = False
    rank: int = 0
    world: int = 1

    @property
    def share(self) -> range:
        """The places in a step's micro-batches that this process takes."""
        return share(self.plan.micro_batches_per_step, self.rank, self.world)

    @property
    def fingerprint(self) -> str:
        """SHA-256 hex of what the latents were made from; a run goes on only with the same."""
        return self.cache.fingerprint.digest

    @property
    def order(self) -> str:
        """SHA-256 hex of the order in which the pictures stand; a run's order follows from it and its settings."""
        return self.cache.index.order

    def take_faults(self) -> list[str]:
        """What went wrong in reading, and was made good, since this was last asked; in words."""
        return self.cache.shards.take_faults()

    def step(self, step: int) -> list[TrainBatch]:
        """This process's micro-batches of one step, counted from 0.

        Raises: ShardError naming the picture whose latent is damaged.
        """
        batches = [self._train_batch(planned) for planned in self.plan.step(step, self.rank, self.world)]
        return [batch.pinned() for batch in batches] if self.pin_memory else batches

    def read_ahead(self, step: int) -> None:
        """Begins to read the latents of a step that is to come, where they come over a network."""
        if self.cache.shards.parallel:
            for planned in self.plan.step(step, self.rank, self.world):
                self.cache.prefetch(planned.rows + self._variants(self._showings(planned)))

    def _step_reading_ahead(self, step: int) -> list[TrainBatch]:
        """A step, while what the next one needs is already under way."""
        for coming in (step, step + 1):
            self.read_ahead(coming)
        return self.step(step)

    def from_step(self, step: int, prepare: Prepare | None = None, *, until: int | None = None) -> "StepBatches":
        """The micro-batches of step `step`, the next, and so on for ever: an iterator, and a context that ends it.

        Each step's are what `prepare` makes of them, ahead as they are. Step `until` and later ones are not made.
        """
        return StepBatches(self._step_reading_ahead, step, self.prefetch, self.workers, prepare, until=until)

    def validation_batches(self, micro_batch_size: int) -> Iterator[TrainBatch]:
        """The held-out pictures, once each, bucket by bucket: plain captions, weight 1, seeds that never change."""
        bucket_of_row = self.cache.index.bucket[self.validation_rows]
        for bucket in np.unique(bucket_of_row):
            rows = self.validation_rows[bucket_of_row == bucket]
            for part in np.split(rows, range(micro_batch_size, len(rows), micro_batch_size)):
                yield self._validation_batch(part)

    def _train_batch(self, planned: MicroBatch) -> TrainBatch:
        index, rows = self.cache.index, planned.rows
        showings = self._showings(planned)
        epochs, ids = [epoch for epoch, *_ in showings], [sample_id for _, sample_id, _ in showings]
        tag_lists = index.tag_lists(rows)
        tagged = zip(tag_lists, index.kept_tags[rows].tolist(), strict=True)
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
        weights = np.ones(len(rows)) if self.tag_weight is None else self.tag_weight[rows]
        return self._assemble(rows + self._variants(showings), ids, tag_lists, captions, epochs, seeds, weights)

    def _showings(self, planned: MicroBatch) -> list[tuple[int, str, int]]:
        """(epoch, id, repeat) of each sample."""
        ids = self.cache.index.ids(planned.rows)
        return list(zip(planned.epochs.tolist(), ids, planned.repeats.tolist(), strict=True))

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
        tag_lists = index.tag_lists(rows)
        tagged = zip(tag_lists, index.kept_tags[rows].tolist(), strict=True)
        captions = [plain_caption(tags, kept, self.captions, categories=self.categories) for tags, kept in tagged]
        # Not the run's seed: the validation losses of two runs are to be compared.
        seeds = [derive_seed("validation", sample_id) for sample_id in ids]
        return self._assemble(rows, ids, tag_lists, captions, [0] * len(ids), seeds, np.ones(len(ids)))

    def _assemble(
        self,
        rows: Int[np.ndarray, " b"],
        ids: list[str],
        tag_lists: list[list[str]],
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
            tag_categories=[{self.categories.get(tag, GENERAL) for tag in tags} for tags in tag_lists],
        )

    def _time_ids(self, rows: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b 6"]:
        """SDXL's micro-conditioning. Source: SDXL 2307.01952 §2.2."""
        index = self.cache.index
        parts = (index.original[rows], index.crop[rows], self.cache.buckets[index.bucket[rows]])
        return np.concatenate(parts, axis=1).astype(np.float32)


class StepBatches:
    """The micro-batches of a step and of all that follow. Threads make them ahead, a step each; they raise here.

    `make_ahead` is for the caller to say when: threads that make batches take Python's lock and time on its processor.
    Who never says so has them made as they run out.
    """

    def __init__(
        self,
        make: Callable[[int], list[Any]],
        step: int,
        ahead: int,
        workers: int = 1,
        prepare: Prepare | None = None,
        *,
        until: int | None = None,
    ) -> None:
        """`make(step)`: a step's micro-batches. `until`: the first step that is not made; None = there is no end."""
        self._make = (lambda step: prepare(step, make(step))) if prepare else make
        self._steps = itertools.count(step) if until is None else iter(range(step, until))
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch") if ahead and workers else None
        self._made: deque[Future[list[Any]]] = deque()

    def __iter__(self) -> "StepBatches":
        return self

    def __next__(self) -> list[Any]:
        if self._pool is None:
            return self._make(next(self._steps))
        if not self._made:
            self.make_ahead()
        if not self._made:
            raise StopIteration
        batches = self._made[0].result()  # raises what the thread raised, and again if asked again
        self._made.popleft()
        return batches

    def make_ahead(self) -> None:
        """Begins to make what is due, and returns: best called where long work without Python begins.

        Nothing is due until half of what is made ahead has been taken. A thread that wakes finds its code gone from the
        caches and stands in the way of those that compute: many steps at once disturb one of many, each in turn all.
        """
        if self._pool is None or len(self._made) > self._ahead // 2:
            return
        for step in itertools.islice(self._steps, self._ahead - len(self._made)):
            self._made.append(self._pool.submit(self._make, step))

    def close(self) -> None:
        """Stops the threads; what it made ahead is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._made.clear()

    def __enter__(self) -> "StepBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
