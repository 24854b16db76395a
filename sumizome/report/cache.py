"""What a folder of prepared latents holds: how much of it, of which statistics, what was left out, what lies about.

Owns the figures of the page's last section. Reads through `LatentCache`, so what it shows was verified; damage is an
item of the page, not the end of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sumizome.data.latent_plan import CachePlan, load_plan
from sumizome.data.latents import LatentCache, open_latents
from sumizome.data.reject_table import RejectLine
from sumizome.data.shards import UnitRecord, unit_paths, verify_unit
from sumizome.errors import ShardError
from sumizome.report.left_out import Reason, by_reason

__all__ = ["Cache", "ChannelRow", "describe_cache"]

_SAMPLE = 512
"""latents whose numbers are read"""


@dataclass(frozen=True)
class ChannelRow:
    """One channel of the sampled latents."""

    mean: float
    """raw, as the VAE gave them"""
    std: float
    assumed_mean: float
    """what training subtracts"""
    assumed_std: float
    """what training divides by"""

    @property
    def trained_mean(self) -> float:
        """as training sees it: 0 is meant"""
        return (self.mean - self.assumed_mean) / self.assumed_std

    @property
    def trained_std(self) -> float:
        """as training sees it: 1 is meant"""
        return self.std / self.assumed_std


@dataclass(frozen=True)
class Cache:
    """A latent folder."""

    folder: str
    plan: CachePlan
    of_this_manifest: bool
    other_vae: bool
    """the model that was named has another VAE"""
    written: int
    units: int
    """that are whole"""
    damages: list[str]
    rejects: list[Reason]
    bytes: int
    """of shards and indexes"""
    stray_bytes: int
    """of files below the folder that belong to no unit: what a killed run left, foreign files"""
    sampled: int
    channels: list[ChannelRow]

    @property
    def missing(self) -> int:
        """pictures of the plan that are neither written nor rejected"""
        return self.plan.images - self.written - sum(reason.count for reason in self.rejects)


def describe_cache(root: Path, sources: tuple[Path, ...], digest: str, vae_digest: str | None) -> Cache:
    """The folder at `root`; `digest` is the manifest's, `vae_digest` of the model that was named, if any.

    Raises: ShardError if there is no latent folder, or its plan is damaged.
    """
    plan = load_plan(root)
    records, damages = _survey(root, plan)
    lines = (
        RejectLine(str(sources[source]) if source < len(sources) else "", *texts)
        for record in records
        for source, *texts in record.rejects
    )
    # Of a unit of an earlier generation both indexes stay: its own, and the one that says what of it is used now.
    known = {
        path for unit in range(plan.units) for each in (0, plan.overlay(unit)) for path in unit_paths(root, unit, each)
    }
    known |= {root / "latents.json", root / "rejects.csv", root / ".lock"}
    sampled, channels = 0, list[ChannelRow]()
    if len(records) == plan.units and not damages:
        try:
            sampled, channels = _channels(open_latents(root, verify="size"))
        except ShardError as error:
            damages.append(str(error))
    return Cache(
        folder=str(root),
        plan=plan,
        of_this_manifest=plan.fingerprint.manifest_digest == digest,
        other_vae=vae_digest is not None and plan.fingerprint.vae_digest != vae_digest,
        written=sum(record.written for record in records),
        units=len(records),
        damages=damages,
        rejects=by_reason(lines),
        bytes=sum(int(file["bytes"]) for record in records for file in record.files.values()),
        stray_bytes=sum(path.stat().st_size for path in _files(root) if path not in known),
        sampled=sampled,
        channels=channels,
    )


def _survey(root: Path, plan: CachePlan) -> tuple[list[UnitRecord], list[str]]:
    """The records of units whose files have their sizes, and what is wrong with the others that were begun."""
    records, damages = [], []
    for unit in range(plan.units):
        if not unit_paths(root, unit, plan.overlay(unit))[-1].exists():
            continue
        try:
            records.append(verify_unit(root, plan, unit, "size"))
        except ShardError as error:
            damages.append(str(error))
    return records, damages


def _files(root: Path) -> Iterable[Path]:
    return (path for path in root.rglob("*") if path.is_file())


def _channels(cache: LatentCache) -> tuple[int, list[ChannelRow]]:
    """(latents read, mean and standard deviation of each channel over all their places)."""
    rows = np.random.default_rng(0).permutation(len(cache))[:_SAMPLE]
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for bucket in np.unique(cache.index.bucket[rows]).tolist():
        latents = cache.read(np.sort(rows[cache.index.bucket[rows] == bucket])).double()
        count += latents[:, 0].numel()
        total = total + latents.sum(dim=(0, 2, 3)).numpy()
        squares = squares + latents.square().sum(dim=(0, 2, 3)).numpy()
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0.0)
    assumed = cache.fingerprint.latent_mean, cache.fingerprint.latent_std
    columns = zip(mean.tolist(), np.sqrt(variance).tolist(), *assumed, strict=True)
    return len(rows), [ChannelRow(*row) for row in columns]
