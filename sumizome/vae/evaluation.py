"""Decoders beside each other on held-out pictures, and beside the pictures themselves saved as JPEG.

Owns which pictures, which windows and which rows of the table; the measures are `scores`', the page is `page`'s. The
held-out pictures are those that training held out: the least hashes of the manifest.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from sumizome.data.canvas import Canvas
from sumizome.data.loader import split_validation
from sumizome.errors import ConfigError
from sumizome.models.vae import encode_pixels, vae_digest
from sumizome.vae.crop_loader import HELD_OUT_AT_MOST, to_pixels
from sumizome.vae.crops import detail_of, middle
from sumizome.vae.perceptual import Lpips
from sumizome.vae.picture_source import PictureSource
from sumizome.vae.scores import (
    MEASURES,
    Pair,
    blockiness_of_originals,
    compare,
    distance_of,
    score_pair,
    summarise,
    to_picture,
)

__all__ = ["JPEG_QUALITIES", "Candidate", "Close", "evaluate_decoders", "held_out_windows"]

JPEG_QUALITIES = (75, 90)
_MULTIPLE = 32
"""Sides of what is measured are multiples of this, px: any VAE's factor, and JPEG's blocks."""
_CLOSE = 64
"""Side of the crops that are shown enlarged, px."""


@dataclass(frozen=True)
class Candidate:
    """A VAE to measure."""

    name: str
    vae: AutoencoderKL
    path: str


@dataclass(frozen=True)
class Close:
    """A crop of one picture as each row of the table has it, the original first."""

    sample_id: str
    pictures: Sequence[Image.Image]


def held_out_windows(source: PictureSource, count: int, side: int) -> Iterator[tuple[str, Canvas]]:
    """(id, the window of at most `side` px a side in its middle) of each held-out picture of 32 px or more.

    Raises: ConfigError if there is none. DataError for a picture that cannot be read.
    """
    _, rows = split_validation(source.hashes, min(count, len(source) // HELD_OUT_AT_MOST))
    if not len(rows):
        raise ConfigError(
            f"no picture is held out: one in {HELD_OUT_AT_MOST} is at most, and the manifest has {len(source)}"
        )
    found = False
    for row in rows.tolist():
        picture = source.read(row).pixels
        height, width = (min(length, side) // _MULTIPLE * _MULTIPLE for length in picture.shape[:2])
        if min(height, width) < _MULTIPLE:
            continue
        found = True
        top, left = middle(picture.shape[:2], (height, width), _MULTIPLE)
        yield source.id(row), np.ascontiguousarray(picture[top : top + height, left : left + width])
    if not found:
        raise ConfigError(f"none of the {len(rows)} held-out pictures has {_MULTIPLE} px a side, which measuring takes")


def evaluate_decoders(
    candidates: Sequence[Candidate],
    pictures: Sequence[tuple[str, Canvas]],
    *,
    lpips: Lpips | None = None,
    shown: int = 8,
    told: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], list[Close]]:
    """(the table as JSON has it, crops for the page). The first candidate is what the others are compared with."""
    ways: dict[str, Callable[[Canvas], Canvas]] = {each.name: _way_through(each.vae) for each in candidates}
    ways |= {f"JPEG {quality}": _way_of_jpeg(quality) for quality in JPEG_QUALITIES}
    pairs: dict[str, list[Pair]] = {name: [] for name in ways}
    closes: list[Close] = []
    every = max(1, len(pictures) // max(1, shown))
    for number, (sample_id, original) in enumerate(pictures):
        told(f"picture {number + 1} of {len(pictures)}")
        decoded = {name: way(original) for name, way in ways.items()}
        for name, picture in decoded.items():
            pairs[name].append(score_pair(original, picture, lpips))
        if number % every == 0 and len(closes) < shown:
            closes.append(_close(sample_id, [original, *decoded.values()]))
    return _table(candidates, pairs, len(pictures)), closes


@torch.no_grad()
def _through(vae: AutoencoderKL, original: Canvas) -> Canvas:
    return to_picture(vae.decode(encode_pixels(vae, to_pixels(original)[None])).sample[0])


def _way_through(vae: AutoencoderKL) -> Callable[[Canvas], Canvas]:
    return lambda original: _through(vae, original)


def _way_of_jpeg(quality: int) -> Callable[[Canvas], Canvas]:
    """The picture saved as JPEG (Pillow's defaults: 4:2:0) and opened again."""

    def way(original: Canvas) -> Canvas:
        buffer = io.BytesIO()
        Image.fromarray(original).save(buffer, "JPEG", quality=quality)
        return np.array(Image.open(buffer))

    return way


def _close(sample_id: str, pictures: Sequence[Canvas]) -> Close:
    """The crop of most detail in the original, on a grid of half its side."""
    original = pictures[0]
    side = min(_CLOSE, *original.shape[:2])
    corners = [
        (top, left)
        for top in range(0, original.shape[0] - side + 1, side // 2)
        for left in range(0, original.shape[1] - side + 1, side // 2)
    ]
    top, left = max(corners, key=lambda at: detail_of(original[at[0] : at[0] + side, at[1] : at[1] + side]))
    return Close(sample_id, [Image.fromarray(each[top : top + side, left : left + side]) for each in pictures])


def _table(candidates: Sequence[Candidate], pairs: Mapping[str, list[Pair]], count: int) -> dict[str, Any]:
    rows = {name: summarise(of_way) for name, of_way in pairs.items()}
    first = candidates[0].name
    originals = blockiness_of_originals(pairs[first])
    paths = {each.name: each for each in candidates}
    measures = [name for name in MEASURES if name in rows[first]]
    return {
        "format": 1,
        "pictures": count,
        "blockiness_of_originals": asdict(originals),
        "measures": {
            name: {"title": MEASURES[name].title, "unit": MEASURES[name].unit, "explained": MEASURES[name].explained}
            for name in measures
        },
        "rows": [
            {
                "name": name,
                "path": paths[name].path if name in paths else None,
                "vae_digest": vae_digest(paths[name].vae) if name in paths else None,
                "values": {measure: asdict(interval) for measure, interval in row.items()},
                "distance": {
                    measure: distance_of(measure, interval.value, originals.value) for measure, interval in row.items()
                },
                "better": compare(rows[first], row, originals.value) if name in paths and name != first else None,
            }
            for name, row in rows.items()
        ],
    }
