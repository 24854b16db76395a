"""Preparation end to end on real files: right latents, every picture counted, killed anywhere and gone on with."""

import csv
import shutil
import signal
import tarfile
import time
import typing
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from preparing import (
    CONFIG,
    COUNT,
    draw_pictures,
    exit_code,
    finish,
    killed_at_replace,
    manifest_of,
    seconds_undisturbed,
    small_vae,
    start_preparer,
    tree_digest,
)

from sumizome import prepare_encoder
from sumizome.cli.prepare import Command, as_shell, run
from sumizome.data.buckets import BucketConfig
from sumizome.data.byte_range import ByteRange
from sumizome.data.captions import CaptionConfig
from sumizome.data.ingest import ingest_to
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.loader import build_loader
from sumizome.data.manifest import Manifest, load_manifest, write_manifest
from sumizome.data.source_config import SourceConfig, SourceKind
from sumizome.errors import ConfigError, DataError, ShardError
from sumizome.models.vae import latent_statistics, normalise, vae_digest
from sumizome.prepare import PrepareConfig, prepare_latents


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of six sizes; picture 13 is a strip that no bucket is near to."""
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def manifest(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return manifest_of(pictures, tmp_path_factory.mktemp("manifest") / "m.parquet")


@pytest.fixture(scope="module")
def prepared(manifest: Manifest, vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "undisturbed"
    finish(manifest, vae, out)
    return out


def rejects_of(out: Path) -> list[dict[str, str]]:
    with (out / "rejects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ── The latents ──


def test_each_latent_is_the_crop_that_its_conditioning_names(
    prepared: Path, manifest: Manifest, vae: AutoencoderKL
) -> None:
    """Made again by hand from the file and the six numbers that the U-Net is told, sample by sample."""
    cache = open_latents(prepared)
    paths = {sample_id: manifest.picture(row) for row, sample_id in enumerate(manifest.table["id"].to_pylist())}
    loader = build_loader(cache, seed=0, micro_batch_size=1, prefetch=0)
    crops = set()
    for step in range(len(cache)):
        (batch,) = loader.step(step)
        height, width, top, left, target_height, target_width = (int(value) for value in batch.time_ids[0])
        image = Image.open(paths[batch.sample_ids[0]])
        assert image.size == (width, height)
        scale = max(target_height / height, target_width / width)
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + target_width, top + target_height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255 * 2 - 1
        with torch.no_grad():
            by_hand = vae.encode(pixels).latent_dist.mean * 0.13025
        # A level of 8 bits between the two Lanczos is 0.0013 here; float16 keeps 11 bits.
        torch.testing.assert_close(batch.latents, by_hand, rtol=2e-3, atol=3e-3)
        crops.add((top, left))
    assert len(crops) > 3, "the crops must differ, or their conditioning was not tested"


def test_a_neighbouring_crop_would_be_noticed(prepared: Path, manifest: Manifest, vae: AutoencoderKL) -> None:
    """The test above is sharp: one pixel further is another latent."""
    cache = open_latents(prepared)
    row = int(np.flatnonzero(cache.index.crop[:, 1] > 0)[0])
    path = manifest.picture(manifest.table["id"].to_pylist().index(cache.index.ids(np.array([row]))[0]))
    (height, width), (top, left) = cache.index.original[row].tolist(), cache.index.crop[row].tolist()
    target = cache.buckets[cache.index.bucket[row]].tolist()
    scale = max(target[0] / height, target[1] / width)
    image = Image.open(path).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    shifted = image.crop((left - 1, top, left - 1 + target[1], top + target[0]))
    pixels = torch.from_numpy(np.array(shifted)).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    with torch.no_grad():
        wrong = vae.encode(pixels).latent_dist.mean
    right = cache.read(np.array([row]))
    assert not torch.allclose(right, wrong, rtol=2e-3, atol=3e-3 / 0.13025)


def test_normalisation_is_the_models(prepared: Path, vae: AutoencoderKL) -> None:
    cache = open_latents(prepared)
    raw = cache.read(np.array([0]))
    assert torch.equal(cache.normalise(raw), normalise(raw, latent_statistics(vae)))


def test_the_fingerprint_names_the_vae(prepared: Path, vae: AutoencoderKL) -> None:
    cache = open_latents(prepared)
    cache.require(vae_digest=vae_digest(vae))
    with pytest.raises(ShardError, match="another VAE"):
        cache.require(vae_digest=vae_digest(small_vae(seed=1)))


def test_tags_and_repeats_come_along(prepared: Path, manifest: Manifest) -> None:
    cache = open_latents(prepared)
    expected = {row["id"]: (row["tags"], row["kept_tags"], row["repeats"]) for row in manifest.table.to_pylist()}
    rows = np.arange(len(cache))
    index = cache.index
    for sample_id, tags, kept, repeats in zip(
        index.ids(rows), index.tag_lists(rows), index.kept_tags.tolist(), index.repeats.tolist(), strict=True
    ):
        assert (tags, kept, repeats) == expected[sample_id]


def test_categories_come_along_to_captions_and_weights(manifest: Manifest, vae: AutoencoderKL, tmp_path: Path) -> None:
    told = replace(manifest, categories={"tag 3": "character"})
    finish(told, vae, tmp_path / "out")
    cache = open_latents(tmp_path / "out")
    captions = CaptionConfig(order=("character",), caption_dropout=0.0, shuffle=False)
    given = build_loader(cache, seed=0, micro_batch_size=1, captions=captions, prefetch=0)
    texts = {text for step in range(len(cache)) for batch in given.step(step) for text in batch.captions}
    assert {"tag 3, 1girl", "1girl, tag 4"} <= texts


def test_how_it_is_computed_leaves_no_trace(
    prepared: Path, manifest: Manifest, vae: AutoencoderKL, tmp_path: Path
) -> None:
    finish(manifest, vae, tmp_path / "again", replace(CONFIG, decode_threads=1))
    assert tree_digest(tmp_path / "again") == tree_digest(prepared)


# ── Rejects ──


def test_a_strip_is_rejected_by_name_and_the_rest_written(prepared: Path) -> None:
    (reject,) = rejects_of(prepared)
    assert reject["path"] == "p13.png" and reject["reason"] == "aspect"
    assert "16×300 px" in reject["sentence"] and "32×128" in reject["sentence"]
    assert len(open_latents(prepared)) == COUNT - 1


def test_pictures_that_fail_now_are_rejected_by_name(
    manifest: Manifest, pictures: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (folder / "p02.png").unlink()
    (folder / "p05.png").write_bytes((folder / "p06.png").read_bytes())
    content = bytearray((folder / "p11.png").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "p11.png").write_bytes(content)
    last = finish(replace(manifest, sources=(folder,)), vae, tmp_path / "out")
    assert (last.written, last.rejected) == (COUNT - 4, 4)
    reasons = {reject["path"]: reject["reason"] for reject in rejects_of(tmp_path / "out")}
    assert reasons == {"p02.png": "missing", "p05.png": "changed", "p11.png": "changed", "p13.png": "aspect"}
    assert len(open_latents(tmp_path / "out")) == COUNT - 4


@pytest.mark.parametrize(
    ("value", "reason"), [(float("nan"), "not_finite"), (float("inf"), "not_finite"), (7e4, "overflow")]
)
def test_a_latent_that_cannot_be_stored_is_rejected_and_its_neighbours_are_not(
    manifest: Manifest,
    vae: AutoencoderKL,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepared: Path,
    value: float,
    reason: str,
) -> None:
    encode = prepare_encoder.encode_pixels
    batches = iter(range(1000))

    def spoilt(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
        latents = encode(vae, pixels)
        if next(batches) == 1:
            latents[0, 2, 1, 0] = value
        return latents

    monkeypatch.setattr(prepare_encoder, "encode_pixels", spoilt)
    last = finish(manifest, vae, tmp_path / "out")
    assert last.rejected == 2
    spoilt_ones = [reject for reject in rejects_of(tmp_path / "out") if reject["reason"] == reason]
    assert len(spoilt_ones) == 1
    assert_subset(open_latents(tmp_path / "out"), open_latents(prepared), missing=1)


def assert_subset(part: LatentCache, whole: LatentCache, missing: int) -> None:
    place = {sample_id: row for row, sample_id in enumerate(whole.index.ids(np.arange(len(whole))))}
    assert len(part) == len(whole) - missing
    for row, sample_id in enumerate(part.index.ids(np.arange(len(part)))):
        assert torch.equal(part.read(np.array([row])), whole.read(np.array([place[sample_id]])))


def test_a_missing_drive_is_no_set_of_rejects(manifest: Manifest, vae: AutoencoderKL, tmp_path: Path) -> None:
    """Pictures that are away for a moment must not be left out for ever."""
    away = replace(manifest, sources=(tmp_path / "unmounted",))
    config = replace(CONFIG, unit_size=16)
    with pytest.raises(DataError, match=r"15 of 16 pictures failed, first p00\.png: .*Is a drive missing"):
        finish(away, vae, tmp_path / "out", config)
    assert not list((tmp_path / "out").rglob("unit-*"))
    assert finish(manifest, vae, tmp_path / "out", config).written == COUNT - 1


def test_nothing_left_is_an_error_that_says_where_to_look(
    manifest: Manifest, vae: AutoencoderKL, tmp_path: Path
) -> None:
    strips = replace(CONFIG, buckets=BucketConfig(area=64, step=16, max_aspect_error=0.0))
    with pytest.raises(DataError, match=r"none of the 20 pictures .*rejects\.csv"):
        finish(manifest, vae, tmp_path / "out", strips)
    assert len(rejects_of(tmp_path / "out")) == COUNT


# ── Killed, and gone on with ──


RENAMES = 1 + 3 * 3 + 2  # the plan, three files of each of three units, the rejects, the plan as finished


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(RENAMES))
def test_killed_at_any_commit_it_goes_on_to_the_same_bytes(
    manifest: Manifest, vae: AutoencoderKL, prepared: Path, tmp_path: Path, number: int, after: bool
) -> None:
    out = tmp_path / "out"
    killed = start_preparer(manifest, vae, out, arrange=killed_at_replace(number, after=after))
    assert exit_code(killed) == -signal.SIGKILL
    finish(manifest, vae, out)
    assert tree_digest(out) == tree_digest(prepared)


def test_killed_at_any_time_again_and_again(
    manifest: Manifest, vae: AutoencoderKL, prepared: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", seconds_undisturbed(manifest, vae, tmp_path)
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(6):
        child = start_preparer(manifest, vae, out)
        time.sleep(float(rng.uniform(0, whole / 2)))
        child.kill()
        kills += exit_code(child) == -signal.SIGKILL
    finish(manifest, vae, out)
    assert kills > 0
    assert tree_digest(out) == tree_digest(prepared)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(
    manifest: Manifest, vae: AutoencoderKL, prepared: Path, tmp_path: Path
) -> None:
    """At any moment of a whole run, from the start of its process to its end; each is gone on with and compared."""
    longest = seconds_undisturbed(manifest, vae, tmp_path)
    rng, reached = np.random.default_rng(20), list[int]()
    while len(reached) < 20:
        out = tmp_path / "out"
        child = start_preparer(manifest, vae, out)
        time.sleep(float(rng.uniform(0, longest)))
        child.kill()
        if exit_code(child) == -signal.SIGKILL:
            reached.append(len(tree_digest(out)))
            finish(manifest, vae, out)
        assert tree_digest(out) == tree_digest(prepared)
        shutil.rmtree(out)
    assert len(set(reached)) > 2, (
        "files that there were when it was killed: the kills must not all fall into one moment"
    )


def test_a_finished_folder_is_left_alone(
    manifest: Manifest, vae: AutoencoderKL, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    times = {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    monkeypatch.setattr(prepare_encoder, "encode_pixels", lambda *_: pytest.fail("nothing is left to encode"))
    last = finish(manifest, vae, out)
    assert last.found == COUNT
    assert {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()} == times


@pytest.mark.parametrize("kind", ["safetensors", "parquet", "json"])
def test_a_damaged_unit_is_named_and_made_anew_alone(
    manifest: Manifest, vae: AutoencoderKL, prepared: Path, tmp_path: Path, kind: str
) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    damaged = out / "units" / f"unit-00001.{kind}"
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
    others = {path: path.stat().st_mtime_ns for path in (out / "units").iterdir() if "00001" not in path.name}
    with pytest.raises(ShardError, match=damaged.name):
        open_latents(out)
    first, *_, last = prepare_latents(manifest, vae, out, CONFIG)
    assert damaged.name in first.notes[0] and "made anew" in first.notes[0]
    assert last.found == COUNT - 8
    assert tree_digest(out) == tree_digest(prepared)
    assert {path: path.stat().st_mtime_ns for path in others} == others


# ── Places and settings that are refused ──


def test_the_picture_folder_is_never_written_to(manifest: Manifest, pictures: Path, vae: AutoencoderKL) -> None:
    before = tree_digest(pictures)
    for out in (pictures, pictures / "latents", pictures / "new" / ".." / "latents"):
        with pytest.raises(ConfigError, match="inside the picture folder"):
            finish(manifest, vae, out)
    assert tree_digest(pictures) == before


def test_a_link_into_the_picture_folder_is_seen_through(
    manifest: Manifest, pictures: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(pictures)
    with pytest.raises(ConfigError, match="inside the picture folder"):
        finish(manifest, vae, tmp_path / "link" / "latents")


def test_a_folder_of_other_things_is_refused(manifest: Manifest, vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"other things \(thesis\.tex\)"):
        finish(manifest, vae, tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        finish(manifest, vae, tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buckets": BucketConfig(area=48, step=16)}, "bucket table"),
        ({"buckets": BucketConfig(area=64, step=16, crop="center")}, "crop"),
        ({"unit_size": 9}, "unit_size"),
    ],
)
def test_other_settings_over_finished_latents_are_refused(
    manifest: Manifest, vae: AutoencoderKL, prepared: Path, change: dict[str, object], words: str
) -> None:
    before = tree_digest(prepared)
    with pytest.raises(ShardError, match=f"begun with another {words}.*another --out"):
        finish(manifest, vae, prepared, replace(CONFIG, **change))
    assert tree_digest(prepared) == before


def test_another_vae_over_finished_latents_is_refused(manifest: Manifest, prepared: Path) -> None:
    with pytest.raises(ShardError, match="another VAE"):
        finish(manifest, small_vae(seed=1), prepared)


def test_sides_that_the_vae_cannot_take_are_refused(manifest: Manifest, vae: AutoencoderKL, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        finish(manifest, vae, tmp_path / "out", PrepareConfig(BucketConfig(area=64, step=6)))


# ── The command ──


def test_the_command_has_the_buckets_own_defaults() -> None:
    defaults = {field.name: field.default for field in fields(Command)}
    assert all(defaults[field.name] == field.default for field in fields(BucketConfig))


@pytest.fixture
def command(manifest: Manifest, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    write_manifest(manifest, tmp_path / "m.parquet")
    monkeypatch.setattr("sumizome.models.sdxl.load_model", lambda *_, **__: SimpleNamespace(vae=vae))
    return Command(tmp_path / "m.parquet", Path("my model"), tmp_path / "out", area=64, step=16, device="cpu")


def test_the_command_reports_buckets_and_rejects(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    run(command)
    printed = capsys.readouterr().out
    assert "64 × 64" in printed and "cut off" in printed and "aspect error" in printed
    assert "rejected: 1" in printed
    assert "wrote 19 latents" in printed and "rejects.csv" in printed
    run(command)
    assert "20 of them had been prepared before" in capsys.readouterr().out
    made_by = open_latents(command.out).plan.command
    assert made_by == as_shell(command)
    assert made_by.startswith(f"sumizome prepare {command.manifest} --model 'my model' --out ")
    assert made_by.endswith("--area 64 --step 16 --device cpu")
    told = as_shell(replace(command, flip=True, workers=2, executor="ray", address="auto"))
    assert told == made_by.replace("--device", "--flip --device"), "who works is not what is made"


def test_sources_of_every_kind_are_prepared_from_one_manifest(vae: AutoencoderKL, tmp_path: Path) -> None:
    """Folder, dump, sidecars, kohya, imagefolder and tars: each picture's latent is that of the plain file."""
    rng = np.random.default_rng(5)

    def picture(place: Path) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place)
        return place

    plain = {kind: picture(tmp_path / "plain" / f"{kind}.png") for kind in typing.get_args(SourceKind)}
    for kind, path in plain.items():
        (tmp_path / kind).mkdir()
        if kind == "webdataset":
            with tarfile.open(tmp_path / kind / "0.tar", "w") as tar:
                tar.add(path, "d/x.png")
        else:
            shutil.copy(path, tmp_path / kind / "x.png")
    (tmp_path / "booru.jsonl").write_text('{"id": "x", "tags": "a"}')
    (tmp_path / "kohya.json").write_text('{"x": {"tags": "a"}}')
    (tmp_path / "gallery-dl" / "x.png.json").write_text('{"tags": "a"}')
    (tmp_path / "imagefolder" / "metadata.csv").write_text("file_name,text\nx.png,a\n")
    records = {"booru": tmp_path / "booru.jsonl", "kohya": tmp_path / "kohya.json"}
    sources = [SourceConfig(tmp_path / kind, kind, records.get(kind)) for kind in plain]  # type: ignore[arg-type]
    ingest_to(tmp_path / "out" / "m.parquet", sources, workers=0)
    mixed = load_manifest(tmp_path / "out" / "m.parquet")
    finish(mixed, vae, tmp_path / "mixed")
    ingest_to(tmp_path / "out" / "plain.parquet", [tmp_path / "plain"], workers=0)
    finish(load_manifest(tmp_path / "out" / "plain.parquet"), vae, tmp_path / "alone")

    def latents(folder: Path) -> dict[str, bytes]:
        cache = open_latents(folder)
        read = [cache.read(np.array([row])).numpy().tobytes() for row in range(len(plain))]
        return dict(zip(cache.index.ids(np.arange(len(plain))), read, strict=True))

    assert latents(tmp_path / "mixed") == latents(tmp_path / "alone")
    assert len(latents(tmp_path / "mixed")) == 6
    tar = tmp_path / "webdataset" / "0.tar"
    data = bytearray(tar.read_bytes())
    (place,) = (each for row in range(6) if isinstance(each := mixed.picture(row), ByteRange))
    data[place.offset + 60] ^= 1
    tar.write_bytes(data)
    progress = finish(mixed, vae, tmp_path / "again")
    assert progress.rejected == 1
    assert "changed" in (tmp_path / "again" / "rejects.csv").read_text()
