"""Batches: every part of a sample is its own, a step is the same however it is reached, nothing held out is trained."""

import dataclasses
import itertools
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from latent_caches import tag_table

from sumizome.data.buckets import BucketConfig, bucket_table
from sumizome.data.captions import CaptionConfig, build_caption, plain_caption
from sumizome.data.latent_index import picture_hashes
from sumizome.data.latent_plan import CachePlan, Fingerprint, write_plan
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.loader import BatchLoader, StepBatches, TrainBatch, build_loader, split_validation
from sumizome.data.shard_files import ShardSource
from sumizome.data.shards import commit_unit
from sumizome.data.tags import TagWeightConfig, tag_loss_weights
from sumizome.errors import ConfigError, ShardError
from sumizome.seeds import derive_seed

BUCKETS = ((48, 32), (32, 32), (32, 48))
FINGERPRINT = Fingerprint("v", 8, (0.0,) * 4, (1 / 0.13025,) * 4, BUCKETS, 4.0, "random", 0, "pillow-lanczos-1", "m")
COUNT = 60


def bucket_of(number: int) -> int:
    return (number * number) % 3


def facts(number: int) -> dict[str, object]:
    height, width = BUCKETS[bucket_of(number)]
    return {
        "id": f"{number * 7919:016x}",
        "bucket_h": height,
        "bucket_w": width,
        "original_h": 100 + number,
        "original_w": 300 + number,
        "crop_top": number % 5,
        "crop_left": number % 4,
        "tags": ["kept", "1girl", f"tag {number}", *(["common"] if number % 2 else [])],
        "kept_tags": number % 2,
        "repeats": 1 + number % 3,
    }


