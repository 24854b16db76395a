"""From pictures to what a step of decoder training sees: micro-batches of crops with weights and seeds.

The order is `data.batch_plan`'s, as for latents. The invariant is the same: the micro-batches of a step are a function
of (pictures, settings, seed, step), the same bits in a new process and on any number of ranks.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sumizome.data.batch_plan import BatchPlan, MicroBatch, check_world
from sumizome.data.loader import Prepare, StepBatches, split_validation
from sumizome.data.tags import GENERAL
from sumizome.errors import ConfigError
from sumizome.seeds import derive_seed
from sumizome.shapes import Latents, PerSample, Pixels
from sumizome.vae.crops import CropConfig, balanced_repeats, choose_corner, middle
from sumizome.vae.picture_source import PictureSource, Shown
from sumizome.vae.regions import RegionConfig, tag_weight

__all__ = ["HELD_OUT_AT_MOST", "CropBatch", "CropLoader", "build_crop_loader", "to_pixels"]

HELD_OUT_AT_MOST = 20
"""One picture in so many is held out at most, however small the set: as in U-Net training."""


@dataclass(frozen=True, eq=False)
class CropBatch:
    """One micro-batch of crops of one size."""

    pixels: Pixels
    region: Float[Tensor, "b 1 H W"]
    """What each pixel's error weighs."""
    weight: PerSample
    """What each sample weighs."""
    latents: Latents | None
    """Raw, where they were cached; else the encoder makes them."""
    corners: list[tuple[int, int]]
    """(top, left), px."""
    sample_ids: list[str]
    epochs: list[int]
    seeds: Int[Tensor, " b"]
    tag_categories: list[Collection[str]]


