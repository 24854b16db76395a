"""Damage of each file of a latent cache, in a folder and on S3: named before a sample is used, at every opening."""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from latent_caches import PLAN, latent, write_cache
from s3_server import FaultyProxy, S3Server

from sumizome.data.latents import LatentCache, Verify, open_latents
from sumizome.data.remote_shards import RemoteShards
from sumizome.data.retries import RetryPolicy
from sumizome.data.shard_cache import CacheConfig, RemoteShard, ShardCache
from sumizome.data.shard_files import OpenShards
from sumizome.data.store import open_store
from sumizome.errors import ShardError, StoreError, SumizomeError

ROOMY = 10**9
UNIT = "units/unit-00001"
FILES = ("latents.json", f"{UNIT}.json", f"{UNIT}.parquet", f"{UNIT}.safetensors")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200] ^= 0x10  # in the latents, not in their header; in text and tables anywhere
    path.write_bytes(data)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _swap(path: Path) -> None:
    """The same kind of file of another unit; of the plan, which is one, another text."""
    other = path.with_name(path.name.replace("00001", "00002"))
    data = other.read_bytes() if other != path else path.read_bytes().replace(b"unit_size", b"unit_sise")
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncate": _truncate,
    "flip": _flip,
    "zero": _zero,
    "delete": Path.unlink,
    "swap": _swap,
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("latents") / "cache")


@pytest.fixture
def remote(pristine: Path, s3_bucket: str) -> str:
    """The address of a copy on S3."""
    store = open_store(f"{s3_bucket}/set")
    for name in open_store(pristine).list():
        store.put_file(pristine / name, name)
    return store.address


def damage_object(address: str, name: str, damage: str, folder: Path) -> None:
    """Does to an object what `DAMAGES` does to a file."""
    store = open_store(address)
    for each in store.list():
        store.fetch(each, folder / each)
    DAMAGES[damage](folder / name)
    if (folder / name).exists():
        store.put_file(folder / name, name)
    else:
        store.remove(name)


def use(root: Path | str, verify: Verify, config: CacheConfig | None = None) -> LatentCache:
    """Opens and reads everything, and holds it against what was written."""
    cache = open_latents(root, verify, config)
    for bucket in (0, 1):
        rows = np.flatnonzero(cache.index.bucket == bucket)
        read = cache.read(rows).numpy()
        for number, got in zip(cache.index.ids(rows), read, strict=True):
            np.testing.assert_array_equal(got, latent(int(number.removeprefix("id"))).astype(np.float32))
    return cache


# ── In a folder ──


