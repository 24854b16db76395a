"""Encode the manifest's pictures into latent shards, by aspect-ratio bucket.

Each picture is resized to cover the nearest of the buckets, cropped, and encoded by the model's VAE, once; training
reads only what is written here. Stopped or killed, the same command goes on where it was. Run for a manifest that has
changed, it encodes only the pictures that are new; with --retry-rejects, those that could not be read before. Run
several times at once, on machines that share the folder, under torchrun or on Ray, it shares the work.
"""

import contextlib
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console

    from sumizome.data.buckets import BucketReport
    from sumizome.data.store import Store
    from sumizome.executors import Executor
    from sumizome.prepare import PrepareProgress

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """Encode the manifest's pictures into latent shards, by aspect-ratio bucket."""

    manifest: Positional[Path]
    """the .parquet file that `sumizome ingest` wrote"""
    model: Path
    """whose VAE encodes: a diffusers SDXL folder or a single safetensors file"""
    out: Path
    """folder of the latents, outside the picture folders, or s3://bucket/prefix; one that was begun is gone on with"""
    staging: Path | None = None
    """with an s3:// address: folder of this machine where units are made before they go there, with room for all of
    them; by default below ~/.cache/sumizome"""
    area: int | tuple[int, int] = 1024
    """most pixels of a canvas: the side of a square, or height and width; SDXL was trained at 1024²"""
    areas: tuple[int, ...] = ()
    """area classes in place of --area, such as 512 768 1024: a picture goes to the largest it fills, not enlarged"""
    step: int = 64
    """sides are multiples of this, px; 16 for a tiny model"""
    min_side: int = 0
    """shortest side, px; 0 = half of √area"""
    max_side: int = 0
    """longest side, px; 0 = twice √area"""
    max_aspect_error: float = 4.0
    """pictures whose long/short side is this far from the nearest bucket's are rejected; 4 as in the report"""
    crop: Literal["random", "center"] = "random"
    """what is cut off where a picture overhangs its canvas: a random part, seeded by picture, or both sides alike"""
    crop_seed: int = 0
    """seed of the random crops"""
    crops: int = 1
    """random crops stored of each picture; each epoch shows one of them"""
    flip: bool = False
    """store each crop mirrored, too; not for pictures or tags that tell left from right"""
    unit_size: int = 2048
    """pictures committed together"""
    batch_size: int = 0
    """canvases encoded at once; 0 = four megapixels' worth"""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the VAE's arithmetic; SDXL's own VAE overflows in float16"""
    decode_threads: int = 0
    """threads that decode pictures, in each process; 0 = one a core"""
    device: str = "auto"
    """auto takes all CUDA devices there are, else the CPU; or as torch names it: cpu, cuda, cuda:1"""
    workers: int = 0
    """processes on this machine, each with the VAE; 0 = one a CUDA device, one on a CPU"""
    executor: Literal["auto", "local", "torchrun", "ray"] = "auto"
    """who works; auto = torchrun's ranks where it started this, else this machine"""
    retry_rejects: bool = False
    """encode rejected pictures of finished latents whose files can be read by now; if there are any, the latents are
    another data set, and a run that trained on them will not go on"""
    address: str | None = None
    """of the Ray cluster: host:port, or auto for this machine's; none = one of this command alone, on loopback"""


def run(command: Command) -> None:
    """Prepares the latents; prints the buckets first, and at the end what was written and what was not."""
    from rich.console import Console

    from sumizome.data.buckets import BucketConfig, bucket_report, bucket_table
    from sumizome.data.manifest import picture_sizes
    from sumizome.data.store import as_address
    from sumizome.data.stored_manifest import open_manifest

    # Before the slow imports: a wrong path is told at once.
    manifest = open_manifest(command.manifest, ["height", "width"])
    store = _store(command)
    buckets = BucketConfig(**{field.name: getattr(command, field.name) for field in fields(BucketConfig)})
    table = bucket_table(buckets)

    from sumizome.device import choose_device
    from sumizome.executors import LocalExecutor
    from sumizome.models.sdxl import load_model
    from sumizome.prepare import PrepareConfig, prepare_latents
    from sumizome.prepare_store import prepared_to_store

    with _executor(command) as (executor, device, speaks):
        console = Console(quiet=not speaks)
        _print_buckets(console, bucket_report(picture_sizes(manifest), table, buckets.max_aspect_error))
        vae = load_model(command.model, components=("vae",), device=choose_device(device)).vae
        names = {field.name for field in fields(PrepareConfig)} & {field.name for field in fields(Command)}
        config = PrepareConfig(buckets, **{name: getattr(command, name) for name in names})
        folder = command.out if store is None else command.staging or _staging(store.address)
        steps = prepare_latents(
            manifest,
            vae,
            folder,
            config,
            command=as_shell(command),
            executor=executor,
            retry_rejects=command.retry_rejects,
        )
        if store is not None:
            steps = prepared_to_store(steps, folder, store, manifest.sources)
        workers = len(executor.devices) if isinstance(executor, LocalExecutor) else 0
        last = _watch(steps, console, max(1, workers), shows=speaks)
    variants = config.crops * (2 if config.flip else 1)
    out = as_address(command.out)
    latents = _counted(last.written * variants, "latent")
    # What was there before, and nothing else, was not written now.
    summary = f"wrote {latents} to {out}" if last.written > last.begun_with else f"{out} holds {latents}"
    if variants > 1:
        summary += f", {variants} of {'its 1 picture' if last.written == 1 else f'each of {last.written:,} pictures'}"
    if last.rejected:
        summary += f"; {_counted(last.rejected, 'picture')} rejected, see {out}/rejects.csv"
    if last.may_pass and not command.retry_rejects:
        them = "it" if last.may_pass == 1 else "them"
        summary += f"; {last.may_pass:,} for a reason that may pass: --retry-rejects tries {them} again"
    console.print(summary, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _executor(command: Command) -> "Iterator[tuple[Executor, str, bool]]":
    """(who works, this process's own device, whether it is the one that speaks)."""
    from sumizome.executor_ray import RayExecutor
    from sumizome.executor_torchrun import is_under_torchrun, local_device, torchrun_ranks
    from sumizome.executors import LocalExecutor, local_devices

    if command.executor == "ray":
        yield RayExecutor(command.address, command.device), "cpu", True
    elif command.executor == "torchrun" or (command.executor == "auto" and is_under_torchrun()):
        with torchrun_ranks() as ranks:
            yield ranks, local_device(command.device), ranks.rank == 0
    else:
        devices = local_devices(command.device, command.workers)
        yield LocalExecutor(devices), "cpu" if len(devices) > 1 else devices[0], True


def _store(command: Command) -> "Store | None":
    """The store that `--out` is the address of; None for a folder."""
    import os

    from sumizome.data.store import is_remote, open_store
    from sumizome.errors import ConfigError

    if not is_remote(command.out):
        if command.staging is not None:
            raise ConfigError(f"--staging is for an --out in a store; {command.out} is a folder, leave it out")
        return None
    if command.executor in ("torchrun", "ray") or "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "--out s3://… is written by one machine; with torchrun or Ray give a shared folder, and copy it: "
            "`rclone copy FOLDER :s3:bucket/prefix --s3-env-auth`"
        )
    return open_store(command.out)


