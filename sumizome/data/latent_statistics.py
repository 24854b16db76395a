"""The mean and deviation of each latent channel: measured over shards, known ones by name, chosen for a run.

Owns the measurement (float64 sums over every number of every latent, one unit in memory), the table of presets with
their sources, and the setting that a run records. What is done with them is `models.vae`'s.

Notation: z raw VAE latents [n, c, h, w]; mean μ = E[z], std s = √(E[z²] − E[z]²); normalised z' = (z − μ)/s.
Source: report, appendix B.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from sumizome.data.latents import LatentCache
from sumizome.errors import ConfigError

__all__ = [
    "LATENT_PRESETS",
    "LatentMoments",
    "LatentPreset",
    "LatentReport",
    "LatentStatisticsConfig",
    "measure_latents",
    "stated_statistics",
]

_Pair: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
_AT_ONCE = 64
"""Latents read together: 34 MB of float64 at 128 × 128."""


# --- presets and the setting -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentPreset:
    """Published statistics of SDXL's VAE."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


LATENT_PRESETS: Mapping[str, LatentPreset] = {
    "sdxl": LatentPreset((0.0,) * 4, (1 / 0.13025,) * 4, "SDXL 2307.01952: one scaling factor of 0.13025"),
    "novelai_v3": LatentPreset(
        (4.8119, 0.1607, 1.3538, -1.7753),
        (9.9181, 6.2753, 7.5978, 5.9956),
        "report 2409.15997, appendix B: illustrations",
    ),
    "playground_v2.5": LatentPreset(
        (-1.6574, 1.886, -1.383, 2.5155),
        (16.9854, 11.8044, 13.0996, 10.4598),
        "Playground v2.5's VAE config: latents_std over its scaling factor of 0.5",
    ),
}


@dataclass(frozen=True)
class LatentStatisticsConfig:
    """The statistics that make latents unit-sized, where not those of the model's VAE config."""

    preset: Literal["sdxl", "novelai_v3", "playground_v2.5"] | None = None
    """Published ones, by name."""
    mean: tuple[float, ...] | None = None
    """Of each raw latent channel, as `sumizome latents stats` prints them; with `std`."""
    std: tuple[float, ...] | None = None
    """Deviation of each raw latent channel."""

    def __post_init__(self) -> None:
        if self.preset is not None and (self.mean is not None or self.std is not None):
            raise ConfigError("latent_statistics: give preset, or mean and std, not both")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("latent_statistics: mean and std belong together; `sumizome latents stats` prints both")
        mean, std = self.mean or (), self.std or ()
        if self.mean is not None and not (len(mean) == len(std) and np.isfinite(mean + std).all() and min(std) > 0):
            raise ConfigError(
                "latent_statistics: mean and std need a finite number for each channel, std above 0; found "
                f"{list(mean)} and {list(std)}"
            )


def stated_statistics(config: LatentStatisticsConfig) -> _Pair | None:
    """(mean, std) of raw latents that a setting states; None: those of the VAE's config."""
    if config.preset is not None:
        return LATENT_PRESETS[config.preset].mean, LATENT_PRESETS[config.preset].std
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    return None


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class LatentMoments:
    """Σz and Σz² of each channel over some latents, float64, and how many numbers and pictures went in."""

    sums: Float[np.ndarray, " c"]
    squares: Float[np.ndarray, " c"]
    numbers: int = 0
    """In each channel."""
    pictures: int = 0

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple((self.sums / self.numbers).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        variance = self.squares / self.numbers - (self.sums / self.numbers) ** 2
        return tuple(np.sqrt(np.maximum(variance, 0.0)).tolist())

    def add(self, sums: Float[np.ndarray, " c"], squares: Float[np.ndarray, " c"], numbers: int, pictures: int) -> None:
        self.sums += sums
        self.squares += squares
        self.numbers += numbers
        self.pictures += pictures


@dataclass
class LatentReport:
    """What was measured: of all latents, and of each group that was asked for."""

    whole: LatentMoments
    groups: dict[str, LatentMoments] = field(default_factory=dict)


def measure_latents(
    cache: LatentCache, by: Literal["nothing", "bucket", "tag"] = "nothing"
) -> Iterator[tuple[int, LatentReport]]:
    """Reads every latent once, each checked against its CRC-32; yields (latents read, report so far).

    Each stored picture counts once, each of its numbers alike: a large bucket weighs as many pixels as it has.
    Raises: ShardError naming a latent that is damaged.
    """
    channels = len(cache.fingerprint.latent_mean)

    def nothing() -> LatentMoments:
        return LatentMoments(np.zeros(channels), np.zeros(channels))

    report = LatentReport(nothing(), defaultdict(nothing))
    done = 0
    for rows in _pieces(cache):
        latents = cache.read(rows).numpy().astype(np.float64)
        sums, squares = latents.sum(axis=(2, 3)), np.square(latents).sum(axis=(2, 3))
        size = latents.shape[2] * latents.shape[3]
        report.whole.add(sums.sum(axis=0), squares.sum(axis=0), size * len(rows), len(rows))
        if by == "bucket":
            height, width = cache.buckets[cache.index.bucket[rows[0]]].tolist()
            group = report.groups[f"{height}x{width}"]
            group.add(sums.sum(axis=0), squares.sum(axis=0), size * len(rows), len(rows))
        elif by == "tag":
            for tags, own_sums, own_squares in zip(cache.index.tag_lists(rows), sums, squares, strict=True):
                for tag in set(tags):
                    report.groups[tag].add(own_sums, own_squares, size, 1)
        done += len(rows)
        yield done, report


def _pieces(cache: LatentCache) -> Iterator[Int[np.ndarray, " b"]]:
    """All rows, a few at a time: unit by unit, so that each file is read through once, and bucket by bucket in it."""
    order = np.lexsort((cache.index.row, cache.index.bucket, cache.index.unit))
    changes = np.flatnonzero(np.diff(cache.index.unit[order]) | np.diff(cache.index.bucket[order])) + 1
    for group in np.split(order, changes):
        yield from np.split(group, range(_AT_ONCE, len(group), _AT_ONCE))
