"""The pictures that a decoder learns from: a manifest's at full size, or the canvases of cached latents.

Owns what is known of a picture before and after it is read; which part of it is shown is `crops`'. The invariant: what
`read` returns was hashed against the manifest, and depends on the row alone. Rows are the source's own, from 0.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int, UInt64
from torch import Tensor

from sumizome.data.buckets import BucketConfig, Sizes, assign_buckets, bucket_table, cover_sizes
from sumizome.data.canvas import Canvas, Frame, load_canvas
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.latent_index import picture_hashes
from sumizome.data.latents import LatentCache
from sumizome.data.manifest import Manifest
from sumizome.errors import DataError
from sumizome.vae.regions import Masks

__all__ = ["PictureSource", "Shown"]


@dataclass(frozen=True, eq=False)
class Shown:
    """One picture as it was read."""

    pixels: Canvas
    mask: Float[np.ndarray, "H W"] | None
    latents: Tensor | None
    """Raw, [c, h, w], where they come from a cache."""


@dataclass(frozen=True, eq=False)
class PictureSource:
    """A manifest's pictures; with `cache`, those of them that have latents, as the canvases these were made from."""

    manifest: Manifest
    masks: Masks | None = None
    cache: LatentCache | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _cache_rows(self) -> Int[np.ndarray, " n"]:
        """The first variant of each cached picture, which is never mirrored."""
        assert self.cache is not None
        return self.cache.index.pictures()

    @cached_property
    def rows(self) -> Int[np.ndarray, " n"]:
        """The manifest's row of each picture. Raises: DataError if latents are of pictures that it does not have."""
        if self.cache is None:
            return np.arange(len(self.manifest))
        ids = pa.array(self.cache.index.ids(self._cache_rows))
        found = pc.index_in(ids, value_set=self.manifest.table["id"].combine_chunks())
        if found.null_count:
            raise DataError(
                f"{self.cache.root}: {found.null_count} of its pictures are not in the manifest; "
                "give the manifest that these latents were prepared from"
            )
        return np.asarray(found.to_numpy(), np.int64)

    @cached_property
    def sizes(self) -> Sizes:
        """(height, width) of each picture as it is read, px."""
        return self._originals if self.cache is None else self.cache.buckets[self.bucket]

    @cached_property
    def _originals(self) -> Sizes:
        return np.stack([self._column(side) for side in ("height", "width")], axis=1)

    @cached_property
    def bucket(self) -> Int[np.ndarray, " n"]:
        """The aspect bucket of each picture: the cache's, or one of SDXL's table at 1024²."""
        if self.cache is not None:
            return np.asarray(self.cache.index.bucket[self._cache_rows], np.int64)
        return assign_buckets(self._originals, bucket_table(BucketConfig())).bucket.astype(np.int64)

    @cached_property
    def hashes(self) -> UInt64[np.ndarray, " n"]:
        """By which pictures are held out: the same as U-Net training's."""
        return picture_hashes(self.manifest.table["id"].take(pa.array(self.rows)).to_pylist())

    @property
    def repeats(self) -> Int[np.ndarray, " n"]:
        return self._column("repeats")

    def _column(self, name: str) -> Int[np.ndarray, " n"]:
        """Whole numbers of the manifest, one a picture."""
        return np.asarray(self.manifest.table[name].to_numpy()[self.rows], np.int64)

    def id(self, row: int) -> str:
        return str(self.manifest.table["id"][int(self.rows[row])])

    def path(self, row: int) -> str:
        return str(self.manifest.table["path"][int(self.rows[row])])

    def has_mask(self, row: int) -> bool:
        return self.masks is not None and self.path(row) in self.masks

    def tags(self, row: int) -> list[str]:
        tags: list[str] = self.manifest.table["tags"][int(self.rows[row])].as_py()
        return tags

    def read(self, row: int) -> Shown:
        """Raises: DataError naming a picture that cannot be read, or is not the one that was ingested."""
        here = int(self.rows[row])
        original = self._pair(self._originals, row)
        frame = Frame(original, original, (0, 0), original) if self.cache is None else self._frame(row)
        digest = str(self.manifest.table["sha256"][here])
        picture = self.manifest.picture(here)
        try:
            pixels = load_canvas(picture, frame, self.manifest.background, sha256=digest)
        except ImageRejected as error:
            raise DataError(f"{picture}: {error}") from error
        mask = None if self.masks is None else self._mask(row, frame)
        latents = None if self.cache is None else self.cache.read(self._cache_rows[row : row + 1])[0]
        return Shown(pixels, mask, latents)

    def _frame(self, row: int) -> Frame:
        assert self.cache is not None
        target = self.sizes[row : row + 1]
        resized = cover_sizes(self._originals[row : row + 1], target)
        offset = self.cache.index.crop[self._cache_rows[row : row + 1]]
        return Frame(*(self._pair(each, 0) for each in (self._originals[row : row + 1], resized, offset, target)))

    def _mask(self, row: int, frame: Frame) -> Float[np.ndarray, "H W"] | None:
        assert self.masks is not None
        path = self.path(row)
        try:
            whole = self.masks.read(path, frame.resized)
        except ImageRejected as error:
            raise DataError(f"{self.masks.folder}: the mask of {path}: {error}") from error
        (top, left), (height, width) = frame.offset, frame.target
        return None if whole is None else whole[top : top + height, left : left + width]

    @staticmethod
    def _pair(values: Int[np.ndarray, "n 2"], row: int) -> tuple[int, int]:
        first, second = values[row].tolist()
        return int(first), int(second)
