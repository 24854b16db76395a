"""The small files of a store's latents, copied to this machine: plan, commit records, indexes.

Owns the copy and when it is fresh; what the files must hold is `shards`' to verify, as in any folder. Plan and records
are read anew at each opening; an index is kept while it still has the SHA-256 that its record says.
"""

import fcntl
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sumizome.data.store import Store
from sumizome.errors import StoreError
from sumizome.files import sha256_of

__all__ = ["mirror_units"]

_REQUESTS = 32


def mirror_units(store: Store, cache_folder: Path) -> tuple[Path, dict[str, int]]:
    """(folder with the plan, records and indexes, every object of the store and its bytes).

    Raises: StoreError if the store cannot be read or the folder cannot be written.
    """
    mirror = cache_folder / "indexes" / hashlib.sha256(store.address.encode()).hexdigest()[:32]
    try:
        mirror.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the cache {cache_folder} cannot be written: {error.strerror}; give another") from error
    listed = store.list()
    ours = [name for name in listed if re.fullmatch(r"(?:units/)?\w[\w.-]*\.(?:json|parquet)", name)]
    plain = [name for name in ours if name.endswith(".json")]
    indexes = [name for name in ours if name.endswith(".parquet")]
    with (mirror / ".lock").open("ab") as lock, ThreadPoolExecutor(_REQUESTS) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a machine copies, the others find it done
        for path in mirror.rglob("*"):
            if path.is_file() and not path.name.startswith(".") and path.relative_to(mirror).as_posix() not in listed:
                path.unlink()
        list(pool.map(lambda name: store.fetch(name, mirror / name), plain))
        told = {key: value for name in plain for key, value in _digests(mirror / name).items()}
        stale = [name for name in indexes if not _is_fresh(mirror / name, told.get(Path(name).name))]
        list(pool.map(lambda name: store.fetch(name, mirror / name), stale))
    return mirror, listed


def _digests(record: Path) -> dict[str, str]:
    """File name → SHA-256 as a commit record says; nothing of what is none, which is verified elsewhere."""
    try:
        files = json.loads(record.read_bytes())["files"]
        return {name: told["sha256"] for name, told in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_fresh(path: Path, sha256: str | None) -> bool:
    return path.is_file() and sha256_of(path) == sha256
