"""Pictures to latent shards: the manifest's pictures decoded, fitted into their buckets, encoded, committed in units.

Owns the run, the output folder and its resumption; what happens to the pictures of a unit is `prepare_unit`'s. The
invariant: every picture of the manifest ends up written or rejected with a reason, and a run that was killed anywhere
and started again leaves the same bytes as one that was not. A unit of about 2 048 pictures is committed or is nothing.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from diffusers import AutoencoderKL

from sumizome.data.buckets import BucketConfig, Canvases, bucket_table
from sumizome.data.canvas import RESIZE_VERSION
from sumizome.data.ingest import available_cores
from sumizome.data.manifest import Manifest
from sumizome.data.reject_table import write_rejects
from sumizome.data.shards import (
    CachePlan,
    Fingerprint,
    UnitRecord,
    commit_unit,
    differences,
    load_plan,
    unit_paths,
    verify_unit,
    write_plan,
)
from sumizome.data.sources import Reject
from sumizome.errors import ConfigError, DataError, ShardError
from sumizome.files import hold_lock
from sumizome.models.vae import latent_statistics, vae_digest, vae_factor
from sumizome.prepare_unit import Outcome, Unit, encode_unit, frame_unit

__all__ = ["PrepareConfig", "PrepareProgress", "prepare_latents"]

_BATCH_PIXELS = 4 * 1024 * 1024
_MAX_BATCH = 16
_ALLOWED_FAILURES = 8
"""A small unit may lose this many pictures whatever their share."""


@dataclass(frozen=True)
class PrepareConfig:
    """How pictures become latents."""

    buckets: BucketConfig = field(default_factory=BucketConfig)
    unit_size: int = 2048
    """Pictures committed together: what a kill can cost, and one shard file (270 MB at 1024²)."""
    batch_size: int = 0
    """Pictures the VAE encodes at once; 0 = four megapixels' worth (4 at 1024²), and 16 at most."""
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


@dataclass(frozen=True)
class PrepareProgress:
    """Where a preparation stands, in pictures. At the end written + rejected = total."""

    total: int
    written: int = 0
    rejected: int = 0
    found: int = 0
    """Of both, those in units that an earlier run had finished."""
    notes: tuple[str, ...] = ()
    """Events in plain words: a damaged unit that is made anew."""

    @property
    def done(self) -> int:
        return self.written + self.rejected


def prepare_latents(
    manifest: Manifest, vae: AutoencoderKL, out: Path, config: PrepareConfig, *, command: str = "sumizome prepare"
) -> Iterator[PrepareProgress]:
    """Prepares what is not yet prepared in `out`, yielding where it stands after each batch.

    Nothing happens before the first `next`; close the generator to stop. `command` is what an error tells the user to
    run again.
    Raises: ConfigError if a setting or `out` cannot be. ShardError if `out` was begun with other settings. DataError if
        the disk cannot be written, if too many pictures of a unit fail, or if none at all is left.
    """
    table = bucket_table(config.buckets)
    fingerprint = _fingerprint(manifest, vae, config.buckets, table)
    plan = CachePlan(fingerprint, len(manifest), config.unit_size, command, manifest.categories)
    _check_out(out, manifest.sources)
    with _hold(out):
        plan = _begin(out, plan)
        records, progress = _survey(out, plan)
        yield progress
        with ThreadPoolExecutor(config.decode_threads or available_cores()) as pool:
            for number in range(plan.units):
                if number not in records:
                    unit = frame_unit(manifest, plan.rows(number), table, config.buckets)
                    outcomes: dict[int, Outcome] = {}
                    for new in encode_unit(unit, vae, pool, _batch_size(config, table)):
                        outcomes |= new
                        progress = _advance(progress, new)
                        yield progress
                    _check_failures(unit, outcomes, config.max_failures, command)
                    records[number] = _commit(out, plan, number, unit, outcomes)
        rejects = (each for _, record in sorted(records.items()) for each in record.rejects)
        write_rejects(out / "rejects.csv", rejects, manifest.sources)
    if progress.written == 0:
        raise DataError(
            f"none of the {len(manifest)} pictures could be prepared; {out / 'rejects.csv'} says why of each"
        )


def _fingerprint(manifest: Manifest, vae: AutoencoderKL, buckets: BucketConfig, table: Canvases) -> Fingerprint:
    """What the latents will depend on.

    Raises: ConfigError if the VAE cannot take the buckets' sides.
    """
    factor, statistics = vae_factor(vae), latent_statistics(vae)
    if buckets.step % factor:
        raise ConfigError(
            f"step is {buckets.step}; give a multiple of {factor}, the pixels that this VAE makes a latent of"
        )
    return Fingerprint(
        vae_digest=vae_digest(vae),
        vae_factor=factor,
        latent_mean=statistics.mean,
        latent_std=statistics.std,
        buckets=tuple((height, width) for height, width in table.tolist()),
        max_aspect_error=buckets.max_aspect_error,
        crop=buckets.crop,
        crop_seed=buckets.crop_seed,
        resize=RESIZE_VERSION,
        manifest_digest=manifest.digest,
    )