@pytest.mark.parametrize("verify", ["auto", "full", "size"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_a_folder_is_named_at_every_opening(
    pristine: Path, tmp_path: Path, name: str, damage: str, verify: Verify
) -> None:
    root = Path(shutil.copytree(pristine, tmp_path / "cache"))
    use(root, verify)  # an opening that found nothing must not vouch for the next
    times = (root / name).stat()
    DAMAGES[damage](root / name)
    if (root / name).exists():
        os.utime(root / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(ShardError, match=re.escape(name)) as found:
            use(root, verify)
        assert "sumizome prepare" in str(found.value)


@pytest.mark.parametrize("damage", ["truncate", "flip", "zero"])
def test_damage_while_it_is_open_is_named(pristine: Path, tmp_path: Path, damage: str) -> None:
    """A file that shrinks under a memory map would end the process."""
    root = Path(shutil.copytree(pristine, tmp_path / "cache"))
    cache = use(root, "full")
    DAMAGES[damage](root / f"{UNIT}.safetensors")
    with pytest.raises(ShardError, match=r"unit-00001\.safetensors"):
        for row in range(len(cache)):
            cache.read(np.array([row]))


# ── On S3 ──


@pytest.mark.parametrize(
    ("verify", "limit"),
    [
        ("auto", ROOMY),
        pytest.param("full", ROOMY, marks=pytest.mark.slow),
        pytest.param("full", 0, marks=pytest.mark.slow),
        ("size", ROOMY),
    ],
)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_on_s3_is_named_at_every_opening(
    remote: str, tmp_path: Path, name: str, damage: str, verify: Verify, limit: int
) -> None:
    here = CacheConfig(tmp_path / "here", limit)
    damage_object(remote, name, damage, tmp_path / "damaged")
    for _ in range(2):
        with pytest.raises(SumizomeError, match=re.escape(name)) as found:
            use(remote, verify, here)
        assert isinstance(found.value, ShardError | StoreError)
        assert remote in str(found.value), "the remote is to be mended, not the copy"


@pytest.mark.parametrize("verify", ["auto", "full", "size"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cached_copy_is_thrown_away_and_fetched_again(
    remote: str, tmp_path: Path, damage: str, verify: Verify
) -> None:
    here = CacheConfig(tmp_path / "here", ROOMY)
    use(remote, "full", here)
    copies = sorted((here.folder / "shards").glob("*.safetensors"))
    assert len(copies) == PLAN.units
    whole = {path: path.read_bytes() for path in copies}
    for path, other in zip(copies, [*copies[1:], copies[0]], strict=True):
        if damage == "swap":
            path.write_bytes(whole[other])
        else:
            DAMAGES[damage](path)
    source = use(remote, verify, here).shards
    assert isinstance(source, RemoteShards)
    source.stop()
    if damage not in ("delete", "truncate"):  # those are not there, which is no fault
        # Of two threads that meet the same copy each may say so.
        named = {path.name for path in copies if any(path.name in fault for fault in source.faults)}
        assert len(named) == PLAN.units
        assert all(str(here.folder) in fault for fault in source.faults)
    use(remote, "full", here)
    assert {path: path.read_bytes() for path in copies} == whole


def test_what_went_wrong_is_told_once(remote: str, tmp_path: Path) -> None:
    here = CacheConfig(tmp_path / "here", ROOMY)
    use(remote, "full", here)
    _flip(next((here.folder / "shards").glob("*.safetensors")))
    source = use(remote, "full", here).shards
    assert [str(here.folder) in fault for fault in source.take_faults()] == [True]
    assert source.take_faults() == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_of_an_index_is_fetched_again(remote: str, tmp_path: Path, damage: str) -> None:
    here = CacheConfig(tmp_path / "here", ROOMY)
    use(remote, "full", here)
    for name in FILES[:3]:
        (copy,) = (here.folder / "indexes").glob(f"*/{name}")
        DAMAGES[damage](copy)
        use(remote, "full", here)


# ── The cache ──


@pytest.mark.parametrize("limit", [0, 2500, ROOMY])
def test_a_cache_of_any_size_gives_the_same_samples(remote: str, tmp_path: Path, limit: int) -> None:
    """Nothing, one shard and some, all of them: the rest is read record by record."""
    here = CacheConfig(tmp_path / "here", limit)
    cache = use(remote, "size", here)
    cache.prefetch(np.arange(len(cache)))
    use(remote, "size", here)
    for thread in threading.enumerate():
        if thread.name == "shard cache":
            thread.join(30)
    kept = list((here.folder / "shards").glob("*")) if limit else []
    assert len(kept) == {0: 0, 2500: 1, ROOMY: PLAN.units}[limit], "no shard of the set evicts another"
    assert sum(path.stat().st_size for path in kept) <= limit
    use(remote, "size", here)


def _shard(store_root: Path, number: int, size: int = 1000) -> RemoteShard:
    import hashlib

    data = np.random.default_rng(number).bytes(size)
    (store_root / f"{number}").write_bytes(data)
    return RemoteShard(f"{number}", hashlib.sha256(data).hexdigest(), size)


def test_eviction_takes_the_least_recently_used_but_nothing_that_is_open_or_kept(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store, cache = open_store(tmp_path / "store"), ShardCache(CacheConfig(tmp_path / "here", 3000))
    shards = [_shard(tmp_path / "store", number) for number in range(7)]
    for age, shard in enumerate(shards[:3]):
        assert cache.fetch(store, shard)
        os.utime(cache.path(shard), (age, age))
    with cache.path(shards[0]).open("rb") as held:
        cache.mark_used(held.fileno())
        os.utime(held.fileno(), (0, 0))  # the oldest, and in use
        assert cache.fetch(store, shards[3])
        assert [cache.holds(shard) for shard in shards[:4]] == [True, False, True, True]
        keep = {shards[2].sha256, shards[3].sha256}
        assert not cache.fetch(store, shards[4], keep=keep), "no room: two are kept, one is open"
        assert held.read() == (tmp_path / "store" / "0").read_bytes()
    assert cache.fetch(store, shards[4], keep=keep)
    assert not cache.holds(shards[0])
    assert not cache.fetch(store, _shard(tmp_path / "store", 9, size=3001)), "larger than the cache"
    assert sum(path.stat().st_size for path in (tmp_path / "here" / "shards").iterdir()) <= 3000


def test_each_shard_is_fetched_once_however_many_ask(
    remote: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = open_store(remote).size(f"{UNIT}.safetensors")
    record = open_latents(remote, "full", CacheConfig(tmp_path / "first", ROOMY)).shards
    assert isinstance(record, RemoteShards)
    shard = record._shards[1]
    proxy = FaultyProxy(s3_server, share=0.0, delay=0.1)
    with proxy.running() as url, ThreadPoolExecutor(8) as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        caches = [ShardCache(CacheConfig(tmp_path / "here", ROOMY)) for _ in range(8)]
        assert all(pool.map(lambda cache: cache.fetch(open_store(remote), shard), caches))
    assert proxy.requests == {"GET": 1}
    assert caches[0].path(shard).stat().st_size == size


def test_a_full_disk_ends_the_fetching_and_not_the_reading(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk does it: no room can be reserved, though the limit allows for it."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    here = CacheConfig(tmp_path / "here", ROOMY)
    source = use(remote, "full", here).shards
    assert source.take_faults() == []
    assert list((here.folder / "shards").iterdir()) == [], "no half shard is left"


def test_a_disk_that_fills_while_a_shard_comes_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    store, cache = open_store(tmp_path / "store"), ShardCache(CacheConfig(tmp_path / "here", ROOMY))
    shard = _shard(tmp_path / "store", 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert not cache.fetch(store, shard)
    assert list((tmp_path / "here" / "shards").iterdir()) == []
    assert cache.fetch(store, shard) and cache.verify(shard), "with room again it comes"


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "here" / "shards"
    folder.mkdir(parents=True)
    (folder / f".{'a' * 64}.part").write_bytes(bytes(900))
    ShardCache(CacheConfig(tmp_path / "here", 1000))
    assert list(folder.iterdir()) == []


def test_a_fifth_of_all_requests_failing_changes_no_sample(
    remote: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = RetryPolicy(attempts=12, first_s=0.01, longest_s=0.05, read_timeout_s=0.7)
    monkeypatch.setattr("sumizome.data.latents.open_store", lambda address: open_store(address, quick))
    proxy = FaultyProxy(s3_server, share=0.2, seed=3)
    with proxy.running() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        use(remote, "full", CacheConfig(tmp_path / "whole", ROOMY))
        use(remote, "size", CacheConfig(tmp_path / "ranges", 0))
    assert sum(proxy.faulted[kind] for kind in proxy.faulted if kind) >= 10


# ── Many readers ──


def test_many_threads_read_the_same_bits_with_few_descriptors(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_latents(pristine)
    monkeypatch.setattr(cache.shards, "_opened", OpenShards(cache.shards._opened._open_one, limit=1))  # type: ignore[attr-defined]
    rows = np.flatnonzero(cache.index.bucket == 0)
    expected = cache.read(rows)
    before = len(list(Path("/proc/self/fd").iterdir()))

    def shuffled(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(len(rows))
        return bool((cache.read(rows[order]) == expected[order]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(shuffled, range(64)))
    assert len(cache.shards._opened) == 1  # type: ignore[attr-defined]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_a_forked_process_reads_the_same_bits(pristine: Path) -> None:
    import multiprocessing

    cache = open_latents(pristine)
    rows = np.flatnonzero(cache.index.bucket == 1)
    expected = cache.read(rows).numpy().tobytes()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = [pool.apply_async(_bytes_of, (cache.root, rows)) for _ in range(4)]
        assert all(result.get(60) == expected for result in results)


def _bytes_of(root: Path, rows: np.ndarray) -> bytes:
    return open_latents(root).read(rows).numpy().tobytes()
