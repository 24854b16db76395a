"""Buckets against the report's table, and crops against where the pixels really went."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumizome.data.buckets import (
    BucketConfig,
    assign_buckets,
    bucket_classes,
    bucket_report,
    bucket_table,
    cover_sizes,
    crop_geometry,
)
from sumizome.errors import ConfigError

REPORT = BucketConfig(area=(512, 768), min_side=256, max_side=1024)
# (width, height) as NovelAI's own program prints them.
REPORT_TABLE = """256 1024  320 1024  384 1024  384 960  384 896  448 832  512 768  512 704  512 512  576 640  640 576
    704 512  768 512  832 448  896 384  960 384  1024 384  1024 320  1024 256"""


def sizes(*rows: tuple[int, int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def any_sizes(low: int = 1, high: int = 5000, n: int = 12) -> st.SearchStrategy[np.ndarray]:
    side = st.integers(low, high)
    return st.lists(st.tuples(side, side), min_size=1, max_size=n).map(lambda rows: sizes(*rows))


@st.composite
def configs(draw: st.DrawFn) -> BucketConfig:
    step = draw(st.sampled_from([8, 16, 32, 64]))
    side = draw(st.integers(step, 24 * step))
    return BucketConfig(
        area=draw(st.one_of(st.just(side), st.tuples(st.just(side), st.integers(side, 2 * side)))), step=step
    )


# ── The table ──


def test_the_report_has_these_nineteen_buckets() -> None:
    numbers = [int(word) for word in REPORT_TABLE.split()]
    expected = {(h, w) for w, h in zip(numbers[::2], numbers[1::2], strict=True)}
    assert len(expected) == 19
    assert set(map(tuple, bucket_table(REPORT).tolist())) == expected


def test_sdxl_has_832_by_1216_and_its_kin() -> None:
    table = set(map(tuple, bucket_table(BucketConfig()).tolist()))
    kin = {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (2048, 512), (960, 1088)}
    assert kin | {(w, h) for h, w in kin} <= table


def test_tiny_canvases() -> None:
    table = bucket_table(BucketConfig(area=64, step=16)).tolist()
    assert [64, 64] in table and [80, 48] in table and [48, 80] in table and len(table) == 9


@given(configs())
def test_any_table_is_a_sorted_mirrored_set_of_whole_steps_within_the_area(config: BucketConfig) -> None:
    height, width = (config.area, config.area) if isinstance(config.area, int) else config.area
    table = bucket_table(config)
    assert (table % config.step == 0).all() and (table >= config.step).all()
    assert (table.prod(axis=1) <= height * width).all()
    aspect = table[:, 1] / table[:, 0]
    assert (np.diff(aspect) > 0).all()
    assert (table == table[::-1, ::-1]).all()
    assert (table[:, 0] == table[:, 1]).any()


def test_a_table_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="min_side"):
        bucket_table(BucketConfig(area=1024, min_side=2048, max_side=4096))
    with pytest.raises(ConfigError, match="at least one step"):
        bucket_table(BucketConfig(area=32, step=64))


# ── Assignment ──


@given(any_sizes(), configs())
def test_assignment_is_the_nearest_aspect_by_brute_force(pictures: np.ndarray, config: BucketConfig) -> None:
    table = bucket_table(config)
    assigned = assign_buckets(pictures, table)
    for (h, w), bucket, error in zip(pictures.tolist(), assigned.bucket, assigned.aspect_error, strict=True):
        differences = [abs(signed_aspect(h, w) - signed_aspect(*row)) for row in table.tolist()]
        assert error == pytest.approx(min(differences), abs=1e-12)
        assert differences[bucket] == pytest.approx(min(differences), abs=1e-12)


def signed_aspect(h: int, w: int) -> float:
    return w / h - 1 if w >= h else -(h / w - 1)


def test_wide_pictures_have_the_report_s_error() -> None:
    """Where width ≥ height the error is the report's |aspect − aspect of the bucket|, aspect = width / height."""
    pictures = sizes((700, 1000), (500, 2900), (1000, 1000), (480, 854))
    assigned = assign_buckets(pictures, table := bucket_table(REPORT))
    chosen = table[assigned.bucket]
    expected = np.abs(pictures[:, 1] / pictures[:, 0] - chosen[:, 1] / chosen[:, 0])
    np.testing.assert_allclose(assigned.aspect_error, expected)


