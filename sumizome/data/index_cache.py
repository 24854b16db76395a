"""The joined index of a large latent cache as files that every process of a machine maps.

Owns the files and when they are made: once per content, under a lock, in a folder that is renamed into place. The
invariant: an index that is mapped has the digests that were taken when it was made from verified units, and the name
of what it was made from; what does not is made anew, since nothing is in it that the units do not have.

    ~/.cache/sumizome/index/<key>/<column>   raw numbers        …/index.json   dtypes, shapes, SHA-256, written last
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from sumizome.data.latent_index import LatentIndex
from sumizome.errors import DataError
from sumizome.files import flush_to_disk, sha256_of, wait_for_lock

__all__ = ["default_folder", "mapped_index"]

_VERSION = 1
_KEPT = 3
"""joined indexes that stay on the disk, the last used; each is about 200 bytes a picture"""


def default_folder() -> Path:
    """Where joined indexes lie: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sumizome" / "index"


def mapped_index(folder: Path, key: str, make: Callable[[], Iterable[dict[str, np.ndarray]]]) -> LatentIndex:
    """The index called `key`, mapped; made from the columns of `make` (as `column_parts`) unless it is there and whole.

    Raises: DataError if the disk cannot be written.
    """
    place = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(folder / ".lock"):
            if (columns := _map(place)) is None:
                _write(place, make())
                columns = _map(place)
            os.utime(place)
            _prune(folder)
    except OSError as error:
        raise DataError(
            f"cannot write the joined index below {folder}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder on a disk with room"
        ) from error
    if columns is None:
        raise DataError(f"{place} does not read back as it was written; the disk is failing: set XDG_CACHE_HOME")
    return LatentIndex(columns)


def _write(place: Path, parts: Iterable[dict[str, np.ndarray]]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    files: dict[str, IO[bytes]] = {}
    facts: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    try:
        for part in parts:
            for name, array in part.items():
                if name not in files:
                    files[name] = (temporary / name).open("wb")
                    digests[name] = hashlib.sha256()
                    facts[name] = {"dtype": array.dtype.str, "shape": [0, *array.shape[1:]]}
                content = np.ascontiguousarray(array).tobytes()
                files[name].write(content)
                digests[name].update(content)
                facts[name]["shape"][0] += len(array)
    finally:
        for file in files.values():
            file.close()
    for name, digest in digests.items():
        facts[name]["sha256"] = digest.hexdigest()
        flush_to_disk(temporary / name)
    described = {"version": _VERSION, "columns": facts}
    (temporary / "index.json").write_text(json.dumps(described | {"digest": _digest(described)}))
    flush_to_disk(temporary / "index.json")
    temporary.rename(place)
    flush_to_disk(place.parent)


def _map(place: Path) -> dict[str, np.ndarray] | None:
    """The columns, mapped, or None if they are not there as they were written."""
    try:
        content = json.loads((place / "index.json").read_text())
        if content.pop("digest") != _digest(content) or content["version"] != _VERSION:
            return None
        columns = content["columns"]
        if any(sha256_of(place / name) != facts["sha256"] for name, facts in columns.items()):
            return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return {name: _map_column(place / name, facts) for name, facts in columns.items()}


def _map_column(path: Path, facts: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = np.dtype(facts["dtype"]), tuple(facts["shape"])
    if 0 in shape:
        return np.empty(shape, dtype)  # an empty file cannot be mapped
    # As a plain array: a slice of a memmap costs ten times as much, and batches take many.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=shape))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path) -> None:
    """Removes all but the last used; a process that has one mapped keeps it until it ends."""
    found = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in found[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
