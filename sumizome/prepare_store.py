"""A preparation whose latents go to a store, such as an S3 bucket: made in a folder of this machine, put there by unit.

Owns the order in which things appear there, and the claim that keeps a second machine away. The invariant: an object of
the store is what a preparer committed here, a unit's record comes after its files and the plan after all units, so that
whoever reads the store sees the latents as they were or as they are. What is there is brought back first, so that any
machine goes on where another one stopped.

    latents.next.json, units/…, latents.json     as in a folder (`data.shards`)
    preparing.json                               who is at work: another machine is refused
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sumizome.data.latent_plan import plan_path
from sumizome.data.store import Store
from sumizome.errors import ConfigError, ShardError
from sumizome.files import hold_lock
from sumizome.prepare import PrepareProgress, check_outside

__all__ = ["CLAIM", "prepared_to_store"]

CLAIM = "preparing.json"
_OURS = re.compile(r"units/unit-[\w.-]+\.(safetensors|parquet|json)|latents(\.next)?\.json|rejects\.csv")
_LOCK = ".staging.lock"
"""Once a folder has it, what lies there is a copy of a store's, or was to become it: it may be thrown away."""
_REQUESTS = 16


def prepared_to_store(
    steps: Iterator[PrepareProgress], folder: Path, store: Store, sources: Iterable[Path] = ()
) -> Iterator[PrepareProgress]:
    """The steps of `prepare_latents` into `folder`, with what each has committed put into the store.

    `steps` must not have begun: what the store holds is brought here first. `sources` are the folders of pictures.
    Raises: ShardError if another machine is at work there; StoreError if the store cannot be reached; ConfigError if
    `folder` holds what was not made there for a store, or lies among the pictures.
    """
    _check_staging(folder, store, sources)
    lock = hold_lock(folder / _LOCK, lambda holder: ShardError(f"{holder} prepares into {store.address}"))
    with lock, _claimed(store):
        _bring_back(store, folder)
        copy = _Copy(store, folder)
        for step in steps:
            copy.put_units()
            yield step
        copy.finish()


def _check_staging(folder: Path, store: Store, sources: Iterable[Path]) -> None:
    """Makes the folder, unless what is in it is somebody's: what the store does not have is thrown away there."""
    check_outside(folder, sources, "--staging")
    try:
        if not (folder / _LOCK).exists() and folder.exists():
            if _newest_plan(folder):
                raise ConfigError(
                    f"{folder} holds latents of its own, which those of {store.address} would replace; "
                    "give another --staging"
                )
            if found := next((path.name for path in folder.iterdir()), None):
                raise ConfigError(f"--staging {folder} holds other things ({found}); give a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK).touch()
    except OSError as error:
        raise ConfigError(f"--staging {folder} cannot be written: {error.strerror}; give another") from error


@contextlib.contextmanager
def _claimed(store: Store) -> Iterator[None]:
    """Says in the store who is at work. A claim of this machine is a dead process's: a living one holds the lock."""
    mine = json.dumps({"machine": os.uname().nodename, "process": os.getpid()}).encode()
    if store.exists(CLAIM):
        _check_claim(store, os.uname().nodename)
    store.write_bytes(CLAIM, mine)
    _check_claim(store, os.uname().nodename)  # two that began at once: the last to write goes on
    try:
        yield
    finally:
        store.remove(CLAIM)


def _check_claim(store: Store, machine: str) -> None:
    try:
        holder = str(json.loads(store.read_bytes(CLAIM))["machine"])
    except (ValueError, KeyError, TypeError):
        holder = "an unknown machine"
    if holder != machine:
        raise ShardError(
            f"{store.address}: {holder} is preparing there; wait for it, or, if it is dead, remove "
            f"{store.location(CLAIM)} and run this again"
        )


# ── From the store ──


def _bring_back(store: Store, folder: Path) -> None:
    """Makes the folder what the store holds, unless it holds the same or, of the same plan, more."""
    there = store.list()
    listed = {name: size for name, size in there.items() if _OURS.fullmatch(name)}
    if foreign := [name for name in there if name not in listed and name != CLAIM]:
        raise ConfigError(f"--out {store.address} holds other things ({foreign[0]}); give a new or empty prefix")
    plans = [name for name in ("latents.next.json", "latents.json") if name in listed]
    if not plans:
        return
    if store.read_bytes(plans[0]) != _newest_plan(folder):
        _forget(folder)
    records = [name for name in listed if name.startswith("units/") and name.endswith(".json")]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(lambda record: _fetch_unit(store, folder, record, listed), records))
    for name in (*plans, *(("rejects.csv",) if "rejects.csv" in listed else ())):
        if not (folder / name).exists():
            store.fetch(name, folder / name)


