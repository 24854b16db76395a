"""Latent shards: what is written is what is read, and no damage gets past the opening."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from latent_caches import tag_table
from safetensors.numpy import load_file

from sumizome.data.latent_plan import CachePlan, Fingerprint, load_plan, write_plan
from sumizome.data.latents import LatentCache, Verify, open_latents
from sumizome.data.sealed_json import write_sealed_json
from sumizome.data.shards import commit_unit, latent_fault, verify_unit
from sumizome.data.tasks import Reject
from sumizome.errors import ShardError

FINGERPRINT = Fingerprint(
    vae_digest="v" * 64,
    vae_factor=8,
    latent_mean=(0.5, 0.0, -1.0, 2.0),
    latent_std=(2.0, 1.0, 0.5, 4.0),
    buckets=((64, 32), (32, 32), (32, 64)),
    max_aspect_error=4.0,
    crop="random",
    crop_seed=0,
    resize="pillow-lanczos-1",
    manifest_digest="m" * 64,
)
PLAN = CachePlan(FINGERPRINT, images=11, unit_size=5, command="sumizome prepare m.parquet --model x --out y")
BUCKET_OF = (2, 0, 1, 1, 2, 0, 0, 1, 1, 1, 2)
REJECTED = 3  # an entry of the first unit that has no latent


def latent(number: int) -> np.ndarray:
    height, width = FINGERPRINT.buckets[BUCKET_OF[number]]
    values = np.random.default_rng(number).normal(0, 7, (height // 8, width // 8, 4)).astype(np.float16)
    return values.transpose(2, 0, 1)  # channels-last memory, as a VAE's output may have


def write_unit(root: Path, unit: int) -> None:
    numbers = [number for number in PLAN.rows(unit) if number != REJECTED]
    sides = np.array([FINGERPRINT.buckets[BUCKET_OF[number]] for number in numbers])
    columns = {
        "id": [f"id{number}" for number in numbers],
        "bucket_h": sides[:, 0].tolist(),
        "bucket_w": sides[:, 1].tolist(),
        "original_h": [100 + number for number in numbers],
        "original_w": [200 + number for number in numbers],
        "crop_top": [number % 2 for number in numbers],
        "crop_left": [number % 3 for number in numbers],
        "tags": [["1girl", f"tag {number}"] for number in numbers],
        "kept_tags": [number % 2 for number in numbers],
        "repeats": [1 + number % 2 for number in numbers],
    }
    rejects = [Reject(0, "3.png", "not_finite", "its latent holds NaN")] if unit == 0 else []
    commit_unit(root, PLAN, unit, [latent(number) for number in numbers], columns, rejects)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents") / "cache"
    write_plan(root, PLAN)
    for unit in range(PLAN.units):
        write_unit(root, unit)
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


def row_of(cache: LatentCache, number: int) -> np.ndarray:
    return np.array([cache.index.ids(np.arange(len(cache))).index(f"id{number}")])


# ── Round trip ──


@pytest.mark.parametrize("verify", ["auto", "full", "size"])
def test_every_sample_comes_back_with_its_own_facts(pristine: Path, verify: Verify) -> None:
    cache = open_latents(pristine, verify)
    assert len(cache) == 10
    index = cache.index
    for number in range(11):
        if number == REJECTED:
            continue
        row = row_of(cache, number)
        np.testing.assert_array_equal(cache.read(row)[0].numpy(), latent(number).astype(np.float32))
        assert cache.buckets[index.bucket[row]].tolist() == [list(FINGERPRINT.buckets[BUCKET_OF[number]])]
        assert index.original[row].tolist() == [[100 + number, 200 + number]]
        assert index.crop[row].tolist() == [[number % 2, number % 3]]
        assert index.tag_lists(row) == [["1girl", f"tag {number}"]]
        assert (index.kept_tags[row], index.repeats[row]) == (number % 2, 1 + number % 2)


def test_many_rows_at_once_are_the_rows_one_by_one(pristine: Path) -> None:
    cache = open_latents(pristine)
    rows = np.flatnonzero(cache.index.bucket == 1)[::-1]
    assert len(np.unique(cache.index.unit[rows])) > 1, "the batch must cross units"
    together = cache.read(rows)
    for place, row in enumerate(rows):
        assert (together[place] == cache.read(np.array([row]))[0]).all()
    with pytest.raises(ValueError, match="2 buckets"):
        cache.read(np.array([int(row_of(cache, 0)[0]), int(row_of(cache, 1)[0])]))


def test_normalised_latents_are_by_hand(pristine: Path) -> None:
    cache = open_latents(pristine)
    raw = cache.read(row_of(cache, 4))
    normalised = cache.normalise(raw)
    for channel, (mean, std) in enumerate(zip(FINGERPRINT.latent_mean, FINGERPRINT.latent_std, strict=True)):
        np.testing.assert_array_equal(normalised[0, channel], (raw[0, channel] - mean) / std)


def test_the_files_are_what_the_module_says(pristine: Path) -> None:
    """Other programs may read them: one float16 tensor "HxW" a bucket, rows as the index says."""
    tensors = load_file(pristine / "units" / "unit-00001.safetensors")
    assert {name: (t.shape, t.dtype.name) for name, t in tensors.items()} == {
        "64x32": ((2, 4, 8, 4), "float16"),
        "32x32": ((3, 4, 4, 4), "float16"),
    }
    np.testing.assert_array_equal(tensors["32x32"][1], latent(8))


def test_the_plan_comes_back(pristine: Path) -> None:
    assert load_plan(pristine) == PLAN
    assert [len(PLAN.rows(unit)) for unit in range(PLAN.units)] == [5, 5, 1]


def test_categories_come_back_and_leave_no_trace_where_there_are_none(tmp_path: Path) -> None:
    write_plan(tmp_path / "plain", PLAN)
    assert "categories" not in json.loads((tmp_path / "plain" / "latents.json").read_text())
    plan = dataclasses.replace(PLAN, categories={"miku": "character", "<b>": "artist", "赤": "artist"})
    write_plan(tmp_path / "told", plan)
    assert load_plan(tmp_path / "told") == plan
    text = (tmp_path / "told" / "latents.json").read_text()
    (tmp_path / "told" / "latents.json").write_text(text.replace("miku", "luka"))
    with pytest.raises(ShardError, match="damaged"):
        load_plan(tmp_path / "told")


def test_tag_counts_can_be_taken_of_a_part(pristine: Path) -> None:
    table = tag_table(open_latents(pristine).index, np.array([0, 5, 9]))
    assert table["tags"].type == pa.list_(pa.string())
    assert [tags[0] for tags in table["tags"].to_pylist()] == ["1girl"] * 3


# ── Damage ──

FILES = ["latents.json", *(f"units/unit-00001.{kind}" for kind in ("safetensors", "parquet", "json"))]


def read_everything(root: Path, verify: Verify) -> None:
    cache = open_latents(root, verify)
    for row in range(len(cache)):
        cache.read(np.array([row]))


@pytest.mark.parametrize("verify", ["full", "size"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["delete", "truncate", "empty", "zeros", "longer"])
def test_a_harmed_file_is_named(root: Path, name: str, harm: str, verify: Verify) -> None:
    path = root / name
    content = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        harmed = {"truncate": content[:-7], "empty": b"", "zeros": bytes(len(content)), "longer": content + b"\0"}
        path.write_bytes(harmed[harm])
    for _ in range(2):  # and again at the second opening
        with pytest.raises(ShardError, match=Path(name).name.replace(".", r"\.")):
            read_everything(root, verify)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_seen_on_opening(root: Path, name: str) -> None:
    for path, _ in flip_bits(root / name, first=0):
        with pytest.raises(ShardError, match=path.name):
            open_latents(root, "full")
    read_everything(root, "full")  # undone, all is well


def test_a_flipped_bit_in_a_large_shard_is_seen_before_the_sample_is_used(root: Path) -> None:
    """Opened by size alone, a latent's own checksum finds it, and names the picture."""
    path = root / "units" / "unit-00001.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for _ in flip_bits(path, first=header):
        cache = open_latents(root, "size")
        with pytest.raises(ShardError, match=r"unit-00001\.safetensors is damaged at picture id[5-9]:"):
            for row in range(len(cache)):
                cache.read(np.array([row]))


