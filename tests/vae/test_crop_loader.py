"""The micro-batches of decoder training: a function of the step, on any ranks; their weights, and cached latents."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sumizome.data.buckets import BucketConfig
from sumizome.data.latent_index import picture_hashes
from sumizome.data.loader import split_validation
from sumizome.data.manifest import load_manifest
from sumizome.errors import ConfigError, DataError
from sumizome.models.sdxl import SDXLModel
from sumizome.models.vae import encode_pixels
from sumizome.prepare import PrepareConfig, prepare_latents
from sumizome.vae.build import open_pictures
from sumizome.vae.crop_loader import CropBatch, CropLoader, build_crop_loader, to_pixels
from sumizome.vae.crops import CropConfig
from sumizome.vae.picture_source import PictureSource
from sumizome.vae.regions import RegionConfig


def loader_of(source: PictureSource, **changes: object) -> CropLoader:
    settings: dict[str, object] = {
        "crops": CropConfig(side=32),
        "regions": RegionConfig(),
        "factor": 4,
        "seed": 3,
        "micro_batch_size": 2,
        "micro_batches_per_step": 4,
        "validation_count": 3,
    }
    return build_crop_loader(source, **{**settings, **changes})


def assert_equal_batches(a: CropBatch, b: CropBatch) -> None:
    assert a.sample_ids == b.sample_ids and a.corners == b.corners and a.epochs == b.epochs
    assert torch.equal(a.pixels, b.pixels) and torch.equal(a.region, b.region) and torch.equal(a.seeds, b.seeds)


def test_a_step_is_the_same_again_ahead_and_on_two_ranks(manifest: Path) -> None:
    alone = loader_of(open_pictures(manifest))
    again = loader_of(open_pictures(manifest), workers=2)
    halves = [loader_of(open_pictures(manifest), rank=rank, world=2) for rank in (0, 1)]
    with again.from_step(5) as ahead:
        for step in (5, 6):
            made = next(ahead)
            for a, b in zip(alone.step(step), made, strict=True):
                assert_equal_batches(a, b)
            for a, b in zip(alone.step(step), [*halves[0].step(step), *halves[1].step(step)], strict=True):
                assert_equal_batches(a, b)


def test_every_picture_is_shown_once_an_epoch_and_the_held_out_never(manifest: Path) -> None:
    loader = loader_of(open_pictures(manifest), crops=CropConfig(side=32, balance=0.0), micro_batches_per_step=1)
    pictures = load_manifest(manifest)
    ids = pictures.table["id"].to_pylist()
    _, held_out = split_validation(picture_hashes(ids), 3)
    assert loader.validation_rows.tolist() == held_out.tolist()
    # 57 pictures, 2 at a time: 57 steps are two epochs.
    shown = [row for step in range(57) for row in loader.plan.step(step)[0].rows.tolist()]
    trained = sorted(set(range(60)) - set(held_out.tolist()))
    assert sorted(shown) == sorted(2 * trained)


def test_a_crop_is_what_the_picture_has_there(manifest: Path) -> None:
    loader = loader_of(open_pictures(manifest))
    pictures = load_manifest(manifest)
    paths = {str(pictures.table["id"][row]): pictures.picture(row) for row in range(len(pictures))}
    for batch in loader.step(0):
        for sample, (top, left), pixels in zip(batch.sample_ids, batch.corners, batch.pixels, strict=True):
            whole = np.array(Image.open(paths[sample]).convert("RGB"))
            assert torch.equal(pixels, to_pixels(whole[top : top + 32, left : left + 32]))


def test_weights_come_from_tags_and_masks(manifest: Path, tmp_path: Path) -> None:
    pictures = load_manifest(manifest)
    masked = str(pictures.table["path"][7])
    mask = np.zeros((int(pictures.table["height"][7].as_py()), int(pictures.table["width"][7].as_py())), np.uint8)
    mask[:, ::2] = 255
    Image.fromarray(mask).save((tmp_path / masked).with_suffix(".png"))
    source = open_pictures(manifest, tmp_path)
    loader = loader_of(source, regions=RegionConfig(mask_weight=5.0, tags={"close-up": 2.0}), validation_count=0)
    weights, regions = {}, {}
    for step in range(12):
        for batch in loader.step(step):
            weights |= dict(zip(batch.sample_ids, batch.weight.tolist(), strict=True))
            regions |= dict(zip(batch.sample_ids, batch.region, strict=True))
    tags = dict(zip(pictures.table["id"].to_pylist(), pictures.table["tags"].to_pylist(), strict=True))
    assert all(weight == (2.0 if "close-up" in tags[sample] else 1.0) for sample, weight in weights.items())
    target = str(pictures.table["id"][7])
    assert target in regions
    assert all(torch.equal(region, torch.ones(1, 32, 32)) for sample, region in regions.items() if sample != target)
    assert regions[target].unique().tolist() == [1, 5]
    assert torch.equal(regions[target][0, :, ::2], torch.full((32, 16), 5.0))


def test_masks_of_which_none_is_a_pictures_are_refused(manifest: Path, tmp_path: Path) -> None:
    """A folder too high or too deep: the whole run was trained without a single mask, and said that it had them."""
    deeper = tmp_path / "masks" / "pictures"
    deeper.mkdir(parents=True)
    Image.new("L", (48, 48), 255).save(deeper / "000.png")
    with pytest.raises(ConfigError, match=r"no mask for any picture; that of 0\d\d\.png would be .*/masks/0\d\d\.png"):
        open_pictures(manifest, tmp_path / "masks")
    assert open_pictures(manifest, deeper).masks is not None


@pytest.mark.parametrize("side", [40, 50, 64])
def test_windows_for_validation_are_whole_latents_whatever_side_is_asked_for(manifest: Path, side: int) -> None:
    """validation.side = 500 ended a run in a traceback, by the VAE's factor, before its first step."""
    shapes = [batch.pixels.shape for batch in loader_of(open_pictures(manifest)).validation_crops(side, 3)]
    assert len(shapes) == 3 and all(length % 16 == 0 for shape in shapes for length in shape[2:])
    assert not list(loader_of(open_pictures(manifest)).validation_crops(15, 3))