@given(any_sizes())
def test_a_turned_picture_takes_the_turned_bucket(pictures: np.ndarray) -> None:
    table = bucket_table(REPORT)
    upright, turned = assign_buckets(pictures, table), assign_buckets(pictures[:, ::-1], table)
    np.testing.assert_array_equal(upright.aspect_error, turned.aspect_error)
    aspects = np.array([signed_aspect(*row) for row in table.tolist()])
    np.testing.assert_allclose(
        np.abs(aspects[upright.bucket] - [signed_aspect(*p) for p in pictures.tolist()]),
        np.abs(aspects[turned.bucket] + [signed_aspect(*p) for p in pictures.tolist()]),
        atol=1e-12,
    )


def test_strips_are_rejected_both_ways_and_counted() -> None:
    pictures = sizes((100, 799), (100, 800), (799, 100), (800, 100), (512, 512))
    report = bucket_report(pictures, bucket_table(REPORT), max_aspect_error=4.0)
    assert report.rejected == 2  # 8:1 is exactly 4 away from the widest bucket's 4:1
    assert report.count.sum() == 3


# ── Geometry ──


@given(any_sizes(), configs())
def test_the_canvas_lies_inside_the_resized_picture_and_touches_two_sides(
    pictures: np.ndarray, config: BucketConfig
) -> None:
    table = bucket_table(config)
    targets = table[assign_buckets(pictures, table).bucket]
    made = crop_geometry(pictures, targets, [str(i) for i in range(len(pictures))], crop="random", crop_seed=3)
    assert (made.resized >= targets).all()
    assert (made.resized == targets).any(axis=1).all()
    assert (made.offset >= 0).all() and (made.offset + targets <= made.resized).all()
    # The picture's own aspect, to the half pixel that rounding the free side may take.
    scale = np.where(made.resized == targets, targets / pictures, 0).max(axis=1, keepdims=True)
    assert (np.abs(made.resized - pictures * scale) <= 0.5 + 1e-6).all()


def test_random_crops_are_uniform_seeded_and_per_picture() -> None:
    ids = [f"picture {i}" for i in range(4000)]
    pictures, targets = np.tile(sizes((64, 72)), (4000, 1)), np.tile(sizes((64, 64)), (4000, 1))
    lefts = crop_geometry(pictures, targets, ids, crop="random", crop_seed=1).offset
    assert (lefts[:, 0] == 0).all()
    counts = np.bincount(lefts[:, 1], minlength=9)
    expected = 4000 / 9
    assert ((counts - expected) ** 2 / expected).sum() < 35.6  # χ² with 8 degrees of freedom, 99.998 % quantile
    again = crop_geometry(pictures[:10], targets[:10], ids[:10], crop="random", crop_seed=1).offset
    np.testing.assert_array_equal(lefts[:10], again)
    other = crop_geometry(pictures, targets, ids, crop="random", crop_seed=2).offset
    assert (lefts != other).any()


def test_center_crops_halve_the_overhang() -> None:
    made = crop_geometry(sizes((64, 75), (90, 64)), sizes((64, 64), (64, 64)), ["a", "b"], crop="center")
    assert made.offset.tolist() == [[0, 5], [13, 0]]


# ── Report ──


def test_the_report_adds_up_by_hand() -> None:
    table = sizes((128, 64), (64, 64), (64, 128))
    pictures = sizes((64, 64), (80, 64), (32, 64), (1280, 640))
    report = bucket_report(pictures, table)
    assert report.count.tolist() == [1, 2, 1] and report.rejected == 0
    np.testing.assert_allclose(report.aspect_error, [0, (0 + 0.25) / 2, 0])
    np.testing.assert_allclose(report.crop_share, [0, (0 + 16 / 80) / 2, 0])
    assert report.upscaled.tolist() == [0, 0, 1]
    assert report.mean(report.crop_share) == pytest.approx(16 / 80 / 4)