def test_a_flipped_bit_in_a_large_shard_s_header_never_gives_wrong_latents(root: Path) -> None:
    path = root / "units" / "unit-00001.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for _ in flip_bits(path, first=0, last=header):
        try:
            cache = open_latents(root, "size")
            read = {number: cache.read(row_of(cache, number)) for number in PLAN.rows(1)}
        except ShardError:
            continue
        for number, raw in read.items():  # the bit said nothing, such as a blank that became a tab
            np.testing.assert_array_equal(raw[0], latent(number).astype(np.float32))


def flip_bits(path: Path, first: int, last: int | None = None) -> Iterator[tuple[Path, int]]:
    """One bit at a time, at 25 places of a file; undone afterwards."""
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    places = np.arange(first, last or len(content))
    for position in rng.choice(places, size=min(25, len(places)), replace=False).tolist():
        bit = 1 << int(rng.integers(8))
        content[position] ^= bit
        path.write_bytes(content)
        yield path, position
        content[position] ^= bit
        path.write_bytes(content)


def test_the_error_says_what_mends_it(root: Path) -> None:
    (root / "units" / "unit-00002.json").unlink()
    with pytest.raises(ShardError, match=r"unit 2 of 3 is not finished; run `sumizome prepare m.parquet .*` again"):
        open_latents(root)


