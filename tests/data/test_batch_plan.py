"""The plan's promises, for any sizes: exactly once, one bucket, one class, any step, the same for any sharing."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sumizome.data.batch_plan import BatchPlan, MicroBatch
from sumizome.errors import ConfigError, DataError

WORLDS = (1, 2, 4, 8, 256)


@dataclass(frozen=True)
class Case:
    """What a plan is made from; a plan that is made again from it knows nothing of the one before."""

    bucket_of_row: np.ndarray
    repeats: np.ndarray
    sizes: tuple[int, ...]
    per_step: int
    seed: int
    class_of_bucket: tuple[int, ...]

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan(
            self.bucket_of_row,
            self.repeats,
            micro_batch_size=self.sizes,
            micro_batches_per_step=self.per_step,
            seed=self.seed,
            class_of_bucket=self.class_of_bucket,
        )

    @property
    def slots(self) -> np.ndarray:
        """Samples of each bucket in an epoch."""
        return np.bincount(self.bucket_of_row, self.repeats, minlength=6).astype(int)


@st.composite
def cases(draw: st.DrawFn, classes: int = 3, per_step: tuple[int, ...] = (1, 2, 3, 4)) -> Case:
    bucket_of_row = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=60)))
    repeats = np.array(draw(st.lists(st.integers(0, 3), min_size=len(bucket_of_row), max_size=len(bucket_of_row))))
    repeats[draw(st.integers(0, len(repeats) - 1))] = 1
    count = draw(st.integers(1, classes))
    return Case(
        bucket_of_row,
        repeats,
        tuple(draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))),
        draw(st.sampled_from(per_step)),
        draw(st.integers(0, 2**62)),
        tuple(draw(st.lists(st.integers(0, count - 1), min_size=6, max_size=6))),
    )


def keys(batch: MicroBatch) -> list[tuple[int, int, int]]:
    return list(zip(batch.rows.tolist(), batch.epochs.tolist(), batch.repeats.tolist(), strict=True))


def contents(batches: list[MicroBatch]) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    return [(batch.place, batch.bucket, keys(batch)) for batch in batches]


def steps_of_epochs(case: Case, epochs: int) -> int:
    """Known without the plan: of each class the whole steps that its whole micro-batches of these passes make."""
    whole = [epochs * n // case.sizes[c] for n, c in zip(case.slots, case.class_of_bucket, strict=True)]
    by_class = np.bincount(case.class_of_bucket, whole).astype(int)
    if len({c for n, c in zip(case.slots, case.class_of_bucket, strict=True) if n}) == 1:
        return int(by_class.sum()) // case.per_step
    return int((by_class // case.per_step).sum())


# ── Every sample once ──


@settings(max_examples=40)
@given(cases())
def test_every_sample_comes_exactly_once_an_epoch_or_is_carried(case: Case) -> None:
    epochs, plan = 4, case.plan
    batches = [batch for step in range(steps_of_epochs(case, epochs)) for batch in plan.step(step)]
    drawn = Counter(key for batch in batches for key in keys(batch))
    assert max(drawn.values(), default=1) == 1, "a sample came twice in one of its epochs"
    assert all(case.repeats[row] > r for row, _, r in drawn)
    carried = Counter[int]()
    for bucket, n in enumerate(case.slots):
        rows = np.flatnonzero(case.bucket_of_row == bucket)
        wanted = {(row, e, r) for row in rows.tolist() for e in range(epochs) for r in range(case.repeats[row])}
        got = {key for batch in batches if batch.bucket == bucket for key in keys(batch)}
        assert got <= wanted
        area_class = case.class_of_bucket[bucket]
        size = case.sizes[area_class]
        missing = epochs * n - len(got) - epochs * n % size  # beyond the tail that does not fill a micro-batch
        assert missing >= 0 and missing % size == 0
        carried[area_class] += missing // size
    assert all(count < case.per_step for count in carried.values()), "more was carried than one unfilled step"


@settings(max_examples=5)
@given(cases(classes=1, per_step=(1,)))
def test_exactly_once_a_million_epochs_away(case: Case) -> None:
    """m epochs hold a whole number of micro-batches, n in all; so the far end of the stream has a closed form."""
    plan, m, far = case.plan, case.sizes[0], 1_000_000
    n = plan.samples_per_epoch
    drawn = Counter(key for i in range(far * n, (far + 1) * n) for key in keys(plan.step(i)[0]))
    epochs = range(far * m, (far + 1) * m)
    assert drawn == Counter((row, e, r) for row, count in enumerate(case.repeats) for e in epochs for r in range(count))


@settings(max_examples=10)
@given(cases(per_step=(1, 2, 4)))
def test_with_area_classes_too_exactly_once_far_away(case: Case) -> None:
    """After a common multiple of all sizes every tail has come out even: from there on an epoch cycle is exact."""
    plan, cycle = case.plan, int(np.lcm.reduce(case.sizes)) * case.per_step
    first, last = (steps_of_epochs(case, far * cycle) for far in (1000, 1001))
    if last - first > 300:
        return
    drawn = Counter(key for step in range(first, last) for batch in plan.step(step) for key in keys(batch))
    epochs = range(1000 * cycle, 1001 * cycle)
    assert drawn == Counter((row, e, r) for row, count in enumerate(case.repeats) for e in epochs for r in range(count))


@settings(max_examples=40)
@given(cases())
def test_a_micro_batch_is_full_and_of_one_bucket_and_a_step_of_one_class(case: Case) -> None:
    plan = case.plan
    for step in range(5):
        batches = plan.step(step)
        assert [batch.place for batch in batches] == list(range(case.per_step))
        (area_class,) = {case.class_of_bucket[batch.bucket] for batch in batches}
        for batch in batches:
            assert len(batch.rows) == case.sizes[area_class]
            assert (case.bucket_of_row[batch.rows] == batch.bucket).all()


def test_a_bucket_smaller_than_a_micro_batch_is_trained_too() -> None:
    bucket_of_row = np.array([0] * 32 + [1])
    plan = BatchPlan(bucket_of_row, np.ones(33, np.int64), micro_batch_size=4, micro_batches_per_step=1, seed=0)
    lonely = [b for i in range(8 * 8 + 2) for b in plan.step(i) if b.bucket == 1]
    assert [keys(b) for b in lonely] == [[(32, e, 0) for e in range(4)], [(32, e, 0) for e in range(4, 8)]]


# ── The same step however reached, on any number of processes ──


@settings(max_examples=30)
@given(cases(), st.integers(0, 40))
def test_any_step_directly_is_the_step_by_iteration(case: Case, step: int) -> None:
    plan = case.plan
    for earlier in range(step):
        plan.step(earlier)
    assert contents(plan.step(step)) == contents(case.plan.step(step))


@settings(max_examples=5)
@given(cases(per_step=(256,)), st.integers(0, 100_000))
def test_the_processes_of_any_world_have_the_same_step_among_them(case: Case, step: int) -> None:
    alone = contents(case.plan.step(step))
    for world in WORLDS:
        shares = {rank: contents(case.plan.step(step, rank, world)) for rank in {0, world // 2, world - 1}}
        for rank, share in shares.items():
            count = 256 // world
            assert share == alone[rank * count : (rank + 1) * count]


@settings(max_examples=5)
@given(cases(per_step=(24,)), st.integers(0, 50))
def test_a_world_of_any_divisor(case: Case, step: int) -> None:
    plan = case.plan
    for world in (3, 6, 24):
        union = [part for rank in range(world) for part in contents(plan.step(step, rank, world))]
        assert sorted(union) == contents(plan.step(step))


def test_a_step_that_cannot_be_shared_evenly_is_refused_with_a_remedy() -> None:
    plan = BatchPlan(np.zeros(9, int), np.ones(9, int), micro_batch_size=1, micro_batches_per_step=6, seed=0)
    with pytest.raises(ConfigError, match=r"micro_batches_per_step 6 cannot .* by 4 processes.* with 8 "):
        plan.step(0, 0, 4)


@settings(max_examples=30)
@given(cases(classes=1), st.integers(0, 10))
def test_the_same_micro_batches_whatever_the_accumulation(case: Case, step: int) -> None:
    """Without area classes, more accumulation regroups one and the same list of micro-batches."""
    single, n = replace(case, per_step=1).plan, case.per_step
    regrouped = [keys(single.step(step * n + i)[0]) for i in range(n)]
    assert [keys(batch) for batch in case.plan.step(step)] == regrouped


# ── A shuffle ──


def test_epochs_differ_in_order_and_seeds_too() -> None:
    bucket_of_row = np.zeros(64, dtype=np.int64)
    ones = np.ones(64, dtype=np.int64)
    plan, other = (BatchPlan(bucket_of_row, ones, micro_batch_size=8, micro_batches_per_step=8, seed=s) for s in (0, 1))
    order = [[k[0] for b in p.step(e) for k in keys(b)] for p, e in ((plan, 0), (plan, 1), (other, 0))]
    assert sorted(order[0]) == sorted(order[1]) == sorted(order[2]) == list(range(64))
    assert order[0] != order[1] != order[2] != order[0]


def test_buckets_are_mixed_over_the_epoch() -> None:
    """A bucket is drawn in proportion to what is left of it: its share of each half of an epoch is about a half."""
    bucket_of_row = np.repeat([0, 1, 2], [800, 400, 400])
    plan = BatchPlan(bucket_of_row, np.ones(1600, np.int64), micro_batch_size=4, micro_batches_per_step=1, seed=3)
    first_half = Counter(plan.step(i)[0].bucket for i in range(200))
    for bucket, total in enumerate((200, 100, 100)):
        deviation = 4 * np.sqrt(total * 0.25)  # four standard deviations of the binomial
        assert abs(first_half[bucket] - total / 2) < deviation


def test_classes_are_mixed_over_the_epoch_and_of_their_own_sizes() -> None:
    bucket_of_row = np.repeat([0, 1, 2], [400, 200, 400])
    plan = BatchPlan(
        bucket_of_row,
        np.ones(1000, np.int64),
        micro_batch_size=[8, 2],
        micro_batches_per_step=2,
        seed=3,
        class_of_bucket=[0, 0, 1],
    )
    assert plan.steps_per_epoch == 600 / 16 + 400 / 4 == 137.5
    classes = [int(plan.step(i)[0].bucket == 2) for i in range(137)]
    assert Counter(classes) == {0: 37, 1: 100}
    assert abs(sum(classes[:68]) - 100 * 68 / 137) < 4 * np.sqrt(68 * 0.27 * 0.73)


def test_neighbours_in_the_folder_are_not_neighbours_in_an_epoch() -> None:
    plan = BatchPlan(np.zeros(4096, int), np.ones(4096, int), micro_batch_size=64, micro_batches_per_step=1, seed=5)
    order = np.concatenate([plan.step(i)[0].rows for i in range(64)])
    assert abs(float(np.corrcoef(order[:-1], order[1:])[0, 1])) < 4 / np.sqrt(4095)
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 12  # two are expected


def test_impossible_plans_are_refused() -> None:
    rows = np.zeros(3, np.int64)
    with pytest.raises(ConfigError, match="micro_batch_size 0"):
        BatchPlan(rows, rows + 1, micro_batch_size=0, micro_batches_per_step=1, seed=0)
    with pytest.raises(ConfigError, match="2 area classes need as many"):
        BatchPlan(
            np.array([0, 1]),
            rows[:2] + 1,
            micro_batch_size=[1],
            micro_batches_per_step=1,
            seed=0,
            class_of_bucket=[0, 1],
        )
    with pytest.raises(DataError, match="none of the 3 samples"):
        BatchPlan(rows, rows, micro_batch_size=1, micro_batches_per_step=1, seed=0)
