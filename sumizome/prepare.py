"""Pictures to latent shards: the manifest's pictures decoded, fitted into their buckets, encoded, committed in units.

Owns the pipeline and its resumption; formats, geometry and decoding are `data/`'s, the VAE is `models/`'s. The
invariant: every picture of the manifest ends up written or rejected with a reason, and a run that was killed anywhere
and started again leaves the same bytes as one that was not. A unit of about 2 048 pictures is committed or is nothing.
"""

import contextlib
import csv
import fcntl
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Float16, UInt8

from sumizome.data.buckets import (
    RESIZE_VERSION,
    BucketAssignment,
    BucketConfig,
    Canvases,
    CropGeometry,
    Sizes,
    assign_buckets,
    bucket_table,
    crop_geometry,
    resize_and_crop,
)
from sumizome.data.images import ImageRejected, open_image
from sumizome.data.ingest import available_cores
from sumizome.data.manifest import Manifest, write_atomically
from sumizome.data.shards import (
    CachePlan,
    Fingerprint,
    UnitRecord,
    commit_unit,
    differences,
    latent_fault,
    load_plan,
    verify_unit,
    write_plan,
)
from sumizome.data.sources import Reject
from sumizome.errors import ConfigError, DataError, ShardError
from sumizome.models.vae import encode_pixels, latent_statistics, vae_digest, vae_factor

__all__ = ["PrepareConfig", "PrepareProgress", "picture_sizes", "prepare_latents"]

_BATCH_PIXELS = 4 * 1024 * 1024
_MAX_BATCH = 64
_ALLOWED_FAILURES = 8
"""A small unit may lose this many pictures whatever their share."""


@dataclass(frozen=True)
class PrepareConfig:
    """How pictures become latents."""

    buckets: BucketConfig = field(default_factory=BucketConfig)
    unit_size: int = 2048
    """Pictures committed together: what a kill can cost, and one shard file (270 MB at 1024²)."""
    batch_size: int = 0
    """Pictures the VAE encodes at once; 0 = four megapixels' worth (4 at 1024²), and 64 at most."""
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


def picture_sizes(manifest: Manifest) -> Sizes:
    """(height, width) of each picture, px."""
    return np.stack([manifest.table[side].to_numpy().astype(np.int64) for side in ("height", "width")], axis=1)


def prepare_latents(
    manifest: Manifest, vae: AutoencoderKL, out: Path, config: PrepareConfig, *, command: str = "sumizome prepare"
) -> Iterator[PrepareProgress]:
    """Prepares what is not yet prepared in `out`, yielding where it stands after each batch. Nothing happens before
    the first `next`; close the generator to stop. `command` is what an error tells the user to run again.

    Raises: ConfigError if settings cannot be or `out` is a bad place. ShardError if `out` was made with other settings.
        DataError if the disk cannot be written, or if too many pictures fail.
    """
    unit_maker = _UnitMaker(manifest, vae, config)
    plan = CachePlan(unit_maker.fingerprint(), len(manifest), config.unit_size, command)
    _check_out(out, manifest.sources)
    with _hold(out):
        plan = _begin(out, plan)
        records, progress = _survey(out, plan)
        yield progress
        with ThreadPoolExecutor(config.decode_threads or available_cores()) as pool:
            for unit in range(plan.units):
                if unit not in records:
                    for progress in unit_maker.encode(plan.rows(unit), pool, progress):
                        yield progress
                    records[unit] = unit_maker.commit(out, plan, unit)
        _write_rejects(out / "rejects.csv", manifest, records.values())
    if progress.written == 0:
        raise DataError(f"none of the {len(manifest)} pictures could be prepared; {out / 'rejects.csv'} says why of each")


# ── The folder ──


