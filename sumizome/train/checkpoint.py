"""Checkpoints: written whole or not at all, verified before they are believed, older ones used when one is damaged.

A checkpoint is a directory `step-00000500`. Its tensors are shards of torch's distributed checkpoint (DCP) in the form
of safetensors files, so nothing is pickled, and a state that was cut over 4 ranks loads on 2 or on one. It is committed
in this order: every rank's files into a temporary directory, each flushed to disk; `manifest.json` with the SHA-256 of
every file last; one rename. Training state is (weights, optimizer, EMA, step): data order, captions, crops, noise and
timesteps follow from the seed and what they are for, see `sumizome.seeds`.

    step-00000500/weights/shard-00001-model-00001-of-00001.safetensors  ema/…  optimizer/…  state.json  manifest.json
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sumizome.distributed.parallelize import local
from sumizome.distributed.runtime import Ranks
from sumizome.errors import CheckpointError
from sumizome.files import flush_to_disk, sha256_of

__all__ = [
    "PARTS",
    "Checkpoint",
    "SavedCheckpoint",
    "checkpoint_facts",
    "latest_checkpoint",
    "list_checkpoints",
    "open_checkpoint",
    "prune_checkpoints",
    "remove_unfinished",
    "verify_checkpoint",
    "write_checkpoint",
]

FORMAT_VERSION = 2
PARTS = ("weights", "ema", "optimizer")
_NAME = re.compile(r"step-(\d{8,})")
_FILE_BYTES = 512 * 2**20
"""A file is made in memory before it is written; cut up, no save needs much more than the state itself."""

_ALONE = Ranks()


@dataclass(frozen=True)
class Checkpoint:
    """The training state after `step` steps, or this rank's share of it. DTensors are saved as the shards they are."""

    step: int
    weights: Mapping[str, Tensor]
    """Trained parameters, "unet.…", "text_encoder.…", "text_encoder_2.…"; frozen ones stay in the base model."""
    ema: Mapping[str, Tensor]
    """Their moving average, float32."""
    optimizer: Mapping[str, Tensor]
    """`{parameter}/{moment}`, and `{parameter}/step`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the state was trained from and on: base model digest, data fingerprint."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk whose digests were compared."""

    path: Path
    step: int
    facts: Mapping[str, Any]
    version: int = FORMAT_VERSION

    def shapes(self, part: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Name → (whole shape, dtype) of the tensors of a part."""
        if self.version == FORMAT_VERSION and not (self.path / part).is_dir():
            return {}  # an optimizer that had not made a step
        with self._reader(part) as reader:
            found = reader.read_metadata().state_dict_metadata
        return {name: (tensor.size, tensor.properties.dtype) for name, tensor in found.items()}

    def read_into(self, part: str, tensors: MutableMapping[str, Tensor]) -> None:
        """Fills the tensors, whole ones or shards (DTensors), from the part, however that was cut.

        Raises: CheckpointError if one of them is missing in it or has another shape.
        """
        from torch.distributed import checkpoint as dcp

        if not tensors:
            return
        shapes = self.shapes(part)
        wrong = [name for name, tensor in tensors.items() if shapes.get(name, (None,))[0] != tensor.size()]
        if wrong:
            raise CheckpointError(f"{self.path / part}: {wrong[0]} is missing there or has another shape")
        with self._reader(part) as reader, _quiet():
            # Each rank reads its own, without a word to the others: whoever samples a run reads the same way.
            dcp.load(tensors, storage_reader=reader, no_dist=True)

    def read(self, part: str) -> dict[str, Tensor]:
        """The whole part as CPU tensors."""
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.shapes(part).items()}
        self.read_into(part, tensors)
        return tensors

    @contextlib.contextmanager
    def _reader(self, part: str) -> Iterator[Any]:
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        if self.version == FORMAT_VERSION:
            yield HuggingFaceStorageReader(str(self.path / part))
            return
        # Version 1 had one file a part, side by side; the reader takes a folder.
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"{part}.safetensors").symlink_to((self.path / f"{part}.safetensors").resolve())
            yield HuggingFaceStorageReader(folder)


def write_checkpoint(
    directory: Path, checkpoint: Checkpoint, ranks: Ranks = _ALONE, file_is_done: Callable[[], None] = lambda: None
) -> Path:
    """Commits the checkpoint below `directory` and returns its path: on each rank, or on none.

    Collective over `ranks.saving`. A plain tensor is written by whichever rank brings it; none may come from two.
    Raises: CheckpointError when the disk is full or cannot be written; earlier checkpoints are left as they are.
    """
    final = directory / f"step-{checkpoint.step:08d}"
    unfinished = directory / f".unfinished-{final.name}"
    problem: str | None = None
    digests: dict[str, str] = {}
    try:
        if ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    except OSError as error:
        problem = error.strerror or str(error)
    # Every rank takes part in every word to the others, whatever happened to it: none may wait for one that gave up.
    problem = _agreed(ranks, problem)
    if problem is None:
        problem, digests = _write_parts(unfinished, checkpoint, ranks, file_is_done)
    gathered = ranks.gather((problem, digests), ranks.saving)
    problem = next((found for found, _ in gathered if found), None)
    if problem is None and ranks.is_first:
        problem = _commit(unfinished, final, checkpoint, {k: v for _, part in gathered for k, v in part.items()})
    problem = _agreed(ranks, problem)
    if problem is not None:
        if ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({problem}); earlier ones are untouched. "
            "Free some disk and run the same command again"
        )
    return final


def _agreed(ranks: Ranks, problem: str | None) -> str | None:
    """The first rank's problem, if any has one."""
    return next((found for found in ranks.gather(problem, ranks.saving) if found), None)


def _write_parts(
    unfinished: Path, checkpoint: Checkpoint, ranks: Ranks, file_is_done: Callable[[], None]
) -> tuple[str | None, dict[str, str]]:
    """Writes this rank's files; returns what went wrong, and the digest of each file by its name in the checkpoint."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        for part in PARTS:
            tensors = dict(getattr(checkpoint, part))
            files = _file_of_tensor(ranks.gather(_sizes(tensors), ranks.saving))
            if not files:  # the optimizer before its first step
                continue
            writer = HuggingFaceStorageWriter(str(unfinished / part), fqn_to_index_mapping=files, save_distributed=True)
            with _quiet():
                dcp.save(tensors, storage_writer=writer, process_group=ranks.saving, no_dist=ranks.world == 1)
        mine = sorted(unfinished.glob(f"*/shard-{ranks.rank + 1:05d}-*"))
        digests = {}
        for path in mine:
            digests[str(path.relative_to(unfinished))] = sha256_of(path)
            flush_to_disk(path)
            file_is_done()
    except CheckpointException as error:  # the errors of all ranks, on each of them
        first = next(iter(error.failures.values()))[0]
        return getattr(first, "strerror", None) or str(first), {}
    except Exception as error:
        return _reason(error), {}
    return None, digests


def _reason(error: BaseException) -> str:
    """What the operating system said, also where safetensors or torch say it in their own words."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes that this rank writes of each tensor."""
    return {name: local(tensor).numel() * tensor.element_size() for name, tensor in tensors.items()}


def _file_of_tensor(sizes_by_rank: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to: the same on all ranks, none above `_FILE_BYTES`."""
    sizes: dict[str, int] = {}
    for of_rank in sizes_by_rank:
        for name, size in of_rank.items():
            sizes[name] = max(size, sizes.get(name, 0))
    files, number, filled = {}, 1, 0
    for name in sorted(sizes):
        if filled and filled + sizes[name] > _FILE_BYTES:
            number, filled = number + 1, 0
        files[name] = number
        filled += sizes[name]
    return files


def _commit(unfinished: Path, final: Path, checkpoint: Checkpoint, digests: Mapping[str, str]) -> str | None:
    """Manifest last, one rename; returns what went wrong."""
    try:
        state = {"format": FORMAT_VERSION, "step": checkpoint.step, "facts": dict(checkpoint.facts)}
        (unfinished / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        flush_to_disk(unfinished / "state.json")
        digests = {**digests, "state.json": sha256_of(unfinished / "state.json")}
        for folder in unfinished.iterdir():
            if folder.is_dir():
                flush_to_disk(folder)
        manifest = json.dumps({"sha256": dict(sorted(digests.items())), "digest": _digest_of(digests)}, indent=2)
        (unfinished / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
        flush_to_disk(unfinished / "manifest.json")
        flush_to_disk(unfinished)
        if final.exists():  # the same step written again: only after a fall-back past a damaged one
            shutil.rmtree(final)
        unfinished.rename(final)
        flush_to_disk(final.parent)
    except OSError as error:
        return _reason(error)
    return None


def _digest_of(digests: Mapping[str, str]) -> str:
    """The manifest's own: damage to it is then told from damage to a file that it lists."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that one process is one process, and logs what it does not do."""
    logger = logging.getLogger("torch.distributed.checkpoint.hf_storage")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        logger.setLevel(level)


def list_checkpoints(directory: Path) -> list[Path]:
    """The committed checkpoints below `directory`, oldest first; their contents are not looked at."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def remove_unfinished(directory: Path) -> None:
    """Removes what a killed writer left behind. Only the holder of the run directory's lock may call it."""
    for path in directory.glob(".unfinished-*") if directory.is_dir() else ():
        shutil.rmtree(path)


def prune_checkpoints(directory: Path, keep: int, verified: Sequence[Path] = ()) -> None:
    """Removes the oldest checkpoints down to `keep`, and never the last two that verify.

    `verified` names those whose files were compared with their digests a moment ago; others are compared now.
    """
    whole = 0
    for count, path in enumerate(reversed(list_checkpoints(directory))):
        if count >= keep and whole >= 2:
            # The manifest goes first, so that a half-removed checkpoint is not taken for a whole one.
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path)
        elif whole < 2:
            whole += path in verified or _is_whole(path)


def _is_whole(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def latest_checkpoint(
    directory: Path, parts: Sequence[str] = PARTS, ranks: Ranks = _ALONE
) -> tuple[SavedCheckpoint | None, list[str]]:
    """The newest checkpoint that verifies (None when there is none at all), and what was wrong with newer ones.

    Collective: the ranks share the work of hashing, and agree.
    Raises: CheckpointError when checkpoints exist and every one is damaged.
    """
    complaints: list[str] = []
    for path in reversed(ranks.first(lambda: list_checkpoints(directory))):
        try:
            return open_checkpoint(path, parts, ranks), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError(
            f"{directory}: every checkpoint is damaged ({'; '.join(complaints)}); "
            "restore one from a backup, or start in a new run_dir"
        )
    return None, []


def open_checkpoint(path: Path, parts: Sequence[str] = PARTS, ranks: Ranks = _ALONE) -> SavedCheckpoint:
    """The checkpoint at `path`, verified first; `parts` names what will be read of it.

    Raises: CheckpointError naming the file that is missing or differs, the same on every rank.
    """
    verify_checkpoint(path, parts, ranks)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format") not in (1, FORMAT_VERSION):
        raise CheckpointError(f"{path}: format {state.get('format')}, this version reads 1 and {FORMAT_VERSION}")
    return SavedCheckpoint(path, int(state["step"]), state["facts"], int(state["format"]))


def checkpoint_facts(path: Path) -> Mapping[str, Any]:
    """What the checkpoint remembers of model and data, unverified: for one whose weights were loaded.

    Raises: CheckpointError where it cannot be read.
    """
    state = path / "state.json"
    try:
        facts: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state} cannot be read ({error}); try again when a checkpoint is written") from error
    return facts


def verify_checkpoint(
    path: Path, parts: Sequence[str] = PARTS, ranks: Ranks = _ALONE, file_is_done: Callable[[], None] = lambda: None
) -> None:
    """Compares the files with the manifest. safetensors alone loads a flipped bit in silence.

    Raises: CheckpointError naming the file that is missing or differs, the same on every rank.
    """
    problems: list[str] = []
    try:
        _verify(path, parts, ranks, file_is_done)
    except CheckpointError as error:
        problems.append(str(error))
    found = [problem for of_rank in ranks.gather(problems) for problem in of_rank]
    if found:
        raise CheckpointError(found[0])


def _verify(path: Path, parts: Sequence[str], ranks: Ranks, file_is_done: Callable[[], None]) -> None:
    expected = _manifest(path)
    wanted = [name for name in expected if name == "state.json" or Path(name).parts[0].split(".")[0] in parts]
    for name in wanted:
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
    for part in parts:
        strange = {f"{part}/{file.name}" for file in (path / part).glob("*")} - set(expected)
        if strange:
            raise CheckpointError(f"{path / min(strange)}: not in manifest.json, so not of this checkpoint")
    for name in ranks.share(wanted):
        try:
            digest = sha256_of(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read ({error.strerror})") from error
        if digest != expected[name]:
            raise CheckpointError(f"{path / name}: its SHA-256 is not the one in manifest.json; the file is damaged")
        file_is_done()


def _manifest(path: Path) -> dict[str, str]:
    """File → SHA-256. Raises: CheckpointError unless it lists a whole checkpoint's files, and no path out of it."""
    manifest = path / "manifest.json"
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {str(name): str(digest) for name, digest in listed["sha256"].items()}
        if "state.json" not in expected or listed.get("digest", _digest_of(expected)) != _digest_of(expected):
            raise ValueError("not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: missing or damaged, so this checkpoint cannot be trusted") from error
    allowed = re.compile(rf"state\.json|({'|'.join(PARTS)})(\.safetensors|/[\w-]+\.safetensors)")
    strange = [name for name in expected if not allowed.fullmatch(name)]
    if strange:
        raise CheckpointError(f"{manifest}: lists {sorted(expected)[:4]}, which is no checkpoint of this program")
    return expected
