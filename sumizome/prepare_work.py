"""What is to be prepared and one worker at it: units taken by lease, encoded, committed while the next is encoded.

Owns the order in which a worker takes units and when one counts. Any number of workers, in any processes on machines
that share the folder, run `work_through` on the same `Work`; what they leave is the same bytes. A unit that a worker
dies over is taken by another.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from diffusers import AutoencoderKL
from jaxtyping import Int

from sumizome.data.buckets import BucketConfig, bucket_table
from sumizome.data.ingest import available_cores
from sumizome.data.latent_plan import CachePlan, load_plan, plan_path
from sumizome.data.manifest import ManifestRows
from sumizome.data.shards import UnitRecord, commit_unit, unit_paths, verify_unit
from sumizome.data.tasks import Reject
from sumizome.errors import ConfigError, DataError, ShardError
from sumizome.leases import Leases
from sumizome.prepare_encoder import Encoder, Precision
from sumizome.prepare_unit import Outcome, Unit, encode_units, frame_unit

__all__ = ["Event", "PrepareConfig", "Work", "lease_folder", "work_through"]

_BATCH_PIXELS = 4 * 1024 * 1024
_MAX_BATCH = 16
_ALLOWED_FAILURES = 8
"""A small unit may lose this many pictures whatever their share."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PrepareConfig:
    """How pictures become latents."""

    buckets: BucketConfig = field(default_factory=BucketConfig)
    crops: int = 1
    """Random crops of each picture; an epoch shows one of them. Each takes as much room, and time, as the first."""
    flip: bool = False
    """Store each crop mirrored, too. Not for sets whose tags or pictures tell left from right (writing does)."""
    precision: Precision = "float32"
    """Of the VAE's arithmetic."""
    unit_size: int = 2048
    """Pictures committed together: what a kill can cost, and one shard file (270 MB at 1024²)."""
    batch_size: int = 0
    """Canvases the VAE encodes at once; 0 = four megapixels' worth (4 at 1024²), and 16 at most."""
    decode_threads: int = 0
    """Threads that decode while the VAE works; 0 = one a core."""
    max_failures: float = 0.05
    """Share of a unit's pictures that may fail to decode or encode. Beyond it the run stops and the unit is not
    committed: a drive that is not mounted must not become a set of rejects. 8 pictures may always fail."""

    def __post_init__(self) -> None:
        if self.unit_size < 1 or self.batch_size < 0 or self.decode_threads < 0:
            raise ConfigError(
                f"unit_size {self.unit_size} must be at least 1, batch_size {self.batch_size} and "
                f"decode_threads {self.decode_threads} at least 0"
            )
        if not 1 <= self.crops <= 64:
            raise ConfigError(f"crops is {self.crops}; give 1 to 64")
        if self.crops > 1 and self.buckets.crop == "center":
            raise ConfigError(f"crops is {self.crops}, but all centre crops are the same; give --crop random")


