"""The batch plan: which samples every step trains on, as a pure function of (seed, step).

Owns the order of the data. Knows no files, captions or tensors. The invariant: a micro-batch is one bucket, and every
sample is drawn once in each pass over its bucket, nothing dropped and nothing doubled, for ever; any step is found
without replaying the ones before it, and is the same on any number of processes.

How: bucket b with n_b samples is an endless stream, one shuffle after another, cut into micro-batches of m. Epoch e
holds, of each bucket, its micro-batches ⌊e·n_b/m⌋ … ⌊(e+1)·n_b/m⌋ − 1, shuffled together; what does not fill one is
carried into the next epoch by that formula alone. Step k takes micro-batches kN … (k+1)N − 1 of all epochs. With area
classes each class c is such a list of its own, cut into steps; epoch e holds its steps ⌊C_c(e)/N⌋ … ⌊C_c(e+1)/N⌋ − 1,
where C_c(e) counts the micro-batches of e epochs, and the steps of all classes are shuffled together. A shuffle is a
formula (`permutation`), so no order is ever listed.
Differs from report §4.1, which gathers the tails in a batch of mixed buckets: because such a batch has no one shape.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from jaxtyping import Int

from sumizome.data.permutation import mixed, shuffled
from sumizome.errors import ConfigError, DataError
from sumizome.seeds import derive_seed

__all__ = ["BatchPlan", "MicroBatch", "check_world", "share"]

_TOGETHER = 32
"""Steps, one behind the other, that are worked out at once: where a process has one micro-batch of each, numpy needs
little more time for all than for one."""
_Samples: TypeAlias = tuple[Int[np.ndarray, " *j"], Int[np.ndarray, "*j m"], Int[np.ndarray, "*j m"]]
"""Of some micro-batches: their buckets, slots within these, and the samples' epochs."""


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
    place: int
    """Of this micro-batch in its step, 0 … micro_batches_per_step − 1, whichever process has it."""


