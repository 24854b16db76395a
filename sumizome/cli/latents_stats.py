"""Measure the mean and deviation of each latent channel over prepared latents, as TOML that training takes.

    sumizome latents stats work/latents > stats.toml
    sumizome train run.toml stats.toml
    sumizome latents stats work/latents --by tag --top 20

Exact: float64 sums over every number of every latent, each picture once, each latent checked against its CRC. The
report's appendix B recommends latents of mean 0 and deviation 1 in each channel; what that costs in other programs is
said in docs/guide/latents.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from sumizome.data.latent_statistics import LatentMoments, LatentReport

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome latents stats` takes."""

    latents: Annotated[Path, tyro.conf.Positional]
    """Latent shards, as `sumizome prepare` wrote them."""
    by: Literal["nothing", "bucket", "tag"] = "nothing"
    """Also measure each bucket, or each tag, alone: printed as comments below."""
    top: int = 30
    """Groups printed, those with the most pictures first."""


def run(command: Command) -> None:
    """Prints TOML to standard output, progress to standard error.

    Raises:
        ShardError: latents that are missing, unfinished or damaged.
    """
    from sumizome.data.latent_statistics import measure_latents
    from sumizome.data.latents import open_latents
    from sumizome.errors import ShardError

    cache = open_latents(command.latents, verify="size")  # every latent's own CRC is checked as it is read
    report = None
    for done, measured in measure_latents(cache, command.by):
        report = measured
        if sys.stderr.isatty():
            print(f"\r{done:,} of {len(cache):,} latents", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if report is None:
        raise ShardError(f"{command.latents} holds no latents; run `sumizome prepare` on pictures that can be read")
    print("\n".join(_lines(report, command)))


def _lines(report: "LatentReport", command: Command) -> list[str]:
    from sumizome.data.latent_statistics import LATENT_PRESETS

    whole = report.whole
    lines = [
        f"# {whole.pictures:,} pictures, {whole.numbers:,} numbers in each channel",
        "[latent_statistics]",
        f"mean = {_numbers(whole.mean)}",
        f"std = {_numbers(whole.std)}",
        "",
        "# for comparison, as `latent_statistics.preset`",
    ]
    for name, preset in LATENT_PRESETS.items():
        lines.append(f"# {name:<16} {_numbers(preset.mean)}  {_numbers(preset.std)}  {preset.source}")
    if command.by != "nothing":
        groups = sorted(report.groups.items(), key=lambda item: (-item[1].pictures, item[0]))
        lines += ["", f"# by {command.by}: {len(groups):,}", f"# {'pictures':>9}  {'mean':<36}  {'std':<36}"]
        lines += [_row(name, moments) for name, moments in groups[: command.top]]
        if len(groups) > command.top:
            lines.append(f"# and {len(groups) - command.top:,} more (--top)")
    return lines


def _row(name: str, moments: "LatentMoments") -> str:
    plain = "".join(character if character.isprintable() else " " for character in name)
    return f"# {moments.pictures:>9,}  {_numbers(moments.mean):<36}  {_numbers(moments.std):<36}  {plain}"


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"
