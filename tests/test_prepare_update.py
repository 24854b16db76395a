"""A changed manifest in a prepared folder: what stays is kept, what is new encoded; a kill leaves one or the other."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL
from preparing import (
    CONFIG,
    COUNT,
    draw_picture,
    drawn_set,
    exit_code,
    finish,
    killed_at_replace,
    killed_at_unlink,
    manifest_of,
    small_vae,
    start_preparer,
    tree_digest,
)

from sumizome import prepare_encoder
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.manifest import Manifest
from sumizome.errors import ShardError
from sumizome.prepare import prepare_latents
from sumizome.report.cache import describe_cache


@dataclass(frozen=True)
class Versions:
    vae: AutoencoderKL
    old: Manifest
    new: Manifest
    """Three pictures more, two less, four with another caption."""
    before: Path
    """The old one prepared."""
    fresh: Path
    """The new one prepared from nothing."""
    updated: Path
    """The old one prepared, and then the new one."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    root = tmp_path_factory.mktemp("versions")
    folder, old = drawn_set(root, "old.parquet")
    vae = small_vae()
    finish(old, vae, root / "before")
    changed = Path(shutil.copytree(folder, root / "changed"))
    for number in (4, 9):
        (changed / f"p{number:02d}.png").unlink()
        (changed / f"p{number:02d}.txt").unlink()
    for number in (0, 6, 7, 19):
        (changed / f"p{number:02d}.txt").write_text(f"told otherwise, tag {number}")
    for number in (20, 21, 22):
        draw_picture(changed, number)
    new = manifest_of(changed, root / "new.parquet")
    finish(new, vae, root / "fresh")
    shutil.copytree(root / "before", root / "updated")
    finish(new, vae, root / "updated")
    return Versions(vae, old, new, root / "before", root / "fresh", root / "updated")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the pictures that go through the VAE."""
    counts: list[int] = []
    encode = prepare_encoder.encode_pixels

    def counted(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
        counts.append(int((pixels > -1).flatten(1).any(dim=1).sum()))  # batches are filled up with black
        return encode(vae, pixels)

    monkeypatch.setattr(prepare_encoder, "encode_pixels", counted)
    return counts


def samples(cache: LatentCache) -> dict[str, tuple[object, ...]]:
    """Everything that training reads of each sample."""
    index, found = cache.index, {}
    for row, sample_id in enumerate(index.ids(np.arange(len(cache)))):
        at = np.array([row])
        facts = (index.original[row].tolist(), index.crop[row].tolist(), cache.buckets[index.bucket[row]].tolist())
        words = (tuple(index.tag_lists(at)[0]), int(index.kept_tags[row]), int(index.repeats[row]))
        found[sample_id] = (*facts, words, cache.read(at).numpy().tobytes())
    assert len(found) == len(cache)
    return found


def test_exactly_the_new_pictures_go_through_the_vae(versions: Versions, tmp_path: Path, encoded: list[int]) -> None:
    out = Path(shutil.copytree(versions.before, tmp_path / "out"))
    first, *_, last = prepare_latents(versions.new, versions.vae, out, CONFIG)
    assert sum(encoded) == 3
    # The strip has no latent to keep: it is looked at, and rejected, again.
    assert first.found == COUNT - 3 and "17 of 21 pictures have their latents already" in first.notes[0]
    assert (last.total, last.written, last.rejected) == (21, 20, 1)
    assert "still in their units: 2 " in last.notes[0], "what the removed pictures leave behind is told"


def test_the_updated_cache_is_the_fresh_one_sample_by_sample(versions: Versions) -> None:
    updated, fresh = open_latents(versions.updated), open_latents(versions.fresh)
    assert samples(updated) == samples(fresh)
    assert updated.fingerprint == fresh.fingerprint != open_latents(versions.before).fingerprint
    assert (versions.updated / "rejects.csv").read_bytes() == (versions.fresh / "rejects.csv").read_bytes()


def test_the_report_takes_no_file_of_an_updated_cache_for_a_foreign_one(versions: Versions) -> None:
    found = describe_cache(versions.updated, versions.new.sources, versions.new.digest, None)
    assert found.stray_bytes == 0 and found.missing == 0 and not found.damages and found.channels


def test_a_caption_alone_needs_no_vae(versions: Versions, tmp_path: Path, encoded: list[int]) -> None:
    out = Path(shutil.copytree(versions.fresh, tmp_path / "out"))
    table = versions.new.table
    tags = [[*each, "late"] for each in table["tags"].to_pylist()]
    field = table.schema.field("tags")
    table = table.set_column(table.schema.get_field_index("tags"), field, pa.array(tags, field.type))
    told = replace(versions.new, table=table, categories={"late": "meta"})
    shards = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*.safetensors")}
    finish(told, versions.vae, out)
    assert encoded == []
    cache = open_latents(out)
    assert {tags[-1] for tags in cache.index.tag_lists(np.arange(len(cache)))} == {"late"}
    assert cache.plan.categories == {"late": "meta"}
    assert shards.items() <= {path: path.stat().st_mtime_ns for path in shards}.items()


def test_there_and_back_keeps_what_was_removed_meanwhile(
    versions: Versions, tmp_path: Path, encoded: list[int]
) -> None:
    """A unit's own files stay while any of its pictures does, so the two that come back are still there."""
    out = Path(shutil.copytree(versions.updated, tmp_path / "out"))
    finish(versions.old, versions.vae, out)
    assert encoded == []
    assert samples(open_latents(out)) == samples(open_latents(versions.before))
    finish(versions.new, versions.vae, out)
    assert sum(encoded) == 3, "the unit of which nothing was left had gone"
    assert samples(open_latents(out)) == samples(open_latents(versions.fresh))