class BatchPlan:
    """The endless list of steps over rows that lie in buckets.

    `bucket_of_row` [n] holds bucket numbers from 0, `repeats` [n] how often a row comes in each epoch (0 = never).
    `class_of_bucket` gives buckets a class from 0: a step is all of one class (default: all buckets are one class).
    `micro_batch_size` is one for all, or one a class. Held: five bytes a sample, while repeats are below 256.
    Raises: ConfigError for a size below 1. DataError if no row is left to draw.
    """

    def __init__(
        self,
        bucket_of_row: Int[np.ndarray, " n"],
        repeats: Int[np.ndarray, " n"],
        *,
        micro_batch_size: int | Sequence[int],
        micro_batches_per_step: int,
        seed: int,
        class_of_bucket: Sequence[int] | None = None,
    ) -> None:
        samples = int(repeats.sum(dtype=np.int64))
        if samples == 0:
            raise DataError(f"none of the {len(repeats)} samples may be drawn; there must be one with repeats ≥ 1")
        slots = np.bincount(bucket_of_row, repeats).astype(np.int64)
        classes = np.zeros(len(slots), np.int64) if class_of_bucket is None else np.array(class_of_bucket)[: len(slots)]
        sizes = [micro_batch_size] * (int(classes.max()) + 1) if isinstance(micro_batch_size, int) else micro_batch_size
        if min(*sizes, micro_batches_per_step) < 1:
            raise ConfigError(
                f"micro_batch_size {micro_batch_size} and micro_batches_per_step {micro_batches_per_step} "
                "must both be at least 1"
            )
        if len(sizes) <= classes.max():
            raise ConfigError(f"{classes.max() + 1} area classes need as many micro-batch sizes, found {len(sizes)}")
        self.micro_batches_per_step = micro_batches_per_step
        self.samples_per_epoch = samples
        """Rows times their repeats."""
        self._slot_row, self._slot_repeat = _slots_by_bucket(bucket_of_row, repeats)
        self._bucket_start = np.cumsum(slots) - slots
        drawn = [np.flatnonzero((classes == number) & (slots > 0)) for number in range(len(sizes))]
        self._classes = [
            _ClassOrder(buckets, slots[buckets], size, micro_batches_per_step, seed)
            for buckets, size in zip(drawn, sizes, strict=True)
            if len(buckets)
        ]
        self._class_key = np.array([derive_seed(seed, "class")], np.uint64)
        self._together = lru_cache(maxsize=2)(self._worked_out)
        self._steps_before = lru_cache(maxsize=16)(self._counted_before)

    @property
    def steps_per_epoch(self) -> float:
        """On the average over many epochs; not a whole number, since tails are carried."""
        return sum(each.steps_per_epoch for each in self._classes)

    def step(self, step: int, rank: int = 0, world: int = 1) -> list[MicroBatch]:
        """The micro-batches of one step, counted from 0, that process `rank` of `world` computes.

        Processes have equal parts of the step, one behind the other (`share`), so together they have it whole, whatever
        their number. Only a process's own micro-batches are computed, and those of the steps beside, which are kept.
        Raises: ConfigError if the step cannot be shared out evenly.
        """
        if step < 0:
            raise ValueError(f"steps are counted from 0, got {step}")
        places = share(self.micro_batches_per_step, rank, world)
        block, number = divmod(step, _TOGETHER)
        bucket, within, epochs = self._together(block, places)[number]
        slots = within + self._bucket_start[bucket][:, None]
        rows, repeats = self._slot_row[slots].astype(np.int64), self._slot_repeat[slots].astype(np.int64)
        parts = zip(bucket.tolist(), rows, epochs.copy(), repeats, places, strict=True)
        return [MicroBatch(*part) for part in parts]

    def _worked_out(self, block: int, places: range) -> list[_Samples]:
        """Those places of each of the steps from block·_TOGETHER on."""
        classes, ordinals = self._classes_of_steps(np.arange(block * _TOGETHER, (block + 1) * _TOGETHER))
        found: dict[int, _Samples] = {}
        for number in np.unique(classes).tolist():
            steps = np.flatnonzero(classes == number)
            parts = self._classes[number].samples(
                ordinals[steps, None] * self.micro_batches_per_step + np.array(places)
            )
            found |= dict(zip(steps.tolist(), zip(*parts, strict=True), strict=True))
        return [found[step] for step in range(_TOGETHER)]

    def _classes_of_steps(self, steps: Int[np.ndarray, " j"]) -> tuple[Int[np.ndarray, " j"], Int[np.ndarray, " j"]]:
        """(the class of each step, its number among the steps of that class).

        A uniform shuffle draws each class in proportion to what is left of it.
        """
        if len(self._classes) == 1:
            return np.zeros_like(steps), steps
        epochs = [self._epoch_of_step(step) for step in steps.tolist()]
        first = np.stack([self._steps_before(epoch) for epoch in epochs])
        counts = np.stack([self._steps_before(epoch + 1) for epoch in epochs]) - first
        place, n = steps - first.sum(axis=1), counts.sum(axis=1)
        drawn = shuffled(place, n, mixed(np.broadcast_to(self._class_key, n.shape), np.array(epochs)))
        number, ordinal = _dealt(drawn, counts)
        return number, first[np.arange(len(steps)), number] + ordinal

    def _epoch_of_step(self, step: int) -> int:
        """The epoch that holds a step of several classes: the last one that does not begin after it."""
        # Tails hold back less than a step of each class, and less than a micro-batch of each bucket.
        late = sum(2 + len(each.slots) / self.micro_batches_per_step for each in self._classes)
        earliest = max(0, int(step / self.steps_per_epoch) - 1)
        latest = int((step + late) / self.steps_per_epoch) + 1
        return bisect_right(range(latest + 1), step, lo=earliest, key=lambda e: int(self._steps_before(e).sum())) - 1

    def _counted_before(self, epoch: int) -> Int[np.ndarray, " c"]:
        """Steps of each class in the first `epoch` epochs; what does not fill a step is carried, too."""
        return np.array(
            [int(each.before(np.array([epoch])).sum()) // self.micro_batches_per_step for each in self._classes]
        )


class _ClassOrder:
    """The endless list of micro-batches of some buckets; `buckets` and `slots` [k]: their numbers and samples."""

    def __init__(
        self, buckets: Int[np.ndarray, " k"], slots: Int[np.ndarray, " k"], size: int, per_step: int, seed: int
    ) -> None:
        self.buckets, self.slots, self.size = buckets, slots, size
        self._samples = int(slots.sum())
        self.steps_per_epoch = self._samples / (size * per_step)
        self._epoch_key = np.array([derive_seed(seed, "epoch", int(buckets[0]))], np.uint64)
        self._bucket_keys = np.array([derive_seed(seed, "bucket", bucket) for bucket in buckets.tolist()], np.uint64)

    def before(self, epoch: Int[np.ndarray, " j"]) -> Int[np.ndarray, "j k"]:
        """Micro-batches of each bucket in the first `epoch` epochs."""
        return np.asarray(epoch[:, None] * self.slots // self.size)

    def _epochs_of(self, index: Int[np.ndarray, " j"]) -> Int[np.ndarray, " j"]:
        """The epoch that holds each micro-batch: the last one that does not begin after it."""
        epoch = index * self.size // self._samples  # it cannot be earlier, and tails make it little later
        while (late := self.before(epoch + 1).sum(axis=1) <= index).any():
            epoch = epoch + late
        return np.asarray(epoch)

    def samples(self, index: Int[np.ndarray, " *j"]) -> _Samples:
        """Of the micro-batches at those places of the list."""
        number, ordinal = (part.reshape(index.shape) for part in self._deal(index.ravel()))
        place = ordinal[..., None] * self.size + np.arange(self.size)
        n = np.broadcast_to(self.slots[number][..., None], place.shape)
        epochs, within = np.divmod(place, n)
        key = mixed(np.broadcast_to(self._bucket_keys[number][..., None], place.shape), epochs)
        slots = shuffled(within.ravel(), n.ravel(), key.ravel()).reshape(place.shape)
        return self.buckets[number], slots, epochs

    def _deal(self, index: Int[np.ndarray, " j"]) -> tuple[Int[np.ndarray, " j"], Int[np.ndarray, " j"]]:
        """(which of our buckets, place in that bucket's stream) of each micro-batch.

        A uniform shuffle draws each bucket in proportion to what is left in it, as the report does.
        """
        epoch = self._epochs_of(index)
        first, last = self.before(epoch), self.before(epoch + 1)
        n = (last - first).sum(axis=1)
        key = mixed(np.broadcast_to(self._epoch_key, n.shape), epoch)
        number, within = _dealt(shuffled(index - first.sum(axis=1), n, key), last - first)
        return number, first[np.arange(len(index)), number] + within


def share(micro_batches_per_step: int, rank: int, world: int) -> range:
    """The places in a step that process `rank` of `world` takes. Raises: ConfigError if they cannot be equally many."""
    check_world(micro_batches_per_step, world)
    count = micro_batches_per_step // world
    return range(rank * count, (rank + 1) * count)


def check_world(micro_batches_per_step: int, world: int, whose: str = "") -> None:
    """Raises: ConfigError if a step's micro-batches cannot be shared evenly among `world` processes.

    `whose` begins the message.
    """
    if world < 1 or micro_batches_per_step % world:
        nearest = -(-micro_batches_per_step // max(world, 1)) * max(world, 1)
        raise ConfigError(
            f"{whose}micro_batches_per_step {micro_batches_per_step} cannot be shared evenly by {world} processes; use "
            f"a number of processes that divides it, or train a new run with {nearest} (another number is another run)"
        )


def _dealt(
    place: Int[np.ndarray, " j"], counts: Int[np.ndarray, "#j k"]
) -> tuple[Int[np.ndarray, " j"], Int[np.ndarray, " j"]]:
    """(pile, place in the pile) of each place, when piles of `counts` stand one behind the other."""
    ends = np.cumsum(counts, axis=1)
    pile = (ends <= place[:, None]).sum(axis=1)
    before = np.take_along_axis(np.broadcast_to(ends - counts, (len(place), counts.shape[1])), pile[:, None], axis=1)
    return pile, place - before[:, 0]


def _slots_by_bucket(
    bucket_of_row: Int[np.ndarray, " n"], repeats: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " slots"], Int[np.ndarray, " slots"]]:
    """A slot is one repeat of one row; the slots of a bucket stand together. Row and repeat of each, in few bytes."""
    # Sorting numbers of 16 bits is a radix sort, ten times as fast as one of 64.
    by_bucket = np.argsort(bucket_of_row.astype(np.min_scalar_type(int(bucket_of_row.max()))), kind="stable")
    by_bucket = by_bucket.astype(np.min_scalar_type(-len(by_bucket)))
    counts = repeats[by_bucket]
    most = int(repeats.max())
    if most == 1:
        rows = by_bucket[counts > 0]
        return rows, np.zeros(len(rows), np.int8)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(by_bucket, counts), within.astype(np.min_scalar_type(-most))
