"""What each pixel's error weighs: more where a mask is white, more in pictures with certain tags. Eyes, above all.

A mask is a picture of its own, at the path of the picture below a folder of masks, with .png in place of its ending:
white counts `mask_weight` times, black once, grey between. It is resized to the picture.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float
from PIL import Image

from sumizome.data.images import open_image
from sumizome.errors import ConfigError

__all__ = ["Masks", "RegionConfig", "open_masks", "tag_weight"]


@dataclass(frozen=True)
class RegionConfig:
    """What counts for more."""

    mask_weight: float = 3.0
    """Weight of a pixel where the mask is white; 1 where it is black, or there is none."""
    tags: dict[str, float] = field(default_factory=dict)
    """Weights of whole pictures by tag, such as `"close-up" = 2.0`; of several tags the greatest counts."""

    def __post_init__(self) -> None:
        if self.mask_weight <= 0 or any(weight <= 0 for weight in self.tags.values()):
            raise ConfigError("regions.mask_weight and the weights of regions.tags must be above 0")


@dataclass(frozen=True)
class Masks:
    """The masks below a folder."""

    folder: Path
    names: frozenset[str]
    """Posix paths below it, without their ending."""

    @property
    def digest(self) -> str:
        """SHA-256 hex of the masks' names and sizes: another set of them is told, an edit of the same size is not."""
        listed = sorted((name, (self.folder / f"{name}.png").stat().st_size) for name in self.names)
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def __contains__(self, picture: str) -> bool:
        return _stem(picture) in self.names

    def place(self, picture: str) -> Path:
        """Where the mask of a picture stands, or would."""
        return self.folder / f"{_stem(picture)}.png"

    def read(self, picture: str, size: tuple[int, int]) -> Float[np.ndarray, "H W"] | None:
        """The mask of a picture (its path in the manifest) at that size, 0 … 1; None where there is none.

        Raises: ImageRejected for a file that is no picture.
        """
        if picture not in self:
            return None
        image = open_image(self.place(picture), (0, 0, 0)).convert("L")
        if image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(image, np.float32) / 255


def open_masks(folder: Path | None) -> Masks | None:
    """Raises: ConfigError for a folder that is not there, or holds no mask."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise ConfigError(f"masks: expected a folder, found none at {folder}")
    names = frozenset(_stem(path.relative_to(folder).as_posix()) for path in folder.rglob("*.png"))
    if not names:
        raise ConfigError(f"masks: {folder} holds no .png; a mask has the path of its picture and ends in .png")
    return Masks(folder, names)


def _stem(path: str) -> str:
    return PurePosixPath(path).with_suffix("").as_posix()


def tag_weight(tags: Sequence[str], weights: dict[str, float]) -> float:
    """The weight of a picture with these tags: the greatest of those that apply, else 1."""
    return max((weights[tag] for tag in tags if tag in weights), default=1.0)