def _batch_size(config: PrepareConfig, table: Canvases) -> int:
    return config.batch_size or int(np.clip(_BATCH_PIXELS // table.prod(axis=1).max(), 1, _MAX_BATCH))


def _advance(progress: PrepareProgress, new: Mapping[int, Outcome]) -> PrepareProgress:
    rejected = sum(isinstance(outcome, Reject) for outcome in new.values())
    return replace(
        progress, written=progress.written + len(new) - rejected, rejected=progress.rejected + rejected, notes=()
    )


# ── The folder ──


def _check_out(out: Path, sources: Iterable[Path]) -> None:
    place = out.resolve()
    for source in sources:
        if place.is_relative_to(source.resolve()):
            raise ConfigError(
                f"--out {out} lies inside the picture folder {source}, which is never written to; give another"
            )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    foreign = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
    if foreign and "latents.json" not in foreign:
        raise ConfigError(f"--out {out} holds other things ({foreign[0]}); give a new or empty folder")


@contextlib.contextmanager
def _hold(out: Path) -> Iterator[None]:
    """Holds the folder for this process, and clears what a killed one left."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error

    def refusal(holder: str) -> ShardError:
        return ShardError(f"{out}: {holder} is preparing here; wait for it, or give another --out")

    with hold_lock(out / ".lock", refusal):
        for leftover in (*out.glob(".*.tmp"), *(out / "units").glob(".*.tmp")):
            leftover.unlink()
        yield


def _begin(out: Path, plan: CachePlan) -> CachePlan:
    """The plan of the folder: the one that is there, if it is for the same latents, else this one, now written."""
    if not (out / "latents.json").exists():
        write_plan(out, plan)
        return plan
    found = load_plan(out)
    different = differences(found.fingerprint, asdict(plan.fingerprint))
    if found.unit_size != plan.unit_size:
        different.append("unit_size")
    if different:
        raise ShardError(
            f"{out} was begun with another {', another '.join(different)}; give another --out, delete this one, "
            f"or finish it as it was begun: `{found.command}`"
        )
    return found


def _survey(out: Path, plan: CachePlan) -> tuple[dict[int, UnitRecord], PrepareProgress]:
    """The units that are finished and whole. A unit that exists but is damaged is named in the notes, and made anew."""

    def verify(unit: int) -> UnitRecord | ShardError:
        try:
            return verify_unit(out, plan, unit)
        except ShardError as error:
            return error

    begun = [unit for unit in range(plan.units) if unit_paths(out, unit)[-1].exists()]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(begun, pool.map(verify, begun), strict=True))
    records = {unit: record for unit, record in found.items() if isinstance(record, UnitRecord)}
    notes = [f"made anew: {str(error).split(';')[0]}" for error in found.values() if isinstance(error, ShardError)]
    written = sum(record.written for record in records.values())
    rejected = sum(len(record.rejects) for record in records.values())
    return records, PrepareProgress(plan.images, written, rejected, written + rejected, tuple(notes))


# ── The end of a unit ──


def _check_failures(unit: Unit, outcomes: Mapping[int, Outcome], share: float, command: str) -> None:
    """Raises: DataError if so many pictures failed that something else than the pictures must be wrong."""
    failed = [
        outcome
        for entry, outcome in sorted(outcomes.items())
        if isinstance(outcome, Reject) and entry not in unit.misfits
    ]
    if len(failed) > max(_ALLOWED_FAILURES, share * len(unit.rows)):
        first = failed[0]
        raise DataError(
            f"{len(failed)} of {len(unit.rows)} pictures failed, first {first.path}: {first.reason}, {first.sentence} "
            f"Nothing of these was kept. Is a drive missing? Mend it and run `{command}` again; or, if the pictures "
            "are meant to be so, run `sumizome ingest` again"
        )


def _commit(out: Path, plan: CachePlan, number: int, unit: Unit, outcomes: Mapping[int, Outcome]) -> UnitRecord:
    rejects = [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, Reject)]
    latents = {entry: outcome for entry, outcome in sorted(outcomes.items()) if not isinstance(outcome, Reject)}
    kept, geometry = list(latents), unit.geometry
    columns: dict[str, Any] = {
        name: unit.pictures[name].take(pa.array(kept, pa.int64())) for name in ("id", "tags", "kept_tags", "repeats")
    }
    for names, pairs in (
        (("bucket_h", "bucket_w"), geometry.target),
        (("original_h", "original_w"), geometry.original),
        (("crop_top", "crop_left"), geometry.offset),
    ):
        columns |= {name: pairs[kept, axis].tolist() for axis, name in enumerate(names)}
    return commit_unit(out, plan, number, list(latents.values()), columns, rejects)