NUMBER_OF_ID = {facts(number)["id"]: number for number in range(COUNT)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """Sixty samples in three units; sample k's latent holds k/16 everywhere."""
    root = tmp_path_factory.mktemp("latents")
    plan = CachePlan(FINGERPRINT, COUNT, 25, "sumizome prepare")
    write_plan(root, plan)
    for unit in range(plan.units):
        rows = [facts(number) for number in plan.rows(unit)]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        latents = [
            np.full((4, BUCKETS[bucket_of(n)][0] // 8, BUCKETS[bucket_of(n)][1] // 8), n / 16, np.float16)
            for n in plan.rows(unit)
        ]
        commit_unit(root, plan, unit, latents, columns, [])
    return open_latents(root)


def loader_of(cache: LatentCache, **changes: object) -> BatchLoader:
    settings = {"seed": 3, "micro_batch_size": 4, "micro_batches_per_step": 2, "validation_count": 6, "prefetch": 2}
    return build_loader(cache, **{**settings, **changes})


def assert_same(one: TrainBatch, other: TrainBatch) -> None:
    for field in dataclasses.fields(TrainBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b, field.name


# ── What a batch holds ──


def test_every_part_of_a_sample_is_its_own(cache: LatentCache) -> None:
    captions = CaptionConfig(tag_dropout=0.3, caption_dropout=0.2)
    loader = loader_of(cache, captions=captions, categories={"common": "character"})
    seen = Counter()
    for step in range(12):
        for batch, planned in zip(loader.step(step), loader.plan.step(step), strict=True):
            assert batch.latents.dtype == batch.time_ids.dtype == batch.tag_weight.dtype == torch.float32
            for place, sample_id in enumerate(batch.sample_ids):
                number = NUMBER_OF_ID[sample_id]
                its, height_width = facts(number), BUCKETS[bucket_of(number)]
                assert tuple(batch.latents[place].shape) == (4, height_width[0] // 8, height_width[1] // 8)
                expected = torch.full((4, 1, 1), number / 16) * 0.13025
                assert torch.allclose(batch.latents[place], expected, rtol=1e-6)
                sizes = (its["original_h"], its["original_w"], its["crop_top"], its["crop_left"], *height_width)
                assert batch.time_ids[place].tolist() == list(sizes)
                epoch, repeat = batch.epochs[place], int(planned.repeats[place])
                assert batch.seeds[place].item() == derive_seed(3, "sample", epoch, sample_id, repeat)
                assert batch.captions[place] == build_caption(
                    its["tags"],
                    its["kept_tags"],
                    captions,
                    seed=3,
                    epoch=epoch,
                    sample_id=sample_id,
                    repeat=repeat,
                    categories={"common": "character"},
                )
                seen[sample_id] += 1
    assert len(seen) > 40


def test_no_two_showings_share_a_seed(cache: LatentCache) -> None:
    loader = loader_of(cache)
    seeds = [seed for step in range(40) for batch in loader.step(step) for seed in batch.seeds.tolist()]
    assert len(set(seeds)) == len(seeds) == 40 * 8


def test_repeats_are_honoured_to_the_end_of_an_epoch_cycle(cache: LatentCache) -> None:
    loader = loader_of(cache, micro_batch_size=1, micro_batches_per_step=1)
    shown = Counter(loader.step(step)[0].sample_ids[0] for step in range(2 * loader.plan.samples_per_epoch))
    held_out = {loader.cache.index.ids(np.array([row]))[0] for row in loader.validation_rows}
    assert len(held_out) == 6
    for sample_id, number in NUMBER_OF_ID.items():
        assert shown[sample_id] == (0 if sample_id in held_out else 2 * (1 + number % 3))


def test_tag_weights_are_those_of_the_trained_part(cache: LatentCache) -> None:
    config = TagWeightConfig(strength=0.5, min_count=1)
    loader = loader_of(cache, tag_weights=config)
    train, _ = split_validation(cache.index.picture_hash, 6)
    expected = dict(
        zip(cache.index.ids(train), tag_loss_weights(tag_table(cache.index, train), config).tolist(), strict=True)
    )
    assert len(set(expected.values())) > 2
    for step in range(8):
        for batch in loader.step(step):
            assert batch.tag_weight.tolist() == pytest.approx([expected[i] for i in batch.sample_ids], rel=1e-6)


def test_the_fingerprint_is_the_latents(cache: LatentCache) -> None:
    assert loader_of(cache).fingerprint == FINGERPRINT.digest


# ── The same bits however reached ──


@pytest.mark.parametrize(("ahead", "held"), [(1, [1, 1, 1]), (2, [2, 2, 2]), (5, [4, 3, 5]), (16, [15, 14, 13])])
def test_batches_are_made_when_half_of_them_are_gone_and_no_further_than_asked(ahead: int, held: list[int]) -> None:
    begun = list[int]()

    def make(step: int) -> list[int]:
        begun.append(step)
        return [step]

    with StepBatches(make, 7, ahead) as batches:
        for taken, left in enumerate(held, start=1):
            assert next(batches) == [6 + taken]
            batches.make_ahead()
            batches.make_ahead()
            batches._pool.submit(int).result()  # behind all that was begun
            assert begun == list(range(7, 7 + taken + left))
    assert len(begun) == len(held) + held[-1] and not batches._made, "nothing is begun, or held, once it is closed"


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_nothing_is_made_behind_the_end(ahead: int) -> None:
    made = list[int]()
    with StepBatches(lambda step: made.append(step) or [step], 3, ahead, until=6) as batches:
        assert list(batches) == [[3], [4], [5]]
    assert made == [3, 4, 5]


def test_workers_and_prefetching_change_nothing(cache: LatentCache) -> None:
    runs = []
    for prefetch, workers in ((0, 1), (2, 0), (1, 1), (4, 1), (2, 2), (4, 4), (1, 4)):
        with loader_of(cache, prefetch=prefetch, workers=workers).from_step(5) as steps:
            runs.append(list(itertools.islice(steps, 10)))
    for steps in zip(*runs, strict=True):
        for first, *others in zip(*steps, strict=True):
            for other in others:
                assert_same(first, other)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_processes_have_the_step_among_them_in_order(cache: LatentCache, world: int) -> None:
    alone, steps = loader_of(cache, micro_batches_per_step=6), (0, 1, 7, 30)
    loaders = [loader_of(cache, micro_batches_per_step=6, rank=rank, world=world) for rank in range(world)]
    assert [place for loader in loaders for place in loader.share] == list(range(6))
    for step in steps:
        together = [batch for loader in loaders for batch in loader.step(step)]
        for one, other in zip(alone.step(step), together, strict=True):
            assert_same(one, other)


def test_a_number_of_processes_that_does_not_fit_is_refused_at_once(cache: LatentCache) -> None:
    with pytest.raises(ConfigError, match="by 4 processes"):
        loader_of(cache, micro_batches_per_step=6, rank=0, world=4)


@pytest.mark.gpu
def test_pinning_changes_nothing_but_the_place(cache: LatentCache) -> None:
    for plain, pinned in zip(loader_of(cache).step(3), loader_of(cache, pin_memory=True).step(3), strict=True):
        assert pinned.latents.is_pinned() and pinned.tag_weight.is_pinned()
        assert_same(plain, pinned)


def test_a_step_does_not_depend_on_what_came_before(cache: LatentCache) -> None:
    through, direct = loader_of(cache), loader_of(cache)
    with through.from_step(0) as steps:
        twelfth = next(itertools.islice(steps, 12, None))
    for one, other in zip(twelfth, direct.step(12), strict=True):
        assert_same(one, other)


def test_another_seed_is_another_run(cache: LatentCache) -> None:
    one, other = loader_of(cache).step(0), loader_of(cache, seed=4).step(0)
    assert [b.sample_ids for b in one] != [b.sample_ids for b in other]
    assert not {s for b in one for s in b.seeds.tolist()} & {s for b in other for s in b.seeds.tolist()}


# ── Area classes ──


def test_with_area_classes_each_step_is_of_one_and_every_picture_comes(tmp_path: Path) -> None:
    table = bucket_table(BucketConfig(areas=(32, 64), step=16))
    buckets = tuple((height, width) for height, width in table.tolist())
    plan = CachePlan(dataclasses.replace(FINGERPRINT, buckets=buckets), 40, 40, "sumizome prepare")
    write_plan(tmp_path, plan)
    rows = [facts(number) for number in range(40)]
    canvas = table[np.arange(40) * 7 % len(table)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"bucket_h": canvas[:, 0].tolist(), "bucket_w": canvas[:, 1].tolist(), "repeats": [1] * 40}
    commit_unit(tmp_path, plan, 0, [np.zeros((4, h // 8, w // 8), np.float16) for h, w in canvas], columns, [])
    loader = loader_of(open_latents(tmp_path), micro_batch_size=1, micro_batches_per_step=2, validation_count=0)
    shown = Counter[str]()
    largest = Counter[bool]()
    for step in range(40):  # two epochs: by then nothing is carried
        sizes = [batch.time_ids[0, 4:].prod().item() for batch in loader.step(step)]
        (large,) = {size > 32 * 32 for size in sizes}
        largest[large] += 1
        shown.update(sample_id for batch in loader.step(step) for sample_id in batch.sample_ids)
    assert set(shown.values()) == {2} and len(shown) == 40
    assert len(largest) == 2


# ── The thread ──


def test_a_failure_in_the_thread_reaches_the_caller_at_its_step_and_stays(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(cache, prefetch=3)
    healthy = LatentCache.read
    caller = threading.current_thread()

    def read(self: LatentCache, rows: np.ndarray) -> torch.Tensor:
        assert threading.current_thread() is not caller
        if (rows == loader.plan.step(7)[1].rows).all():
            raise ShardError("unit-00001.safetensors is damaged at picture x")
        return healthy(self, rows)

    monkeypatch.setattr(LatentCache, "read", read)
    with loader.from_step(5) as steps:
        assert len([next(steps), next(steps)]) == 2
        for _ in range(2):
            with pytest.raises(ShardError, match="damaged at picture x"):
                next(steps)


def test_leaving_early_ends_the_thread(cache: LatentCache) -> None:
    before = threading.active_count()
    with loader_of(cache, prefetch=2).from_step(0) as steps:
        next(steps)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with loader_of(cache, prefetch=6, workers=4).from_step(0) as steps:
        next(steps)
    assert threading.active_count() == before


# ── Validation ──


def ids_of(count: int) -> pa.ChunkedArray:
    names = [f"{derive_seed(number):016x}" for number in range(count)]
    return pa.chunked_array([names[: count // 3], names[count // 3 :]])


def hashes(ids: pa.ChunkedArray) -> np.ndarray:
    return picture_hashes(ids.to_pylist())


def test_the_split_is_exact_disjoint_and_of_no_order() -> None:
    ids = ids_of(500)
    train, held = split_validation(hashes(ids), 40)
    assert len(held) == 40 and sorted([*train, *held]) == list(range(500))
    shuffled = np.random.default_rng(0).permutation(500)
    _, again = split_validation(hashes(ids.take(pa.array(shuffled))), 40)
    assert set(shuffled[again]) == set(held)


def test_adding_pictures_replaces_few_of_those_held_out() -> None:
    few, many = ids_of(500), ids_of(600)
    before = set(few.take(split_validation(hashes(few), 40)[1]).to_pylist())
    after = set(many.take(split_validation(hashes(many), 40)[1]).to_pylist())
    # Of 100 new pictures about 40·100/600 displace an old one.
    assert len(before - after) <= 16


def test_a_copy_of_a_held_out_picture_is_not_trained_on() -> None:
    names = [f"{number:016x}" for number in range(10)]
    copies = [f"{name}-2" for name in names]
    train, held = split_validation(hashes(pa.chunked_array([names + copies])), 4)
    assert len(held) == 4
    assert {row % 10 for row in held.tolist()} & {row % 10 for row in train.tolist()} == set()
    assert len(train) == 12


def test_holding_everything_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"10 pictures are to be held out .* there are 10 in all"):
        split_validation(hashes(ids_of(10)), 10)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 100])
def test_validation_shows_each_held_out_picture_once_and_plainly(cache: LatentCache, micro_batch_size: int) -> None:
    loader = loader_of(cache, captions=CaptionConfig(caption_dropout=1.0), validation_count=20)
    batches = list(loader.validation_batches(micro_batch_size))
    assert sorted(i for b in batches for i in b.sample_ids) == sorted(cache.index.ids(loader.validation_rows))
    assert max(len(b.sample_ids) for b in batches) <= micro_batch_size
    for batch in batches:
        assert len({bucket_of(NUMBER_OF_ID[i]) for i in batch.sample_ids}) == 1
        assert batch.tag_weight.tolist() == [1.0] * len(batch.sample_ids)
        for sample_id, caption in zip(batch.sample_ids, batch.captions, strict=True):
            its = facts(NUMBER_OF_ID[sample_id])
            assert caption == plain_caption(its["tags"], its["kept_tags"], CaptionConfig())


def test_validation_is_the_same_for_runs_of_another_seed(cache: LatentCache) -> None:
    one, other = (list(loader_of(cache, seed=seed).validation_batches(4)) for seed in (1, 2))
    for a, b in zip(one, other, strict=True):
        assert_same(a, b)


def test_without_validation_everything_is_trained(cache: LatentCache) -> None:
    loader = loader_of(cache, validation_count=0)
    assert list(loader.validation_batches(4)) == []
    assert loader.plan.samples_per_epoch == sum(1 + number % 3 for number in range(COUNT))


# ── Over a network ──


class SlowShards:
    """Shards that are read over a network: the place of every read, in their order."""

    parallel = True

    def __init__(self, shards: ShardSource) -> None:
        self.shards, self.read_places = shards, list[tuple[int, str, int]]()

    def read(self, unit: int, tensor: str, row: int, into: memoryview) -> None:
        self.read_places.append((unit, tensor, row))
        self.shards.read(unit, tensor, row, into)

    def read_anew(self, unit: int, tensor: str, row: int, into: memoryview) -> bool:
        return self.shards.read_anew(unit, tensor, row, into)

    def location(self, unit: int) -> str:
        return self.shards.location(unit)

    def take_faults(self) -> list[str]:
        return self.shards.take_faults()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_next_steps_latents_are_under_way_while_a_step_is_made(cache: LatentCache, prefetch: int) -> None:
    far = SlowShards(cache.shards)
    remote = LatentCache(cache.root, cache.plan, cache.index, far)
    loader, here = loader_of(remote, prefetch=prefetch), loader_of(cache, prefetch=prefetch)

    def places(step: int) -> set[tuple[int, str, int]]:
        rows = np.concatenate([planned.rows for planned in loader.plan.step(step)])
        named = (f"{h}x{w}" for h, w in cache.buckets[cache.index.bucket[rows]].tolist())
        return set(zip(cache.index.unit[rows].tolist(), named, cache.index.row[rows].tolist(), strict=True))

    with loader.from_step(5) as steps, here.from_step(5) as expected:
        for step in range(5, 9):
            for one, other in zip(next(steps), next(expected), strict=True):
                assert_same(one, other)
            for coming in list(remote._coming.values()):
                coming.result()
            assert places(step + 1) <= set(far.read_places), "asked for before its step is"
    if prefetch == 0:  # nothing is read twice that is not shown twice
        shown = [planned.rows for step in range(5, 10) for planned in loader.plan.step(step)]
        assert len(far.read_places) <= sum(map(len, shown))
