"""Pictures to latent shards: the manifest's pictures decoded, fitted into their buckets, encoded, committed in units.

Owns the run: what is left to do in the folder, who does it (`executors`), and the end, where the finished folder takes
the place of the one before. The invariant: every picture of the manifest ends up written or rejected with a reason, and
a run that was killed anywhere and started again leaves the same bytes as one that was not; until the end, what was
finished before can be trained on.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from diffusers import AutoencoderKL

from sumizome.data.buckets import Canvases, bucket_table
from sumizome.data.canvas import RESIZE_VERSION
from sumizome.data.latent_plan import (
    DECIDE_NO_LATENT,
    CachePlan,
    Fingerprint,
    differences,
    load_plan,
    plan_path,
    write_plan,
)
from sumizome.data.manifest import ManifestRows
from sumizome.data.reject_table import write_rejects
from sumizome.data.retried import MAY_PASS, Readable, count_readable, rejects_of
from sumizome.data.reuse import Stock, Waste, commit_kept, find_stock, own_units, remove_unused
from sumizome.data.shards import UnitRecord, unit_paths, verify_unit
from sumizome.errors import ConfigError, DataError, ShardError
from sumizome.executors import Executor, LocalExecutor
from sumizome.leases import Leases
from sumizome.models.vae import latent_statistics, vae_digest, vae_factor
from sumizome.prepare_work import Event, PrepareConfig, Work, lease_folder

__all__ = ["PrepareConfig", "PrepareProgress", "check_outside", "prepare_latents"]

_FULL_BELOW = 4 * 2**30
"""Bytes of shards up to which all are hashed before a preparation goes on; above, only their sizes are compared."""


@dataclass(frozen=True)
class PrepareProgress:
    """Where a preparation stands, in pictures. At the end written + rejected = total."""

    total: int
    written: int = 0
    rejected: int = 0
    found: int = 0
    """Of both, those that an earlier run, or another one at the same time, had finished."""
    begun_with: int = 0
    """Latents, in pictures, that were there when this run began."""
    may_pass: int = 0
    """Of the rejected, those whose reason may pass, such as a missing file. Counted at the beginning and the end."""
    vae_seconds: float = 0.0
    """The VAE's own time in this run, of all its workers."""
    notes: tuple[str, ...] = ()
    """Events in plain words: a damaged unit that is made anew."""

    @property
    def done(self) -> int:
        return self.written + self.rejected

    def after(self, event: Event) -> "PrepareProgress":
        return replace(
            self,
            written=self.written + event.written,
            rejected=self.rejected + event.rejected,
            found=self.found + event.by_others,
            vae_seconds=self.vae_seconds + event.vae_seconds,
            notes=(event.note,) if event.note else (),
        )


def prepare_latents(
    manifest: ManifestRows,
    vae: AutoencoderKL,
    out: Path,
    config: PrepareConfig,
    *,
    command: str = "sumizome prepare",
    executor: Executor | None = None,
    retry_rejects: bool = False,
) -> Iterator[PrepareProgress]:
    """Prepares what is not yet prepared in `out`, yielding where it stands after each batch.

    Nothing happens before the first `next`; close the generator to stop. `command` is what an error tells the user to
    run again. `executor` says who works; by default this process. Others may prepare the same in `out` at the same
    time, and share the work.

    `retry_rejects` makes a new generation of finished latents if any picture that they lack, for a reason of its file,
    can be read now. What is there stays; the fingerprint becomes another, because there are more pictures. If none was
    gained in the end, the generation of before stays the finished one.
    Raises: ConfigError if a setting or `out` cannot be. ShardError if `out` was begun with other settings, or is to be
        retried and not finished. DataError if
        the disk cannot be written, if too many pictures of a unit fail, or if none at all is left.
    """
    fingerprint = _fingerprint(manifest, vae, config, bucket_table(config.buckets))
    _check_out(out, manifest.sources)
    plan, stock, notes = _begin(out, manifest, fingerprint, config.unit_size, command, retry_rejects)
    work = Work(manifest, out, plan, stock.missing(len(manifest)), config, _rejected_before(out, plan))
    records, damaged = _survey(work)
    progress = _progress(plan, records, (*notes, *damaged))
    progress = replace(progress, begun_with=progress.written)
    yield progress
    left = [number for number in plan.new_units if number not in records]
    for event in (executor or LocalExecutor()).make(work, vae, left):
        progress = progress.after(event)
        yield progress
    plan, records, told = _finish(work, stock)
    # Counted anew from the records: of several workers, each tells only what it saw.
    counted = _progress(plan, records, told)
    progress = replace(counted, found=progress.found, begun_with=progress.begun_with, vae_seconds=progress.vae_seconds)
    if progress.written == 0:
        raise DataError(
            f"none of the {len(manifest)} pictures could be prepared; {out / 'rejects.csv'} says why of each"
        )
    yield progress