def test_pictures_smaller_than_a_crop_are_counted_and_left_out(manifest: Path) -> None:
    loader = loader_of(open_pictures(manifest), crops=CropConfig(side=48))
    assert loader.too_small + int((loader.plan.step(0)[0].rows >= 0).sum()) > 0
    sizes = open_pictures(manifest).sizes
    held_out = np.isin(np.arange(len(sizes)), loader.validation_rows)
    assert loader.too_small == int(((sizes < 48).any(axis=1) & ~held_out).sum()) > 0
    with pytest.raises(ConfigError, match=r"set crops\.side to 48 or less"):
        loader_of(open_pictures(manifest), crops=CropConfig(side=64))


def test_a_picture_that_changed_since_it_was_ingested_is_named(manifest: Path, tmp_path: Path) -> None:
    original = load_manifest(manifest)
    for path in original.sources[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = replace(original, sources=(tmp_path,))
    source = PictureSource(moved)
    path = moved.picture(4)
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    with pytest.raises(DataError, match=rf"{path.name}.*as it was ingested"):
        source.read(4)


@pytest.fixture(scope="module")
def latents(manifest: Path, tiny: SDXLModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cached") / "latents"
    for _ in prepare_latents(load_manifest(manifest), tiny.vae, out, PrepareConfig(BucketConfig(area=48, step=16))):
        pass
    return out


@pytest.mark.parametrize("side", [0, 32])
def test_cached_latents_are_those_of_the_pixels_beside_them(
    manifest: Path, latents: Path, tiny: SDXLModel, side: int
) -> None:
    source = open_pictures(manifest, None, latents, tiny.vae)
    loader = loader_of(source, crops=CropConfig(side=side))
    for batch in loader.step(0):
        assert batch.latents.shape[-2:] == (batch.pixels.shape[2] // 4, batch.pixels.shape[3] // 4)
        found = encode_pixels(tiny.vae, batch.pixels)
        if side == 0:
            torch.testing.assert_close(batch.latents, found, atol=2e-2, rtol=2e-3)
        else:  # a window of the whole canvas's latents: the encoder saw more than the crop
            inner = (..., slice(2, -2), slice(2, -2))
            assert torch.nn.functional.mse_loss(batch.latents[inner], found[inner]) < 0.05 * found.var()


def test_whole_canvases_need_latents_and_latents_need_their_manifest(
    manifest: Path, latents: Path, tiny: SDXLModel
) -> None:
    with pytest.raises(ConfigError, match="needs --latents"):
        loader_of(open_pictures(manifest), crops=CropConfig(side=0))
    whole = load_manifest(manifest)
    part = replace(whole, table=whole.table.slice(0, 50))
    cached = open_pictures(manifest, None, latents, tiny.vae)
    with pytest.raises(DataError, match="10 of its pictures are not in the manifest"):
        _ = PictureSource(part, None, cached.cache).rows