def _staging(address: str) -> Path:
    """Where units for a store are made, unless told otherwise: a folder for each address."""
    import hashlib

    from sumizome.data.index_cache import default_folder

    return default_folder().parent / "prepare" / hashlib.sha256(address.encode()).hexdigest()[:16]


_LEAVE_NO_TRACE = ("manifest", "staging", "decode_threads", "workers", "executor", "address", "retry_rejects")
"""What does not change the latents, and so is not part of the command that makes them."""


def as_shell(command: Command) -> str:
    """The command line that makes the same, settings at their default left out."""
    from sumizome.data.store import as_address

    words = ["sumizome", "prepare", str(command.manifest)]
    for field in fields(Command):
        value = getattr(command, field.name)
        if field.name not in _LEAVE_NO_TRACE and value != field.default:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            values = tuple(as_address(each) if isinstance(each, Path) else each for each in values)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def _print_buckets(console: "Console", report: "BucketReport") -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("bucket (height × width)", "pictures", "cut off", "aspect error", "enlarged"):
        table.add_column(name, justify="left" if name.startswith("bucket") else "right")
    rows = zip(
        report.table.tolist(), report.count, report.crop_share, report.aspect_error, report.upscaled, strict=True
    )
    for (height, width), count, share, error, upscaled in rows:
        if count:
            table.add_row(f"{height} × {width}", f"{count:,}", f"{share:.1%}", f"{error:.3f}", f"{upscaled:,}")
    share, error = report.mean(report.crop_share), report.mean(report.aspect_error)
    table.add_row("all", f"{report.count.sum():,}", f"{share:.1%}", f"{error:.3f}", f"{report.upscaled.sum():,}")
    console.print(table)
    if report.rejected:
        console.print(f"too far from every bucket, and rejected: {report.rejected:,}")


def _watch(steps: "Iterable[PrepareProgress]", console: "Console", workers: int, *, shows: bool) -> "PrepareProgress":
    """Draws the progress, on a terminal as a bar, elsewhere as a line now and then; returns the last of it."""
    from time import monotonic

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    terminal = Console(stderr=True, quiet=not shows)
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    started = spoken = monotonic()
    with Progress(*columns, console=terminal, transient=True, disable=not (shows and terminal.is_terminal)) as bar:
        task = bar.add_task("encoding", total=None, told="")
        for step in steps:
            for note in step.notes:
                console.print(note, markup=False, highlight=False, soft_wrap=True)
            seconds = monotonic() - started
            told = _told(step, seconds)
            bar.update(task, completed=step.done, total=step.total, told=told)
            if not terminal.is_terminal and monotonic() - spoken > _LINE_SECONDS:
                spoken = monotonic()
                terminal.print(f"{step.done:,} of {step.total:,} pictures, {told}", highlight=False, soft_wrap=True)
    if step.found:
        console.print(_found(step), markup=False, highlight=False, soft_wrap=True)
    if step.vae_seconds:
        share = step.vae_seconds / workers / max(seconds, 1e-9)
        console.print(
            f"{_rate(step, seconds):.1f} images/s; the VAE was at work {share:.0%} of the time", highlight=False
        )
    return step


_LINE_SECONDS = 30.0


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _found(step: "PrepareProgress") -> str:
    """What this run did not have to do."""
    of = f"{step.found:,} of them" if step.total > 1 else "it"
    rejects = ", rejected ones counted" if step.total > 1 and step.rejected else ""
    return f"{_counted(step.total, 'picture')}: {of} had been prepared before, or by others{rejects}"


def _rate(step: "PrepareProgress", seconds: float) -> float:
    return (step.done - step.found) / max(seconds, 1e-9)


def _told(step: "PrepareProgress", seconds: float) -> str:
    """Speed, rejects, time left: from what this run has made."""
    from datetime import timedelta

    rate = _rate(step, seconds)
    left = f"{timedelta(seconds=int((step.total - step.done) / rate))} left" if rate > 0 else "…"
    return f"{rate:.1f} images/s, {step.rejected:,} rejected, {left}"