def test_nothing_piles_up(versions: Versions, tmp_path: Path) -> None:
    out = Path(shutil.copytree(versions.updated, tmp_path / "out"))
    for _ in range(2):
        finish(versions.old, versions.vae, out)
        finish(versions.new, versions.vae, out)
    names = [path.name for path in (out / "units").iterdir()]
    generation = open_latents(out).plan.generation
    assert {name.split(".")[1] for name in names if ".g" in name} == {f"g{generation}"}
    assert sum(name.endswith(".safetensors") for name in names) <= 4


@pytest.mark.parametrize(
    "kill",
    [
        *(killed_at_replace(number, after=False) for number in range(13)),
        *(killed_at_unlink(number) for number in range(1, 14, 4)),
        *(pytest.param(killed_at_replace(number, after=True), marks=pytest.mark.slow) for number in range(13)),
        *(pytest.param(killed_at_unlink(number), marks=pytest.mark.slow) for number in range(14)),
    ],
)
def test_an_update_killed_anywhere_leaves_the_old_cache_or_the_new(
    versions: Versions, tmp_path: Path, kill: Callable[[], None]
) -> None:
    out = Path(shutil.copytree(versions.before, tmp_path / "out"))
    exit_code(start_preparer(versions.new, versions.vae, out, arrange=kill))
    cache = open_latents(out)
    assert len(cache) == (COUNT - 1 if cache.plan.generation == 0 else 20)
    finish(versions.new, versions.vae, out)
    assert tree_digest(out) == tree_digest(versions.updated)


@pytest.mark.parametrize(("number", "killed"), [(11, True), (12, False)])
def test_the_kills_reach_to_the_end(versions: Versions, tmp_path: Path, number: int, killed: bool) -> None:
    """The test above is sharp: rename 11 is the last of the run."""
    out = Path(shutil.copytree(versions.before, tmp_path / "out"))
    child = start_preparer(versions.new, versions.vae, out, arrange=killed_at_replace(number, after=True))
    assert (exit_code(child) == -signal.SIGKILL) == killed


@pytest.mark.parametrize("stop_after", [1, 5])
def test_pictures_added_before_the_end_keep_what_was_done(
    versions: Versions, tmp_path: Path, encoded: list[int], stop_after: int
) -> None:
    """A preparation that is broken off, and gone on with for a manifest that has changed meanwhile."""
    out = tmp_path / "out"
    steps = prepare_latents(versions.old, versions.vae, out, CONFIG)
    for _ in range(stop_after):
        next(steps)
    steps.close()
    with pytest.raises(ShardError, match=r"not finished; run `sumizome prepare` again"):
        open_latents(out)
    done = sum(encoded)
    finish(versions.new, versions.vae, out)
    assert samples(open_latents(out)) == samples(open_latents(versions.fresh))
    assert sum(encoded) <= done + 20


def test_the_old_manifest_again_while_the_new_is_half_done(versions: Versions, tmp_path: Path) -> None:
    out = Path(shutil.copytree(versions.before, tmp_path / "out"))
    steps = prepare_latents(versions.new, versions.vae, out, CONFIG)
    next(steps)
    steps.close()
    finish(versions.old, versions.vae, out)
    assert tree_digest(out) == tree_digest(versions.before)


@pytest.mark.parametrize("kind", ["safetensors", "parquet", "json"])
def test_a_damaged_unit_of_an_earlier_generation_is_encoded_anew(
    versions: Versions, tmp_path: Path, encoded: list[int], kind: str
) -> None:
    out = Path(shutil.copytree(versions.updated, tmp_path / "out"))
    damaged = out / "units" / f"unit-00000.{kind}"
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
    first, *_ = prepare_latents(versions.new, versions.vae, out, CONFIG)
    assert any("made anew" in note and damaged.name in note for note in first.notes)
    assert 0 < sum(encoded) <= 8
    assert samples(open_latents(out)) == samples(open_latents(versions.fresh))


@pytest.mark.parametrize("name", ["unit-00000.g1.parquet", "unit-00000.g1.json", "unit-00001.safetensors"])
@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
def test_a_harmed_file_of_an_updated_cache_is_named(versions: Versions, tmp_path: Path, name: str, harm: str) -> None:
    out = Path(shutil.copytree(versions.updated, tmp_path / "out"))
    path = out / "units" / name
    content = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if harm == "flip" else content[:-5])
    for _ in range(2):
        with pytest.raises(ShardError, match=name.replace(".", r"\.")):
            open_latents(out)


def test_another_manifest_is_refused_while_somebody_is_at_work(versions: Versions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = prepare_latents(versions.old, versions.vae, out, CONFIG)
    for _ in range(3):
        next(steps)
    with pytest.raises(ShardError, match=rf"process {os.getpid()} on .* is preparing here for another manifest"):
        finish(versions.new, versions.vae, out)
    *_, last = steps
    assert last.written == COUNT - 1


def test_changed_settings_make_no_update(versions: Versions, tmp_path: Path) -> None:
    for change in ({"background": (0, 0, 0)},):
        with pytest.raises(ShardError, match="another background"):
            finish(replace(versions.old, **change), versions.vae, versions.before)