def _fingerprint(manifest: ManifestRows, vae: AutoencoderKL, config: PrepareConfig, table: Canvases) -> Fingerprint:
    """What the latents will depend on.

    Raises: ConfigError if the VAE cannot take the buckets' sides.
    """
    factor, statistics, buckets = vae_factor(vae), latent_statistics(vae), config.buckets
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
        background=manifest.background,
        precision=config.precision,
        crops=config.crops,
        flip=config.flip,
    )


# ── The beginning ──


def check_outside(folder: Path, sources: Iterable[Path], option: str) -> None:
    """Raises: ConfigError if what is to be written lies in a folder of pictures."""
    place = folder.resolve()
    for source in sources:
        if place.is_relative_to(source.resolve()):
            raise ConfigError(
                f"{option} {folder} lies inside the picture folder {source}, which is never written to; give another"
            )


def _check_out(out: Path, sources: Iterable[Path]) -> None:
    check_outside(out, sources, "--out")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    names = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
    if names and not any(plan_path(out, finished=finished).name in names for finished in (True, False)):
        raise ConfigError(f"--out {out} holds other things ({names[0]}); give a new or empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error


def _begin(
    out: Path, manifest: ManifestRows, fingerprint: Fingerprint, unit_size: int, command: str, retry_rejects: bool
) -> tuple[CachePlan, Stock, tuple[str, ...]]:
    """The plan of the folder, what it has of earlier generations, and what a user should be told.

    The plan that is there goes on, if it is for the same; else this one follows it, and takes over what it has.
    """
    with Leases(lease_folder(out)) as leases, leases.holding("plan"):
        plans = [load_plan(out, finished=finished) for finished in (False, True) if _has_plan(out, finished)]
        for plan in plans:
            _check_same(out, plan, fingerprint, unit_size)
        notes: list[str] = []
        if found := _plan_to_go_on(out, plans, manifest, fingerprint):
            plan, stock = found
            if plan != plans[0]:
                _check_alone(out, leases)
            if not retry_rejects or _is_begun_retry(out, plan):
                return plan, stock, (_GOES_ON,) if _before_retry(out, plan) else ()
            readable = _look_again(out, plan, manifest)
            notes = _in_words(readable)
            if not readable.now:
                return plan, stock, tuple(notes)
        if plans:
            _check_alone(out, leases)
        # Of the same manifest there are other latents now: no run may take them for those that it knows.
        retries = max((plan.fingerprint.retries for plan in plans), default=0) + (found is not None)
        fingerprint = replace(fingerprint, retries=retries)
        stock = find_stock(out, fingerprint, manifest, own_units(out), _verify(out))
        plan = CachePlan(fingerprint, len(manifest), unit_size, command, manifest.categories)
        # What is finished stays whole until this is: no number of its units is used again.
        first = max(stock.end, load_plan(out).units if _has_plan(out, finished=True) else 0)
        if first:
            generation = 1 + max(plan.generation for plan in plans)
            plan = replace(plan, generation=generation, kept_units=first, kept_images=len(stock.place))
        _forget_units(out, first)  # before the plan: those of a discarded retry would pass for this one's
        write_plan(out, plan, finished=False)
        if first:
            notes.append(f"{len(stock.place):,} of {len(manifest):,} pictures have their latents already")
        return plan, stock, (*notes, *(f"made anew: {text}" for text in stock.damaged))


def _plan_to_go_on(
    out: Path, plans: Iterable[CachePlan], manifest: ManifestRows, fingerprint: Fingerprint
) -> tuple[CachePlan, Stock] | None:
    """The first of the plans that is for the same, with what it took over, if that is whole."""
    for plan in plans:
        if plan.fingerprint == replace(fingerprint, retries=plan.fingerprint.retries):
            stock = find_stock(out, fingerprint, manifest, range(plan.kept_units), _verify(out))
            if len(stock.place) == plan.kept_images and not stock.damaged:
                return plan, stock
    return None


def _is_begun_retry(out: Path, plan: CachePlan) -> bool:
    """Whether a plan is at work that tries rejected pictures again, to be gone on with.

    Raises: ShardError if it is at work for the first time.
    """
    if not _has_plan(out, finished=False) or load_plan(out, finished=False) != plan:
        return False
    if not _is_finished(out, plan) and _before_retry(out, plan) is None:
        raise ShardError(
            f"{out} is not finished, so nothing is to be tried again yet; run `{plan.command}` to its end, "
            "then once more with --retry-rejects"
        )
    return True


def _before_retry(out: Path, plan: CachePlan) -> CachePlan | None:
    """The finished plan whose rejected pictures this one tries again; None if it does something else."""
    if not _has_plan(out, finished=True):
        return None
    finished, now = load_plan(out), plan.fingerprint
    is_retry = (
        finished.fingerprint.manifest_digest == now.manifest_digest and finished.fingerprint.retries < now.retries
    )
    return finished if is_retry else None


def _look_again(out: Path, plan: CachePlan, manifest: ManifestRows) -> Readable:
    """Of the pictures that the finished plan lacks."""
    whole = find_stock(out, plan.fingerprint, manifest, own_units(out), "size")
    return count_readable(manifest, whole.missing(len(manifest)), rejects_of(out, plan))


_ANOTHER_SET = "the latents are another data set, and a run that trained on them will not go on"
_GOES_ON = f"goes on with rejected pictures that were being tried again: with any that it adds {_ANOTHER_SET}"


def _in_words(found: Readable) -> list[str]:
    if not found.rejected:
        return ["no picture was rejected for a reason that may pass, such as a missing file: nothing is changed"]
    pictures = "rejected picture" if found.rejected == 1 else "rejected pictures"
    away = found.rejected - found.now - found.changed
    notes = []
    if found.now:
        count = f"{found.now:,} of {found.rejected:,}" if found.rejected > 1 else "the one"
        them = "it" if found.now == 1 else "them"
        notes.append(f"{count} {pictures} whose reason may pass can be read now: with {them} {_ANOTHER_SET}")
    elif not found.changed and found.rejected == 1:
        notes.append("the one rejected picture whose reason may pass cannot be read now: nothing is changed")
    elif not found.changed:
        notes.append(f"of {found.rejected:,} {pictures} whose reason may pass none can be read now: nothing is changed")
    else:
        notes.append("no rejected picture can be tried again now: nothing is changed")
        notes += [f"{away:,} {'picture' if away == 1 else 'pictures'} cannot be read"] if away else []
    if found.changed == 1:
        notes.append(f"1 picture is there but no longer the file that was ingested: {_INGEST}")
    elif found.changed:
        notes.append(f"{found.changed:,} pictures are there but no longer the files that were ingested: {_INGEST}")
    return notes


_INGEST = "run `sumizome ingest` again, then prepare"


def _rejected_before(out: Path, plan: CachePlan) -> frozenset[tuple[int, str]]:
    """(source, path) of the pictures that the finished latents of the same manifest lack: that these fail again says
    nothing of a drive."""
    if not _has_plan(out, finished=True):
        return frozenset()
    finished = load_plan(out)
    if finished == plan or finished.fingerprint.manifest_digest != plan.fingerprint.manifest_digest:
        return frozenset()
    return frozenset((reject.source, reject.path) for reject in rejects_of(out, finished))


def _check_alone(out: Path, leases: Leases) -> None:
    """Raises: ShardError while some other process is at work here, for another manifest."""
    if (holder := leases.holder()) is not None:
        raise ShardError(f"{out}: {holder} is preparing here for another manifest; wait for it, or give another --out")


def _forget_units(out: Path, first: int) -> None:
    """Units from `first` on were begun for a manifest whose pictures are gone."""
    for unit in own_units(out):
        if unit >= first:
            unit_paths(out, unit)[-1].unlink()


def _has_plan(out: Path, finished: bool) -> bool:
    return plan_path(out, finished=finished).exists()


def _check_same(out: Path, found: CachePlan, fingerprint: Fingerprint, unit_size: int) -> None:
    """Raises: ShardError if the folder's latents are others than are wanted now; a manifest alone makes none others."""
    expected = {name: value for name, value in asdict(fingerprint).items() if name not in DECIDE_NO_LATENT}
    different = differences(found.fingerprint, expected)
    if found.unit_size != unit_size:
        different.append("unit_size")
    if different:
        raise ShardError(
            f"{out} was begun with another {', another '.join(different)}; give another --out, delete this one, "
            f"or finish it as it was begun: `{found.command}`"
        )


def _verify(out: Path) -> Literal["full", "size"]:
    stored = sum(path.stat().st_size for path in (out / "units").glob("unit-*.safetensors"))
    return "full" if stored <= _FULL_BELOW else "size"


def _survey(work: Work) -> tuple[dict[int, UnitRecord], list[str]]:
    """The new units that are finished and whole, and those that are damaged, in words; these are made anew."""
    out, plan = work.out, work.plan
    verify = _verify(out)

    def look(number: int) -> UnitRecord | ShardError:
        try:
            return verify_unit(out, plan, number, verify)
        except ShardError as error:
            return error

    begun = [number for number in plan.new_units if work.is_done(number)]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(begun, pool.map(look, begun), strict=True))
    damaged = {number: error for number, error in found.items() if isinstance(error, ShardError)}
    for number in damaged:
        *_, record = unit_paths(out, number)
        record.unlink(missing_ok=True)  # else whoever looks at sizes alone would take it for finished
    records = {number: record for number, record in found.items() if isinstance(record, UnitRecord)}
    return records, [f"made anew: {str(error).split(';')[0]}" for error in damaged.values()]