def _newest_plan(folder: Path) -> bytes:
    paths = (plan_path(folder, finished=finished) for finished in (False, True))
    return next((path.read_bytes() for path in paths if path.is_file()), b"")


def _forget(folder: Path) -> None:
    """Records go first: what has none is nothing."""
    names = ("latents*.json", "units/unit-*.json", "units/unit-*", "rejects.csv")
    for path in (path for name in names for path in sorted(folder.glob(name))):
        path.unlink(missing_ok=True)


def _fetch_unit(store: Store, folder: Path, record: str, listed: dict[str, int]) -> None:
    """A unit's files that are not here, then its record."""
    for name in _files_of(record):
        if name in listed and _size(folder / name) != listed[name]:
            store.fetch(name, folder / name)
    if _size(folder / record) != listed[record] or (folder / record).read_bytes() != store.read_bytes(record):
        store.fetch(record, folder / record)


def _files_of(record: str) -> tuple[str, str]:
    """(latents, index) that a record tells of, by name."""
    stem = record.removesuffix(".json")
    return re.sub(r"\.g\d+$", "", stem) + ".safetensors", stem + ".parquet"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


# ── To the store ──


class _Copy:
    """What of the folder is in the store."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        self._there = store.list()
        self._put: dict[str, bytes] = {}
        """record → what it said when its unit was put"""

    def put_units(self) -> None:
        """Puts the plan that is at work, then what is committed here and not there."""
        self._put_plan(finished=False)
        for path in sorted((self._folder / "units").glob("unit-*.json")):
            name, content = f"units/{path.name}", path.read_bytes()
            if self._put.get(name) != content:
                self._put_unit(name, content)

    def _put_unit(self, name: str, content: bytes) -> None:
        files = [file for file in _files_of(name) if (self._folder / file).is_file()]
        if not self._is_there(name, content, files):
            if name in self._there:
                self._store.remove(name)  # of another plan: whoever reads must not take it for the files to come
            for file in files:
                self._store.put_file(self._folder / file, file)
            self._store.write_bytes(name, content)
        self._put[name] = content

    def _is_there(self, name: str, content: bytes, files: list[str]) -> bool:
        sizes = all(self._there.get(file) == _size(self._folder / file) for file in files)
        return sizes and self._there.get(name) == len(content) and self._store.read_bytes(name) == content

    def _put_plan(self, *, finished: bool) -> None:
        path = plan_path(self._folder, finished=finished)
        if path.is_file() and self._put.get(path.name) != (content := path.read_bytes()):
            self._store.write_bytes(path.name, content)
            self._put[path.name] = content

    def finish(self) -> None:
        """The finished plan takes its place, then what it does not need goes."""
        self.put_units()
        if (self._folder / "rejects.csv").is_file():
            self._store.put_file(self._folder / "rejects.csv", "rejects.csv")
        self._put_plan(finished=True)
        here = {path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()}
        gone = [name for name in self._store.list() if _OURS.fullmatch(name) and name not in here]
        for name in sorted(gone, key=lambda name: not name.endswith(".json")):
            self._store.remove(name)