def _check_out(out: Path, sources: Iterable[Path]) -> None:
    place = out.resolve()
    for source in sources:
        if place.is_relative_to(source.resolve()):
            raise ConfigError(f"--out {out} lies inside the picture folder {source}, which is never written to; give another")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    foreign = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
    if foreign and "latents.json" not in foreign:
        raise ConfigError(f"--out {out} holds other things ({foreign[0]}); give a new or empty folder")


@contextlib.contextmanager
def _hold(out: Path) -> Iterator[None]:
    """Holds the folder for this process; the kernel lets go of it however the process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ShardError(f"{out}: another process is preparing here; wait for it, or give another --out") from error
        for leftover in (*out.glob(".*.tmp"), *(out / "units").glob(".*.tmp")):  # of a run that was killed
            leftover.unlink()
        yield


def _begin(out: Path, plan: CachePlan) -> CachePlan:
    """The plan of the folder: the one that is there, if it is for the same latents, else this one, now written."""
    if not (out / "latents.json").exists():
        write_plan(out, plan)
        return plan
    found = load_plan(out)
    different = differences(found.fingerprint, asdict(plan.fingerprint) | {"buckets": plan.fingerprint.buckets})
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
    records: dict[int, UnitRecord] = {}
    notes = []
    for unit in range(plan.units):
        if (out / "units" / f"unit-{unit:05d}.json").exists():
            try:
                records[unit] = verify_unit(out, plan, unit)
            except ShardError as error:
                notes.append(f"unit {unit} is made anew: {str(error).split(';')[0]}")
    written = sum(record.written for record in records.values())
    rejected = sum(len(record.rejects) for record in records.values())
    return records, PrepareProgress(plan.images, written, rejected, written + rejected, tuple(notes))


def _write_rejects(path: Path, manifest: Manifest, records: Iterable[UnitRecord]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["source", "path", "reason", "sentence"])
            for record in sorted(records, key=lambda record: record.unit):
                for source, *texts in record.rejects:
                    writer.writerow([_cell(text) for text in (str(manifest.sources[source]), *texts)])

    write_atomically(path, write)


def _cell(text: str) -> str:
    """A spreadsheet runs a cell that begins like a formula; a leading apostrophe makes it text."""
    return ("'" if text[:1] in tuple("=+-@\t\r") else "") + text


# ── A unit ──


class _UnitMaker:
    """Makes one unit at a time: `encode` fills it, `commit` writes it and empties it."""

    def __init__(self, manifest: Manifest, vae: AutoencoderKL, config: PrepareConfig) -> None:
        self.manifest = manifest
        self.vae = vae.eval().requires_grad_(False)
        self.config = config
        self.table: Canvases = bucket_table(config.buckets)
        factor = vae_factor(vae)
        if config.buckets.step % factor:
            raise ConfigError(f"step is {config.buckets.step}; it must be a multiple of {factor}, the VAE's pixels per latent")
        self.sizes: Sizes = picture_sizes(manifest)
        self.assignment: BucketAssignment = assign_buckets(self.sizes, self.table)
        largest = int(self.table.prod(axis=1).max())
        self.batch_size = config.batch_size or max(1, min(_MAX_BATCH, _BATCH_PIXELS // largest))
        self._clear()

    def _clear(self) -> None:
        self.latents: dict[int, Float16[np.ndarray, "c h w"]] = {}
        self.rejects: dict[int, Reject] = {}
        self.geometry: dict[int, Any] = {}

    def fingerprint(self) -> Fingerprint:
        """What the latents will depend on."""
        statistics, buckets = latent_statistics(self.vae), self.config.buckets
        return Fingerprint(
            vae_digest=vae_digest(self.vae),
            vae_factor=vae_factor(self.vae),
            latent_mean=statistics.mean,
            latent_std=statistics.std,
            buckets=tuple((height, width) for height, width in self.table.tolist()),
            max_aspect_error=buckets.max_aspect_error,
            crop=buckets.crop,
            crop_seed=buckets.crop_seed,
            resize=RESIZE_VERSION,
            manifest_digest=self.manifest.digest,
        )