@dataclass(frozen=True, eq=False)
class Work:
    """Everything that a worker needs but the VAE."""

    manifest: ManifestRows
    out: Path
    plan: CachePlan
    missing: Int[np.ndarray, " n"]
    """Rows of the manifest that are to be encoded; `plan.rows` points into it."""
    config: PrepareConfig
    rejected_before: frozenset[tuple[int, str]] = frozenset()
    """(source, path) of pictures that failed in an earlier generation, and may fail again."""

    def unit(self, number: int) -> Unit:
        """The pictures of a new unit."""
        plan, table = self.plan, bucket_table(self.config.buckets)
        rows = self.missing[plan.rows(number)]
        crops, flip = self.config.crops, self.config.flip
        return frame_unit(number, self.manifest, rows, table, self.config.buckets, crops=crops, flip=flip)

    @property
    def batch_size(self) -> int:
        largest = bucket_table(self.config.buckets).prod(axis=1).max()
        return self.config.batch_size or int(np.clip(_BATCH_PIXELS // largest, 1, _MAX_BATCH))

    def is_done(self, number: int) -> bool:
        """Whether the unit's record is there; whether it is also right, `committed` says."""
        *_, record = unit_paths(self.out, number)
        return record.exists()

    def committed(self, number: int) -> UnitRecord | None:
        """The unit's record in this plan, if it is finished."""
        try:
            return verify_unit(self.out, self.plan, number, "size") if self.is_done(number) else None
        except ShardError:
            return None


@dataclass(frozen=True)
class Event:
    """What a worker did since the last one, in pictures."""

    written: int = 0
    rejected: int = 0
    by_others: int = 0
    """Of both, those that others were found to have finished."""
    vae_seconds: float = 0.0
    note: str = ""
    """What a user should be told."""


def lease_folder(out: Path) -> Path:
    """Where the leases of a latent folder lie."""
    return out / ".leases"


def work_through(
    work: Work, vae: AutoencoderKL, units: Sequence[int], *, wait: bool = True, alive: Callable[[], bool] = lambda: True
) -> Iterator[Event]:
    """Makes units in this order until all are finished, by this worker or others.

    Not to `wait` ends it when those that are left are in the hands of others. It also ends once it is not `alive`.
    Raises: ConfigError if a batch is too large for the device's memory. DataError if the disk cannot be written or too
        many pictures of a unit fail. ShardError if another preparation has taken the folder over.
    """
    encoder = Encoder(vae, work.config.precision)
    left = list(units)
    threads = work.config.decode_threads or available_cores()
    with (
        Leases(lease_folder(work.out)) as leases,
        ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
        _Committer(work, leases, left) as committer,
    ):
        while left and alive():
            before = len(left)
            found: list[UnitRecord] = []
            claimed = (work.unit(number) for number in _claim(work, left, leases, found))
            seconds = encoder.busy_seconds
            for unit, outcomes, is_last in encode_units(claimed, encoder, pool, work.batch_size):
                committer.add(unit, outcomes, is_last=is_last)
                rejected = sum(isinstance(outcome, Reject) for outcome in outcomes.values())
                yield Event(len(outcomes) - rejected, rejected, vae_seconds=encoder.busy_seconds - seconds)
                seconds = encoder.busy_seconds
                if not alive():
                    return
            committer.flush()
            for record in found:
                rejects = len(record.rejects)
                yield Event(record.written, rejects, by_others=record.written + rejects)
            if left and not wait:
                return
            if left and len(left) == before:
                yield Event()  # so that whoever watches sees that it lives
                time.sleep(_POLL_SECONDS)


def _claim(work: Work, left: list[int], leases: Leases, found: list[UnitRecord]) -> Iterator[int]:
    """The units of `left` that nobody is at, each with its lease; what is finished by others goes to `found`."""
    for number in list(left):
        if (record := work.committed(number)) is None:
            if (lease := leases.take(_lease_name(number))) is None:
                continue
            if (record := work.committed(number)) is None:
                left.remove(number)
                yield number
                continue
            leases.release(lease.path.name)
        left.remove(number)
        found.append(record)


def _lease_name(number: int) -> str:
    return f"unit-{number:05d}"


# ── The end of a unit ──


class _Committer:
    """Gathers outcomes and commits whole units, one at a time, while the next is being encoded."""

    def __init__(self, work: Work, leases: Leases, left: list[int]) -> None:
        self._work = work
        self._left = left
        self._leases = leases
        self._outcomes: dict[int, dict[int, Outcome]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future[None] | None = None

    def __enter__(self) -> "_Committer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, unit: Unit, outcomes: Mapping[int, Outcome], *, is_last: bool) -> None:
        """Raises: what the commit before raised, as soon as it is known."""
        gathered = self._outcomes.setdefault(unit.number, {})
        gathered |= outcomes
        if self._running is not None and (is_last or self._running.done()):
            self.flush()
        if is_last:
            del self._outcomes[unit.number]
            _check_failures(unit, gathered, self._work)
            self._running = self._pool.submit(self._commit, unit, gathered)

    def flush(self) -> None:
        """Waits for what is being committed."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def _commit(self, unit: Unit, outcomes: Mapping[int, Outcome]) -> None:
        name = _lease_name(unit.number)
        _check_plan(self._work)
        if self._leases.owns(name):
            _commit(self._work.out, self._work.plan, unit, outcomes)
        else:
            self._left.append(unit.number)  # another machine took this one for dead, and makes the same unit
        self._leases.release(name)


def _check_plan(work: Work) -> None:
    """Raises: ShardError if the folder is being prepared for something else by now."""
    for finished in (False, True):
        if plan_path(work.out, finished=finished).is_file():
            plan = load_plan(work.out, finished=finished)
            if (plan.fingerprint, plan.generation) == (work.plan.fingerprint, work.plan.generation):
                return
    raise ShardError(f"{work.out}: another `sumizome prepare` has begun here, for another manifest; this one stops")


def _check_failures(unit: Unit, outcomes: Mapping[int, Outcome], work: Work) -> None:
    """Raises: DataError if so many pictures failed that something else than the pictures must be wrong."""
    failed = [
        outcome
        for entry, outcome in sorted(outcomes.items())
        if isinstance(outcome, Reject)
        and entry not in unit.misfits
        and (outcome.source, outcome.path) not in work.rejected_before
    ]
    if len(failed) > max(_ALLOWED_FAILURES, work.config.max_failures * len(unit.rows)):
        first = failed[0]
        raise DataError(
            f"{len(failed)} of {len(unit.rows)} pictures failed, first {first.path}: {first.reason}, {first.sentence} "
            f"Nothing of these was kept. Is a drive missing? Mend it and run `{work.plan.command}` again; or, if "
            "the pictures are meant to be so, run `sumizome ingest` again"
        )


def _commit(out: Path, plan: CachePlan, unit: Unit, outcomes: Mapping[int, Outcome]) -> UnitRecord:
    rejects = [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, Reject)]
    stacks = {entry: outcome for entry, outcome in sorted(outcomes.items()) if not isinstance(outcome, Reject)}
    kept, geometry, variants = list(stacks), unit.geometry, plan.fingerprint.variants
    each = pa.array(np.repeat(np.array(kept, np.int64), variants))
    columns: dict[str, Any] = {
        name: unit.pictures[name].take(each) for name in ("id", "sha256", "tags", "kept_tags", "repeats")
    }
    columns["variant"] = list(range(variants)) * len(kept)
    for names, pairs in (
        (("bucket_h", "bucket_w"), geometry.target),
        (("original_h", "original_w"), geometry.original),
    ):
        columns |= {name: np.repeat(pairs[kept, axis], variants).tolist() for axis, name in enumerate(names)}
    corners = geometry.corner[kept].reshape(-1, 2)
    columns |= {"crop_top": corners[:, 0].tolist(), "crop_left": corners[:, 1].tolist()}
    return commit_unit(
        out, plan, unit.number, [latent for stack in stacks.values() for latent in stack], columns, rejects
    )
