"""Several crops and flips of a picture: each is what its conditioning says, and an epoch shows one of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from preparing import CONFIG, COUNT, draw_pictures, finish, manifest_of, small_vae, tree_digest

from sumizome.data.buckets import BucketConfig
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.loader import BatchLoader, build_loader
from sumizome.data.manifest import Manifest
from sumizome.errors import ConfigError, ShardError

VARIANTS = replace(CONFIG, crops=2, flip=True)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("variants")
    (root / "pictures").mkdir()
    return manifest_of(draw_pictures(root / "pictures"), root / "m.parquet")


@pytest.fixture(scope="module")
def cache(manifest: Manifest, vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    out = tmp_path_factory.mktemp("latents") / "out"
    finish(manifest, vae, out, VARIANTS)
    return open_latents(out)


def test_each_variant_is_its_own_crop_or_mirror(cache: LatentCache, manifest: Manifest, vae: AutoencoderKL) -> None:
    """By hand from the file: the picture mirrored first, then cut where its conditioning says."""
    assert len(cache) == 4 * (COUNT - 1) and cache.index.variants == 4
    paths = {sample_id: manifest.picture(row) for row, sample_id in enumerate(manifest.table["id"].to_pylist())}
    corners = set()
    for row in range(len(cache)):
        at, mirrored = np.array([row]), row % 2 == 1
        (height, width), (top, left) = cache.index.original[row].tolist(), cache.index.crop[row].tolist()
        target = cache.buckets[cache.index.bucket[row]].tolist()
        scale = max(target[0] / height, target[1] / width)
        size = (round(width * scale), round(height * scale))
        image = Image.open(paths[cache.index.ids(at)[0]]).resize(size, Image.Resampling.LANCZOS)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.crop((left, top, left + target[1], top + target[0]))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255 * 2 - 1
        with torch.no_grad():
            by_hand = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(cache.read(at), by_hand, rtol=2e-3, atol=3e-3 / 0.13025)  # as in test_prepare
        corners.add((row // 4, row % 4 // 2, top, left))
    assert len(corners) > 2 * COUNT, "crops must differ, or they were not tested"


def test_the_first_variant_is_that_of_a_cache_without(
    cache: LatentCache, manifest: Manifest, vae: AutoencoderKL, tmp_path: Path
) -> None:
    finish(manifest, vae, tmp_path / "out")
    plain = open_latents(tmp_path / "out")
    rows = cache.index.pictures()
    assert cache.index.ids(rows) == plain.index.ids(np.arange(len(plain)))
    assert np.array_equal(cache.index.crop[rows], plain.index.crop)


def loader_of(cache: LatentCache, **settings: int) -> BatchLoader:
    return build_loader(cache, seed=3, micro_batch_size=1, prefetch=0, **settings)


def test_an_epoch_shows_each_picture_once_and_four_epochs_all_its_variants(cache: LatentCache) -> None:
    loader, pictures = loader_of(cache), COUNT - 1
    seen: dict[str, set[bytes]] = {}
    for epoch in range(4):
        batches = [loader.step(epoch * pictures + step)[0] for step in range(pictures)]
        assert sorted(batch.sample_ids[0] for batch in batches) == sorted(cache.index.ids(cache.index.pictures()))
        for batch in batches:
            seen.setdefault(batch.sample_ids[0], set()).add(batch.latents.numpy().tobytes())
    assert {len(each) for each in seen.values()} <= {2, 4} and max(map(len, seen.values())) == 4


def test_the_conditioning_is_that_of_the_variant(cache: LatentCache) -> None:
    loader = loader_of(cache)
    for step in range(2 * COUNT):
        (batch,) = loader.step(step)
        told = batch.time_ids[0, 2:4].tolist()
        rows = [row for row in range(len(cache)) if cache.index.ids(np.array([row])) == batch.sample_ids]
        (same,) = {
            tuple(cache.index.crop[row].tolist())
            for row in rows
            if torch.equal(cache.normalise(cache.read(np.array([row]))), batch.latents)
        }
        assert tuple(told) == same


def test_a_resumed_run_takes_the_same_variants(cache: LatentCache) -> None:
    straight, resumed = loader_of(cache), loader_of(cache)
    for _ in range(30):
        straight.step(_)
    for step in (30, 31, 95):
        one, other = straight.step(step)[0], resumed.step(step)[0]
        assert torch.equal(one.latents, other.latents) and torch.equal(one.time_ids, other.time_ids)


def test_no_variant_of_a_held_out_picture_is_trained_on(cache: LatentCache) -> None:
    loader = loader_of(cache, validation_count=4)
    held_out = {batch.sample_ids[0] for batch in loader.validation_batches(1)}
    assert len(held_out) == 4
    trained = {loader.step(step)[0].sample_ids[0] for step in range(40)}
    assert len(trained) == COUNT - 1 - 4 and not trained & held_out


def test_an_update_keeps_all_variants(
    cache: LatentCache, manifest: Manifest, vae: AutoencoderKL, tmp_path: Path
) -> None:
    finish(replace(manifest, table=manifest.table.slice(4)), vae, tmp_path / "out", VARIANTS)
    finish(manifest, vae, tmp_path / "out", VARIANTS)
    updated = open_latents(tmp_path / "out")
    places = {sample_id: row for row, sample_id in enumerate(cache.index.ids(cache.index.pictures()))}
    for picture, sample_id in enumerate(updated.index.ids(updated.index.pictures())):
        for variant in range(4):
            mine, fresh = (np.array([4 * at + variant]) for at in (picture, places[sample_id]))
            assert torch.equal(updated.read(mine), cache.read(fresh))
            assert np.array_equal(updated.index.crop[mine], cache.index.crop[fresh])


def test_other_variants_are_other_latents(cache: LatentCache, manifest: Manifest, vae: AutoencoderKL) -> None:
    before = tree_digest(cache.root)
    with pytest.raises(ShardError, match="another crops, another flip"):
        finish(manifest, vae, cache.root)
    assert tree_digest(cache.root) == before


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="all centre crops are the same"):
        replace(CONFIG, crops=2, buckets=BucketConfig(crop="center"))
    with pytest.raises(ConfigError, match="give 1 to 64"):
        replace(CONFIG, crops=0)
