"""The batch plan: which samples every step trains on, as a pure function of (seed, step).

Owns the order of the data. Knows no files, captions or tensors. The invariant: a micro-batch is one bucket, and every
sample is drawn once in each pass over its bucket, nothing dropped and nothing doubled, for ever; any step is found
without replaying the ones before it, and is the same on any number of processes.

How: bucket b with n_b samples is an endless stream, one seeded permutation after another, cut into micro-batches
of m. Epoch e holds, of each bucket, its micro-batches ⌊e·n_b/m⌋ … ⌊(e+1)·n_b/m⌋ − 1, shuffled together; what does not
fill one is carried into the next epoch by that formula alone. Step k takes micro-batches kN … (k+1)N − 1 of all epochs.
Differs from report §4.1, which gathers the tails in a batch of mixed buckets: because such a batch has no one shape.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from sumizome.errors import ConfigError, DataError
from sumizome.seeds import derive_seed

__all__ = ["BatchPlan", "MicroBatch", "permutation"]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass: samples of one bucket. (row, epoch, repeat) never comes twice."""

    bucket: int
    rows: Int[np.ndarray, " m"]
    """Rows of the arrays that the plan was made from."""
    epochs: Int[np.ndarray, " m"]
    """Each sample's own epoch: whole passes over its bucket before this one. At a tail it differs within the batch."""
    repeats: Int[np.ndarray, " m"]
    """Which of its repeats in that epoch, 0 … repeats − 1."""


class BatchPlan:
    """The endless list of steps over rows that lie in buckets.

    `bucket_of_row` [n] holds bucket numbers from 0, `repeats` [n] how often a row comes in each epoch (0 = never).
    Raises: ConfigError for a size below 1. DataError if no row is left to draw.
    """

    def __init__(
        self,
        bucket_of_row: Int[np.ndarray, " n"],
        repeats: Int[np.ndarray, " n"],
        *,
        micro_batch_size: int,
        micro_batches_per_step: int,
        seed: int,
    ) -> None:
        if micro_batch_size < 1 or micro_batches_per_step < 1:
            raise ConfigError(
                f"micro_batch_size {micro_batch_size} and micro_batches_per_step {micro_batches_per_step} "
                "must both be at least 1"
            )
        if repeats.sum() == 0:
            raise DataError(f"none of the {len(repeats)} samples may be drawn; there must be one with repeats ≥ 1")
        self.micro_batch_size = micro_batch_size
        self.micro_batches_per_step = micro_batches_per_step
        self.seed = seed
        by_bucket = np.argsort(bucket_of_row, kind="stable")
        # A slot is one repeat of one row; the slots of a bucket stand together.
        self._slot_row = np.repeat(by_bucket, repeats[by_bucket])
        self._slot_repeat = _count_within(repeats[by_bucket])
        self._bucket_slots = np.bincount(bucket_of_row, repeats).astype(np.int64)
        self._bucket_start = np.cumsum(self._bucket_slots) - self._bucket_slots
        # Orders are long arrays: those of the present epoch and of the one whose tail it carries are kept.
        buckets = len(self._bucket_slots)
        self._epoch_order: Callable[[int], Int[np.ndarray, "j 2"]] = lru_cache(2)(self._build_epoch_order)
        self._bucket_order: Callable[[int, int], Int[np.ndarray, " n_b"]] = lru_cache(3 * buckets)(
            self._build_bucket_order
        )

    @property
    def samples_per_epoch(self) -> int:
        """Rows times their repeats."""
        return len(self._slot_row)

    @property
    def steps_per_epoch(self) -> float:
        """On the average over many epochs; not a whole number, since tails are carried."""
        return self.samples_per_epoch / (self.micro_batch_size * self.micro_batches_per_step)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of one step, counted from 0; processes share them out, they do not change them."""
        first = step * self.micro_batches_per_step
        return [self.micro_batch(index) for index in range(first, first + self.micro_batches_per_step)]

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch at a place in the endless list of all epochs, counted from 0."""
        if index < 0:
            raise ValueError(f"micro-batches are counted from 0, got {index}")
        epoch = self._epoch_of(index)
        bucket, ordinal = self._epoch_order(epoch)[index - self._micro_batches_before(epoch)].tolist()
        place = np.arange(ordinal * self.micro_batch_size, (ordinal + 1) * self.micro_batch_size)
        epochs, within = np.divmod(place, self._bucket_slots[bucket])
        slots = np.empty_like(place)
        for bucket_epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == bucket_epoch
            slots[here] = self._bucket_order(bucket, bucket_epoch)[within[here]]
        slots += self._bucket_start[bucket]
        return MicroBatch(bucket, self._slot_row[slots], epochs, self._slot_repeat[slots])

    def _micro_batches_before(self, epoch: int) -> int:
        return int((epoch * self._bucket_slots // self.micro_batch_size).sum())

    def _epoch_of(self, index: int) -> int:
        """The epoch that holds micro-batch `index`: the last one that does not begin after it."""
        # e epochs hold at least e·samples/m − buckets micro-batches, which bounds the search.
        enough = (index + 1 + len(self._bucket_slots)) * self.micro_batch_size // self.samples_per_epoch + 1
        return bisect_right(range(enough + 1), index, key=self._micro_batches_before) - 1

    def _build_epoch_order(self, epoch: int) -> Int[np.ndarray, "j 2"]:
        """(bucket, place in the bucket's stream) of each micro-batch of an epoch, in the order of training.

        A uniform shuffle draws each bucket in proportion to what is left in it, as the report does.
        """
        first = epoch * self._bucket_slots // self.micro_batch_size
        count = (epoch + 1) * self._bucket_slots // self.micro_batch_size - first
        bucket = np.repeat(np.arange(len(count)), count)
        ordinal = np.repeat(first, count) + _count_within(count)
        shuffle = permutation(derive_seed(self.seed, "epoch", epoch), len(bucket))
        # Each bucket's own micro-batches stay in the order of its stream.
        shuffled = bucket[shuffle]
        order = np.empty((len(bucket), 2), dtype=np.int64)
        order[:, 0] = shuffled
        order[np.argsort(shuffled, kind="stable"), 1] = ordinal
        return order

    def _build_bucket_order(self, bucket: int, epoch: int) -> Int[np.ndarray, " n_b"]:
        return permutation(derive_seed(self.seed, "bucket", bucket, epoch), int(self._bucket_slots[bucket]))


def _count_within(counts: Int[np.ndarray, " k"]) -> Int[np.ndarray, " total"]:
    """0, 1, … counts[0] − 1, 0, 1, … counts[1] − 1, …"""
    return np.asarray(np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))


def permutation(seed: int, n: int) -> Int[np.ndarray, " n"]:
    """0 … n − 1 in an order that follows from the seed, the same on every machine and with every library version.

    Sorts by SplitMix64 of (seed + position), whose values are all different. Differs from NumPy's
    `Generator.permutation`: because its stream may change with NumPy (NEP 19), and a resumed run must not.
    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(np.argsort(state ^ (state >> np.uint64(31)), kind="stable"))
