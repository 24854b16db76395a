"""Encode the manifest's pictures into latent shards, by aspect-ratio bucket.

Each picture is resized to cover the nearest of the buckets, cropped, and encoded by the model's VAE, once; training
reads only what is written here. Stopped or killed, the same command goes on where it was.
"""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from sumizome.data.buckets import BucketReport
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
    """folder of the latents, outside the picture folders; one that was begun is gone on with"""
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
    batch_size: int = 0
    """pictures encoded at once; 0 = four megapixels' worth"""
    decode_threads: int = 0
    """threads that decode pictures; 0 = one a core"""
    device: str = "auto"
    """auto takes a CUDA device when there is one; else as torch names it: cpu, cuda, cuda:1"""


def run(command: Command) -> None:
    """Prepares the latents; prints the buckets first, and at the end what was written and what was not."""
    from rich.console import Console

    from sumizome.data.buckets import BucketConfig, bucket_report, bucket_table
    from sumizome.data.manifest import load_manifest

    manifest = load_manifest(command.manifest)  # before the slow imports: a wrong path is told at once
    buckets = BucketConfig(**{field.name: getattr(command, field.name) for field in fields(BucketConfig)})
    table = bucket_table(buckets)

    from sumizome.device import choose_device
    from sumizome.models.sdxl import load_model
    from sumizome.prepare import PrepareConfig, prepare_latents
    from sumizome.prepare_unit import picture_sizes

    console = Console()
    _print_buckets(console, bucket_report(picture_sizes(manifest.table), table, buckets.max_aspect_error))
    vae = load_model(command.model, components=("vae",), device=choose_device(command.device)).vae
    assert vae is not None  # it was asked for
    config = PrepareConfig(buckets, batch_size=command.batch_size, decode_threads=command.decode_threads)
    last = _watch(prepare_latents(manifest, vae, command.out, config, command=as_shell(command)), console)
    summary = f"wrote {last.written:,} latents to {command.out}"
    if last.rejected:
        summary += f"; {last.rejected:,} pictures rejected, see {command.out / 'rejects.csv'}"
    console.print(summary, markup=False, highlight=False, soft_wrap=True)


def as_shell(command: Command) -> str:
    """The command line that says the same, settings at their default left out."""
    words = ["sumizome", "prepare", str(command.manifest)]
    for field in fields(Command):
        value = getattr(command, field.name)
        if field.name != "manifest" and value != field.default:
            values = value if isinstance(value, tuple) else (value,)
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


def _watch(steps: "Iterable[PrepareProgress]", console: "Console") -> "PrepareProgress":
    """Draws the progress, and returns the last of it."""
    from time import monotonic

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} images/s, {task.fields[rejected]} rejected,")
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        MofNCompleteColumn(),
        rate,
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    started = monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("encoding", total=None, rate=0.0, rejected=0)
        for step in steps:
            for note in step.notes:
                console.print(note, markup=False, highlight=False, soft_wrap=True)
            made = (step.done - step.found) / max(monotonic() - started, 1e-9)
            bar.update(task, completed=step.done, total=step.total, rate=made, rejected=step.rejected)
    if step.found:
        console.print(f"{step.found:,} of them had been prepared before", markup=False, highlight=False)
    return step