def _progress(plan: CachePlan, records: dict[int, UnitRecord], notes: tuple[str, ...]) -> PrepareProgress:
    written = plan.kept_images + sum(record.written for record in records.values())
    rejected = sum(len(record.rejects) for record in records.values())
    may_pass = sum(reject.reason in MAY_PASS for record in records.values() for reject in record.rejects)
    return PrepareProgress(plan.images, written, rejected, written + rejected, may_pass=may_pass, notes=notes)


# ── The end ──


def _finish(work: Work, stock: Stock) -> tuple[CachePlan, dict[int, UnitRecord], tuple[str, ...]]:
    """Puts the finished generation in the place of the one before: its plan, its records, what a user should be told.

    A retry that gained no picture is discarded: those are the plan and the records of before, which stay.
    """
    out, plan = work.out, work.plan
    with Leases(lease_folder(out)) as leases, leases.holding("plan"):
        discarded = _discard_if_vain(out, plan)
        if discarded is None:
            commit_kept(out, plan, stock, work.manifest)
        else:
            plan = discarded
        records = {number: verify_unit(out, plan, number, "size") for number in plan.new_units}
        rejects = (each for _, record in sorted(records.items()) for each in record.rejects)
        write_rejects(out / "rejects.csv", rejects, work.manifest.sources)
        leases.remove_dead()
        if discarded is not None:
            return plan, records, (_IN_VAIN,)
        if not _is_finished(out, plan):
            write_plan(out, plan)
        plan_path(out, finished=False).unlink(missing_ok=True)
        return plan, records, _told(remove_unused(out, plan))


_IN_VAIN = (
    "none of the rejected pictures could be read and encoded in the end: the latents stay as they were; "
    "try again with --retry-rejects once the files are there"
)


def _discard_if_vain(out: Path, plan: CachePlan) -> CachePlan | None:
    """Discards a retry whose units hold no latent; returns the finished plan, which stays. None if it is none such.

    Its units are left: whoever shares this work still looks for them, and the next preparation removes them.
    """
    if (before := _before_retry(out, plan)) is None:
        return None
    at_work = _has_plan(out, finished=False) and load_plan(out, finished=False) == plan
    if at_work:  # else somebody who shares it was here before
        if any(verify_unit(out, plan, number, "size").written for number in plan.new_units):
            return None
        plan_path(out, finished=False).unlink()
    return before


def _told(waste: Waste) -> tuple[str, ...]:
    if not waste.latents:
        return ()
    size = f"{waste.bytes / 1e6:,.0f} MB"
    return (f"latents of pictures that are gone, still in their units: {waste.latents:,} ({size})",)


def _is_finished(out: Path, plan: CachePlan) -> bool:
    return _has_plan(out, True) and load_plan(out) == plan