def to_pixels(picture: np.ndarray) -> Float[Tensor, "3 H W"]:
    """uint8 [H, W, 3] as [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class CropLoader:
    """The micro-batches of any step, and the held-out pictures."""

    source: PictureSource
    plan: BatchPlan
    validation_rows: Int[np.ndarray, " v"]
    too_small: int
    """Pictures that are left out because a side is shorter than a crop's."""
    crops: CropConfig
    regions: RegionConfig
    categories: Mapping[str, str]
    factor: int
    """Pixels per latent along one side."""
    seed: int
    workers: int = 1
    rank: int = 0
    world: int = 1

    def take_faults(self) -> list[str]:
        """What was made good in reading cached latents."""
        return [] if self.source.cache is None else self.source.cache.shards.take_faults()

    def from_step(self, step: int, prepare: Prepare | None = None) -> StepBatches:
        """As a `data.loader.BatchLoader`'s."""
        # Each thread decodes a step, and goes on when half of what is ahead was taken: none waits for another's.
        return StepBatches(self.step, step, 2 * self.workers, self.workers, prepare)

    def step(self, step: int) -> list[CropBatch]:
        """This process's micro-batches of one step, counted from 0. Raises: DataError naming a picture at fault."""
        return [self._batch(planned) for planned in self.plan.step(step, self.rank, self.world)]

    def validation_crops(self, side: int, count: int) -> Iterator[CropBatch]:
        """The middles of the first `count` held-out pictures (of 16 px or more), one a batch, at most `side` px."""
        for row in self.validation_rows[:count].tolist():
            shown = self.source.read(row)
            height, width = (min(int(length), side) // 16 * 16 for length in shown.pixels.shape[:2])
            if not (height and width):
                continue
            size = (height, width)
            corner = middle(shown.pixels.shape[:2], size, max(8, self.factor))
            yield self._assemble([row], [shown], [corner], size, [0], [derive_seed("validation", self.source.id(row))])

    def _batch(self, planned: MicroBatch) -> CropBatch:
        rows, epochs = planned.rows.tolist(), planned.epochs.tolist()
        showings = zip(rows, epochs, planned.repeats.tolist(), strict=True)
        seeds = [
            derive_seed(self.seed, "sample", epoch, self.source.id(row), repeat) for row, epoch, repeat in showings
        ]
        shown = [self.source.read(row) for row in rows]
        size = (self.crops.side, self.crops.side) if self.crops.side else shown[0].pixels.shape[:2]
        corners = [self._corner(picture, seed) for picture, seed in zip(shown, seeds, strict=True)]
        return self._assemble(rows, shown, corners, (int(size[0]), int(size[1])), epochs, seeds)

    def _corner(self, shown: Shown, seed: int) -> tuple[int, int]:
        if not self.crops.side:
            return 0, 0
        align = self.crops.align if shown.latents is None else int(np.lcm(self.crops.align, self.factor))
        region = None if shown.mask is None else self._region(shown.mask)
        return choose_corner(shown.pixels, region, self.crops.side, self.crops, align, seed)

    def _region(self, mask: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
        return 1 + (self.regions.mask_weight - 1) * mask

    def _assemble(
        self,
        rows: list[int],
        shown: list[Shown],
        corners: list[tuple[int, int]],
        size: tuple[int, int],
        epochs: list[int],
        seeds: list[int],
    ) -> CropBatch:
        height, width = size
        parts = [(slice(top, top + height), slice(left, left + width)) for top, left in corners]
        masks = [
            np.ones(size, np.float32) if each.mask is None else self._region(each.mask)[part]
            for each, part in zip(shown, parts, strict=True)
        ]
        tags = [self.source.tags(row) for row in rows]
        return CropBatch(
            pixels=torch.stack([to_pixels(each.pixels[part]) for each, part in zip(shown, parts, strict=True)]),
            region=torch.stack([torch.from_numpy(np.ascontiguousarray(mask))[None].float() for mask in masks]),
            weight=torch.tensor([tag_weight(each, self.regions.tags) for each in tags], dtype=torch.float32),
            latents=self._latents(shown, corners, size),
            corners=corners,
            sample_ids=[self.source.id(row) for row in rows],
            epochs=epochs,
            seeds=torch.tensor(seeds, dtype=torch.int64),
            tag_categories=[{self.categories.get(tag, GENERAL) for tag in each} for each in tags],
        )

    def _latents(self, shown: list[Shown], corners: list[tuple[int, int]], size: tuple[int, int]) -> Latents | None:
        """The cached latents under the crops: of the whole canvas where a crop is one, else a window of them."""
        f, (height, width) = self.factor, size
        windows = [
            each.latents[:, top // f : (top + height) // f, left // f : (left + width) // f]
            for each, (top, left) in zip(shown, corners, strict=True)
            if each.latents is not None
        ]
        return torch.stack(windows) if windows else None


def build_crop_loader(
    source: PictureSource,
    *,
    crops: CropConfig,
    regions: RegionConfig,
    factor: int,
    seed: int,
    micro_batch_size: int,
    micro_batches_per_step: int,
    validation_count: int,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
) -> CropLoader:
    """The loader of a run; `workers` threads decode ahead, which changes no bit.

    Raises: ConfigError, DataError if nothing can be trained so.
    """
    check_world(micro_batches_per_step, world)
    if not crops.side and source.cache is None:
        raise ConfigError("crops.side is 0, which shows whole canvases: that needs --latents")
    if crops.side % factor:
        raise ConfigError(f"crops.side is {crops.side}; give a multiple of the VAE's factor, {factor}")
    count = min(validation_count, len(source) // HELD_OUT_AT_MOST)
    train, held_out = split_validation(source.hashes, count)
    fits = (source.sizes[train] >= max(crops.side, 1)).all(axis=1)
    if not fits.any():
        shortest = int(source.sizes[train].min(axis=1).max())
        raise ConfigError(
            f"crops.side is {crops.side}, and no picture is as large; the largest has a side of {shortest} px: set "
            f"crops.side to {shortest // 16 * 16} or less"
        )
    repeats = np.zeros(len(source), np.int64)
    repeats[train[fits]] = source.repeats[train[fits]]
    repeats = balanced_repeats(source.bucket, repeats, crops.balance)
    # Crops of one size mix all shapes in a batch; whole canvases do not.
    bucket = np.zeros(len(source), np.int64) if crops.side else source.bucket
    plan = BatchPlan(
        bucket,
        repeats,
        micro_batch_size=micro_batch_size,
        micro_batches_per_step=micro_batches_per_step,
        seed=derive_seed(seed, "order"),
    )
    return CropLoader(
        source=source,
        plan=plan,
        validation_rows=held_out,
        too_small=int((~fits).sum()),
        crops=crops,
        regions=regions,
        categories=source.manifest.categories,
        factor=factor,
        seed=seed,
        workers=workers,
        rank=rank,
        world=world,
    )