def test_the_report_s_measure_on_pictures_like_its_own() -> None:
    """Crops of the 512·768 table stay small: in the report usually less than 32 px (mean aspect error 0.033)."""
    rng = np.random.default_rng(0)
    aspect = np.exp(rng.normal(-0.25, 0.3, 20_000)).clip(0.25, 4)  # mostly portraits
    pictures = np.stack([np.sqrt(1e6 / aspect), np.sqrt(1e6 * aspect)], axis=1).astype(np.int64)
    table = bucket_table(REPORT)
    target = table[assign_buckets(pictures, table).bucket]
    overhang = (cover_sizes(pictures, target) - target).max(axis=1)
    assert np.median(overhang) < 32


def test_a_picture_s_bucket_does_not_depend_on_its_neighbours() -> None:
    table = bucket_table(REPORT)
    many = np.stack(np.meshgrid(np.arange(50, 2000, 41), np.arange(50, 2000, 37)), axis=-1).reshape(-1, 2)
    whole = assign_buckets(many, table)
    for i in (0, 17, len(many) - 1):
        assert assign_buckets(many[i : i + 1], table).bucket[0] == whole.bucket[i]


# ── Area classes ──

AREAS = BucketConfig(areas=(512, 768, 1024))


def test_area_classes_are_the_tables_of_their_areas_one_behind_the_other() -> None:
    table = bucket_table(AREAS)
    parts = [bucket_table(BucketConfig(area=side)) for side in (512, 768, 1024)]
    assert table.tolist() == np.concatenate(parts).tolist()
    assert bucket_classes(table).tolist() == np.repeat([0, 1, 2], [len(part) for part in parts]).tolist()
    assert not bucket_classes(parts[2]).any()


def test_a_canvas_of_two_classes_belongs_to_the_smaller() -> None:
    table = bucket_table(BucketConfig(areas=(768, 1024), max_side=1024))
    assert len(np.unique(table, axis=0)) == len(table)
    assert bucket_classes(table).max() == 1
    with pytest.raises(ConfigError, match="rising"):
        bucket_table(BucketConfig(areas=(1024, 512)))
    with pytest.raises(ConfigError, match="no canvas that a smaller class lacks"):
        bucket_table(BucketConfig(areas=(512, 513)))


@given(st.lists(st.tuples(st.integers(16, 5000), st.integers(16, 5000)), min_size=1, max_size=40))
def test_a_picture_goes_to_the_largest_class_that_it_fills(pictures: list[tuple[int, int]]) -> None:
    sizes, table = np.array(pictures), bucket_table(AREAS)
    classes = bucket_classes(table)
    found = assign_buckets(sizes, table)
    for size, bucket, error in zip(sizes, found.bucket.tolist(), found.aspect_error.tolist(), strict=True):
        expected = None
        for area_class in (2, 1, 0):
            part = np.flatnonzero(classes == area_class)
            nearest = assign_buckets(size[None], table[part])
            target = table[part][nearest.bucket]
            if area_class == 0 or (cover_sizes(size[None], target) <= size).all():
                expected = part[nearest.bucket[0]], nearest.aspect_error[0]
                break
        assert (bucket, error) == expected


def test_only_what_fills_no_class_is_enlarged_and_it_is_counted() -> None:
    sizes = np.array([[2000, 2000], [800, 800], [767, 767], [512, 512], [511, 511], [1024, 1023]])
    table = bucket_table(AREAS)
    assert bucket_classes(table)[assign_buckets(sizes, table).bucket].tolist() == [2, 1, 0, 0, 0, 1]
    assert bucket_report(sizes, table).upscaled.sum() == 1
