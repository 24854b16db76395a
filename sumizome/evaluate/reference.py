"""The data that models are held against: its pictures, decoded from latents, in three parts that share no picture.

Owns the split and the decoding. Parts are taken by hash (`data.loader.split_validation`): the pictures of least hash
are held out, as training does it, so what a run kept out of training lies in what is held out here. Numbers against
decoded pictures leave the VAE's own loss out of account.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from diffusers import AutoencoderKL

from sumizome.data.latents import LatentCache
from sumizome.data.loader import split_validation
from sumizome.errors import ConfigError
from sumizome.evaluate.scores import Images
from sumizome.models.vae import LatentStatistics, decode_latents, latent_statistics, normalise, vae_digest

__all__ = ["Reference", "decode_rows", "fits", "load_reference"]

_PIXELS_AT_ONCE = 2**18


@dataclass(frozen=True, eq=False)
class Reference:
    """Pictures of the data and their tags; `train`, `calibration` and `test` are places in both lists."""

    cache: LatentCache
    rows: np.ndarray
    """Of the cache."""
    images: list[Images]
    """[1, H, W, 3] each, on the canvas of its bucket."""
    tag_lists: list[list[str]]
    train: np.ndarray
    calibration: np.ndarray
    test: np.ndarray

    @cached_property
    def canvases(self) -> list[tuple[int, int]]:
        """(height, width) px of each picture."""
        return [(image.shape[1], image.shape[2]) for image in self.images]


def fits(cache: LatentCache, vae: AutoencoderKL) -> bool:
    """Whether the latents were made by this VAE, however they are normalised now."""
    own = cache.fingerprint
    return vae_digest(vae, LatentStatistics(tuple(own.latent_mean), tuple(own.latent_std))) == own.vae_digest


def load_reference(cache: LatentCache, vae: AutoencoderKL, *, held_out: int, train_pictures: int) -> Reference:
    """Decodes what is held out, and as many others by hash as `train_pictures`.

    Raises: ConfigError where there are too few pictures; ShardError as reading does.
    """
    pictures = cache.index.pictures()
    held_out = min(held_out, len(pictures) // 4)
    if held_out < 20:
        raise ConfigError(f"{cache.root}: {len(pictures)} pictures are too few to hold models against; give 80 or more")
    hashes = cache.index.picture_hash[pictures]
    train, held = split_validation(hashes, held_out)
    train = train[np.argsort(hashes[train], kind="stable")][:train_pictures]
    held = held[np.argsort(hashes[held], kind="stable")]
    places = np.concatenate([train, held[0::2], held[1::2]])
    rows = pictures[places]
    ends = np.cumsum([len(train), len(held[0::2]), len(held[1::2])])
    parts = [np.arange(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return Reference(cache, rows, decode_rows(cache, vae, rows), cache.index.tag_lists(rows), *parts)


def decode_rows(cache: LatentCache, vae: AutoencoderKL, rows: np.ndarray) -> list[Images]:
    """The pictures of some rows, [1, H, W, 3] each."""
    found: dict[int, Images] = {}
    for bucket in np.unique(cache.index.bucket[rows]).tolist():
        members = np.flatnonzero(cache.index.bucket[rows] == bucket)
        at_once = max(1, _PIXELS_AT_ONCE // int(cache.buckets[bucket].prod()))
        for part in np.split(members, range(at_once, len(members), at_once)):
            latents = normalise(cache.read(rows[part]), latent_statistics(vae))
            pixels = decode_latents(vae, latents).permute(0, 2, 3, 1)
            array = ((pixels + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
            found |= {place: array[number : number + 1] for number, place in enumerate(part.tolist())}
    return [found[place] for place in range(len(rows))]
