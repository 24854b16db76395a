"""The plan's promises, for any sizes: exactly once, one bucket, any step directly, the same for any sharing out."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sumizome.data.batch_plan import BatchPlan, MicroBatch, permutation
from sumizome.errors import ConfigError, DataError


@st.composite
def plans(draw: st.DrawFn) -> tuple[BatchPlan, np.ndarray, np.ndarray]:
    bucket_of_row = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=60)))
    repeats = np.array(draw(st.lists(st.integers(0, 3), min_size=len(bucket_of_row), max_size=len(bucket_of_row))))
    repeats[draw(st.integers(0, len(repeats) - 1))] = 1
    plan = BatchPlan(
        bucket_of_row,
        repeats,
        micro_batch_size=draw(st.integers(1, 9)),
        micro_batches_per_step=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**62)),
    )
    return plan, bucket_of_row, repeats


def keys(batch: MicroBatch) -> list[tuple[int, int, int]]:
    return list(zip(batch.rows.tolist(), batch.epochs.tolist(), batch.repeats.tolist(), strict=True))


@given(plans())
def test_every_sample_comes_exactly_once_an_epoch_or_is_carried(made: tuple[BatchPlan, np.ndarray, np.ndarray]) -> None:
    plan, bucket_of_row, repeats = made
    epochs, size = 4, plan.micro_batch_size
    slots = np.bincount(bucket_of_row, repeats).astype(int)
    # The number of micro-batches of four epochs is known without the plan: whole ones of each bucket's four passes.
    batches = [plan.micro_batch(i) for i in range(sum(epochs * n // size for n in slots))]
    drawn = Counter(key for batch in batches for key in keys(batch))
    assert max(drawn.values(), default=1) == 1, "a sample came twice in one of its epochs"

    for bucket, n in enumerate(slots):
        rows = np.flatnonzero(bucket_of_row == bucket)
        wanted = {(row, e, r) for row in rows.tolist() for e in range(epochs) for r in range(repeats[row])}
        got = {key for batch in batches if batch.bucket == bucket for key in keys(batch)}
        carried = wanted - got
        assert got <= wanted
        assert len(carried) == epochs * n % size  # what is missing is a tail that does not fill a micro-batch,
        passes = {e for _, e, _ in carried}  # and it belongs to the last passes, never to earlier ones
        assert all((row, e, r) in got for row, e, r in wanted if e < min(passes, default=epochs))
    assert all(repeats[row] > r for row, _, r in drawn)


@given(plans())
def test_a_micro_batch_is_full_and_of_one_bucket(made: tuple[BatchPlan, np.ndarray, np.ndarray]) -> None:
    plan, bucket_of_row, _ = made
    for step in range(5):
        batches = plan.step(step)
        assert len(batches) == plan.micro_batches_per_step
        for batch in batches:
            assert len(batch.rows) == plan.micro_batch_size
            assert (bucket_of_row[batch.rows] == batch.bucket).all()


@given(plans(), st.integers(0, 40))
def test_any_step_directly_is_the_step_by_iteration(made: tuple[BatchPlan, np.ndarray, np.ndarray], step: int) -> None:
    plan, bucket_of_row, repeats = made
    fresh = BatchPlan(
        bucket_of_row,
        repeats,
        micro_batch_size=plan.micro_batch_size,
        micro_batches_per_step=plan.micro_batches_per_step,
        seed=plan.seed,
    )
    for earlier in range(step):
        plan.step(earlier)
    assert [keys(batch) for batch in plan.step(step)] == [keys(batch) for batch in fresh.step(step)]


@given(plans(), st.integers(0, 10))
def test_the_same_micro_batches_whatever_the_accumulation(
    made: tuple[BatchPlan, np.ndarray, np.ndarray], step: int
) -> None:
    """More accumulation, or more processes, regroup one and the same list of micro-batches."""
    plan, bucket_of_row, repeats = made
    single = BatchPlan(
        bucket_of_row, repeats, micro_batch_size=plan.micro_batch_size, micro_batches_per_step=1, seed=plan.seed
    )
    n = plan.micro_batches_per_step
    regrouped = [keys(single.step(step * n + i)[0]) for i in range(n)]
    assert [keys(batch) for batch in plan.step(step)] == regrouped


@settings(max_examples=10)
@given(plans())
def test_exactly_once_a_million_epochs_away(made: tuple[BatchPlan, np.ndarray, np.ndarray]) -> None:
    """m epochs hold a whole number of micro-batches, n in all; so the far end of the stream has a closed form."""
    plan, _, repeats = made
    n, m, far = plan.samples_per_epoch, plan.micro_batch_size, 1_000_000
    drawn = Counter(key for i in range(far * n, (far + 1) * n) for key in keys(plan.micro_batch(i)))
    epochs = range(far * m, (far + 1) * m)
    assert drawn == Counter((row, e, r) for row, count in enumerate(repeats) for e in epochs for r in range(count))


def test_epochs_differ_in_order_and_seeds_too() -> None:
    bucket_of_row = np.zeros(64, dtype=np.int64)
    ones = np.ones(64, dtype=np.int64)
    plan, other = (BatchPlan(bucket_of_row, ones, micro_batch_size=8, micro_batches_per_step=8, seed=s) for s in (0, 1))
    order = [[k[0] for b in p.step(e) for k in keys(b)] for p, e in ((plan, 0), (plan, 1), (other, 0))]
    assert sorted(order[0]) == sorted(order[1]) == sorted(order[2]) == list(range(64))
    assert order[0] != order[1] != order[2] != order[0]


def test_a_bucket_smaller_than_a_micro_batch_is_trained_too() -> None:
    bucket_of_row = np.array([0] * 32 + [1])
    plan = BatchPlan(bucket_of_row, np.ones(33, np.int64), micro_batch_size=4, micro_batches_per_step=1, seed=0)
    lonely = [b for i in range(8 * 8 + 2) for b in [plan.micro_batch(i)] if b.bucket == 1]
    assert [keys(b) for b in lonely] == [[(32, e, 0) for e in range(4)], [(32, e, 0) for e in range(4, 8)]]


def test_buckets_are_mixed_over_the_epoch() -> None:
    """A bucket is drawn in proportion to what is left of it: its share of each half of an epoch is about a half."""
    bucket_of_row = np.repeat([0, 1, 2], [4000, 2000, 2000])
    plan = BatchPlan(bucket_of_row, np.ones(8000, np.int64), micro_batch_size=4, micro_batches_per_step=1, seed=3)
    first_half = Counter(plan.micro_batch(i).bucket for i in range(1000))
    for bucket, total in enumerate((1000, 500, 500)):
        deviation = 4 * np.sqrt(total * 0.25)  # four standard deviations of the binomial
        assert abs(first_half[bucket] - total / 2) < deviation


@given(st.integers(0, 2**63 - 1), st.integers(0, 500))
def test_permutation_holds_each_number_once(seed: int, n: int) -> None:
    assert sorted(permutation(seed, n).tolist()) == list(range(n))


def test_permutation_is_the_published_splitmix64() -> None:
    """The first outputs of SplitMix64 from seed 1234567, as its authors publish them, in the order they sort to."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert permutation(1234567, 5).tolist() == np.argsort(np.array(published, np.uint64)).tolist()


def test_permutation_is_uniform() -> None:
    """Where element 0 lands, over 6000 seeds: χ² with 5 degrees of freedom, 99.99 % quantile 25.7."""
    landed = np.bincount([permutation(seed * 7919, 6).tolist().index(0) for seed in range(6000)], minlength=6)
    assert ((landed - 1000) ** 2 / 1000).sum() < 25.7


def test_impossible_plans_are_refused() -> None:
    rows = np.zeros(3, np.int64)
    with pytest.raises(ConfigError, match="micro_batch_size 0"):
        BatchPlan(rows, rows + 1, micro_batch_size=0, micro_batches_per_step=1, seed=0)
    with pytest.raises(DataError, match="none of the 3 samples"):
        BatchPlan(rows, rows, micro_batch_size=1, micro_batches_per_step=1, seed=0)