def test_a_record_of_another_unit_or_fingerprint_is_foreign(root: Path) -> None:
    units = root / "units"
    own = (units / "unit-00000.json").read_text()
    shutil.copy(units / "unit-00001.json", units / "unit-00000.json")
    with pytest.raises(ShardError, match="other latents or to another unit"):
        open_latents(root)
    (units / "unit-00000.json").write_text(own)
    other = CachePlan(Fingerprint(**{**vars(FINGERPRINT), "crop_seed": 1}), 11, 5, "c")
    with pytest.raises(ShardError, match="other latents"):
        verify_unit(root, other, 0)


def test_counts_that_do_not_add_up_are_refused(root: Path) -> None:
    more = CachePlan(FINGERPRINT, images=12, unit_size=5, command="c")
    with pytest.raises(ShardError, match="1 written and 0 rejected do not make the 2 planned"):
        verify_unit(root, more, 2)


def test_no_latents_and_another_version_are_told_apart(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no latents\.json"):
        open_latents(tmp_path)
    content = json.loads((root / "latents.json").read_text())

    del content["digest"]
    write_sealed_json(root / "latents.json", {**content, "format": 99})
    with pytest.raises(ShardError, match=r"not of format \d, which this version reads"):
        open_latents(root)


# ── Fingerprint ──


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"vae_digest": "w" * 64}, "another VAE"),
        ({"buckets": ((32, 32),)}, "another bucket table"),
        ({"manifest_digest": "n" * 64}, "another manifest"),
        ({"vae_digest": "w" * 64, "resize": "vips"}, "another VAE .*another code that resizes"),
    ],
)
def test_a_foreign_fingerprint_is_named(pristine: Path, expected: dict[str, object], words: str) -> None:
    cache = open_latents(pristine)
    with pytest.raises(ShardError, match=words + ".*sumizome prepare m.parquet"):
        cache.require(**expected)
    cache.require(**{name: getattr(FINGERPRINT, name) for name in expected})


def test_every_part_of_the_fingerprint_changes_its_digest() -> None:
    for name, value in vars(FINGERPRINT).items():
        other = value[::-1] if isinstance(value, tuple) else value + type(value)(1)
        other = {"background": (0, 0, 1), "flip": True}.get(name, other)
        changed = Fingerprint(**{**vars(FINGERPRINT), name: other})
        assert changed.digest != FINGERPRINT.digest
        assert (changed.latents_digest == FINGERPRINT.latents_digest) == (name in {"manifest_digest", "retries"})


# ── Half precision ──


def test_only_latents_that_float16_holds_are_stored() -> None:
    fine = np.full((4, 2, 2), 65504, np.float32)
    assert latent_fault(fine) is None and latent_fault(-fine) is None
    for value, reason in (
        (np.nan, "not_finite"),
        (np.inf, "not_finite"),
        (-np.inf, "not_finite"),
        (65536.0, "overflow"),
    ):
        bad = np.zeros((4, 2, 2), np.float32)
        bad[1, 0, 1] = value
        found = latent_fault(bad)
        assert found is not None and found[0] == reason
    # What the limit keeps out is what numpy would turn into infinity.
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(65536.0).astype(np.float16)) and np.isfinite(fine.astype(np.float16)).all()
