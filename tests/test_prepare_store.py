"""Preparation into a real S3 server: the same latents as in a folder, gone on with from any machine, one at a time."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from preparing import CONFIG, draw_picture, drawn_set, finish, manifest_of, small_vae, tree_digest

from sumizome.cli import prepare as cli
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.manifest import Manifest
from sumizome.data.shard_cache import CacheConfig
from sumizome.data.store import LocalStore, Store, open_store
from sumizome.errors import ConfigError, ShardError
from sumizome.prepare import PrepareProgress, prepare_latents
from sumizome.prepare_store import CLAIM, prepared_to_store


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae()


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """Twenty pictures; the same without one and with another."""
    root = tmp_path_factory.mktemp("sets")
    folder, old = drawn_set(root, "old.parquet")
    new = Path(shutil.copytree(folder, root / "changed"))
    for path in new.glob("p04.*"):
        path.unlink()
    draw_picture(new, 20)
    return old, manifest_of(new, root / "new.parquet")


@pytest.fixture
def store(s3_bucket: str) -> Store:
    return open_store(f"{s3_bucket}/some/latents")


def steps(manifest: Manifest, vae: AutoencoderKL, staging: Path, store: Store) -> Iterator[PrepareProgress]:
    return prepared_to_store(prepare_latents(manifest, vae, staging, CONFIG), staging, store)


def held(folder: Path) -> dict[str, str]:
    """What a folder holds that is no one machine's."""
    return {name: digest for name, digest in tree_digest(folder).items() if not name.startswith(".")}


def opened(store: Store, folder: Path) -> LatentCache:
    return open_latents(store.address, "full", CacheConfig(folder / "cache", 10**9))


def fetched(store: Store, folder: Path) -> dict[str, str]:
    for name in store.list():
        store.fetch(name, folder / name)
    return held(folder)


def test_it_holds_what_a_folder_would_whichever_machine_goes_on(
    manifests: tuple[Manifest, Manifest], vae: AutoencoderKL, store: Store, tmp_path: Path
) -> None:
    old, new = manifests
    finish(old, vae, tmp_path / "folder")
    with contextlib.closing(steps(old, vae, tmp_path / "one", store)) as begun:
        while not any(name.endswith("unit-00000.json") for name in store.list()):
            next(begun)
        assert store.exists(CLAIM)
    assert not store.exists(CLAIM) and not store.exists("latents.json")
    *_, last = steps(old, vae, tmp_path / "two", store)  # a machine that has nothing yet
    assert last.found >= 8 and last.written + last.rejected == len(old)
    assert fetched(store, tmp_path / "there") == held(tmp_path / "folder")
    here, there = open_latents(tmp_path / "folder"), opened(store, tmp_path)
    for row in range(len(here)):
        assert torch.equal(here.read(np.array([row])), there.read(np.array([row])))

    finish(new, vae, tmp_path / "folder")
    for step in steps(new, vae, tmp_path / "one", store):  # which has a part of the first one's units
        if step.written < step.total - 1:
            assert len(opened(store, tmp_path)) == len(here), "as it was"
    assert fetched(store, tmp_path / "updated") == held(tmp_path / "folder")
    assert len(opened(store, tmp_path)) == len(new) - 1


def test_another_machine_is_refused_while_one_is_at_work(
    manifests: tuple[Manifest, Manifest],
    vae: AutoencoderKL,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.closing(steps(manifests[0], vae, tmp_path / "one", store)) as begun:
        next(begun)
        with pytest.raises(ShardError, match=r"process \d+ on .* prepares into s3://"):
            next(steps(manifests[0], vae, tmp_path / "one", store))
        monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"nodename": "another"})())
        with pytest.raises(
            ShardError, match=rf"is preparing there; wait for it, or, if it is dead, remove s3://.*{CLAIM}"
        ):
            next(steps(manifests[0], vae, tmp_path / "two", store))
        assert store.exists(CLAIM), "it is still the first one's"


def test_a_prefix_of_other_things_is_refused(
    manifests: tuple[Manifest, Manifest], vae: AutoencoderKL, store: Store, tmp_path: Path
) -> None:
    store.write_bytes("thesis.tex", b"years of work")
    with pytest.raises(ConfigError, match=r"other things \(thesis\.tex\); give a new or empty prefix"):
        next(steps(manifests[0], vae, tmp_path / "one", store))
    assert list(store.list()) == ["thesis.tex"]


def test_finished_latents_of_a_folder_are_not_taken_for_a_copy(
    manifests: tuple[Manifest, Manifest], vae: AutoencoderKL, store: Store, tmp_path: Path
) -> None:
    old, new = manifests
    finish(new, vae, tmp_path / "mine")
    mine = held(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"mine holds latents of its own.*give another --staging"):
        next(steps(old, vae, tmp_path / "mine", store))
    assert held(tmp_path / "mine") == mine and not store.list()


def test_what_cannot_be_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told = cli.Command(Path("m.parquet"), Path("model"), Path("s3://bucket/latents"))
    assert cli.as_shell(told) == "sumizome prepare m.parquet --model model --out s3://bucket/latents"
    with pytest.raises(ConfigError, match=r"written by one machine.*rclone copy"):
        cli._store(replace(told, executor="ray"))
    with pytest.raises(ConfigError, match="--staging is for an --out in a store"):
        cli._store(replace(told, out=Path("folder"), staging=Path("x")))
    with pytest.raises(ConfigError, match="gs:// is no store"):
        cli._store(replace(told, out=Path("gs://bucket/x")))


def test_a_staging_folder_that_is_anothers_stays_as_it_is(
    manifests: tuple[Manifest, Manifest], vae: AutoencoderKL, tmp_path: Path
) -> None:
    old, _ = manifests
    store = LocalStore(tmp_path / "store")
    pictures = old.sources[0]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "rejects.csv").write_text("of another program")
    (tmp_path / "file").write_text("")
    for folder, told in (
        (pictures / "staging", "lies inside the picture folder"),
        (mine, r"--staging .*mine holds other things \(rejects\.csv\)"),
        (tmp_path / "file", "cannot be written: Not a directory"),
        (tmp_path / "file" / "below", "cannot be written: Not a directory"),
    ):
        begun = prepare_latents(old, vae, folder, CONFIG)
        with pytest.raises(ConfigError, match=told):
            next(prepared_to_store(begun, folder, store, old.sources))
    assert [path.name for path in mine.iterdir()] == ["rejects.csv"]
    assert not (pictures / "staging").exists()
    assert store.list() == {}
