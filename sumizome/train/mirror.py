"""Checkpoints in a second place, such as an S3 bucket: put there once they are whole here, brought back when none is.

The same order as on disk: files first, the manifest last, so that what has a manifest is whole; and what comes back is
verified before it gets its name. The run's settings go with them: a run that comes back is held to those. A mirror that
cannot be reached costs no checkpoint and does not end a run.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from sumizome.data.store import open_store
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError, StoreError
from sumizome.files import flush_to_disk
from sumizome.train.checkpoint import list_checkpoints, verify_checkpoint

__all__ = ["CheckpointMirror"]

_MANIFEST = "manifest.json"
_SETTINGS = "config.toml"


class CheckpointMirror:
    """The copies of a run's checkpoints at `address`; at least the newest two stay."""

    def __init__(self, address: str, keep: int) -> None:
        self.store = open_store(address)
        self.keep = max(2, keep)

    def put(self, checkpoint: Path, ranks: Ranks, file_is_done: Callable[[], None] = lambda: None) -> list[str]:
        """Copies a checkpoint; the ranks share its files. Returns what went wrong, in words. Collective on `saving`."""
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _MANIFEST]
        problems: list[str] = []
        try:
            for path in ranks.share(files):
                self.store.put_file(path, f"{checkpoint.name}/{path.relative_to(checkpoint)}")
                file_is_done()
        except (StoreError, OSError) as error:
            problems.append(str(error))
        problems = [problem for of_rank in ranks.gather(problems, ranks.saving) for problem in of_rank]
        if ranks.is_first and not problems:
            settings = checkpoint.parent.parent / _SETTINGS
            try:
                if settings.is_file():
                    self.store.put_file(settings, _SETTINGS)
                self.store.put_file(checkpoint / _MANIFEST, f"{checkpoint.name}/{_MANIFEST}")
                self._forget_old()
            except (StoreError, OSError) as error:
                problems.append(str(error))
        return [f"{checkpoint.name} is not in the mirror: {problem}; it is whole here" for problem in problems[:1]]

    def bring_back(self, directory: Path) -> list[str]:
        """Fetches the newest whole checkpoint into `directory` if that has none, and the run's settings beside that.

        Returns what a user should be told.
        Raises: StoreError if the mirror cannot be reached. CheckpointError if it holds checkpoints and all are damaged.
        """
        if list_checkpoints(directory):
            return []
        told: list[str] = []
        whole = self._whole()
        for name in reversed(whole):
            try:
                self._fetch(name, directory)
            except CheckpointError as error:
                told.append(f"{self.store.address}: {error}")
                continue
            settings = directory.parent / _SETTINGS
            if not settings.exists() and self.store.exists(_SETTINGS):
                self.store.fetch(_SETTINGS, settings)
            return [*told, f"{directory} held no checkpoint; {name} was brought back from {self.store.address}"]
        if whole:
            raise CheckpointError(f"{self.store.address}: every checkpoint there is damaged ({'; '.join(told)})")
        return told

    def _fetch(self, name: str, directory: Path) -> None:
        unfinished = directory / f".unfinished-{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        for file in self.store.list(name):
            target = unfinished / Path(file).relative_to(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.store.fetch(file, target)
        try:
            verify_checkpoint(unfinished)
        except CheckpointError:
            shutil.rmtree(unfinished)
            raise
        for folder in [path for path in unfinished.rglob("*") if path.is_dir()]:
            flush_to_disk(folder)
        flush_to_disk(unfinished)
        unfinished.rename(directory / name)
        flush_to_disk(directory)

    def _whole(self) -> list[str]:
        """Names of the checkpoints that have a manifest, oldest first."""
        return sorted(Path(file).parts[0] for file in self.store.list() if Path(file).name == _MANIFEST)

    def _forget_old(self) -> None:
        for name in self._whole()[: -self.keep]:
            self.store.remove(f"{name}/{_MANIFEST}")
            for file in self.store.list(name):
                self.store.remove(file)
