"""Whether a decoder can be used as programs use it: in float16, and in tiles. Both verdicts come from pictures.

float16 ends at 65504: SDXL's own decoder goes beyond it inside, which makes pictures black or full of NaN, and so can
a finetune of one that did not. What is recorded is the largest absolute value that any layer gives out, in
float32. Tiles see less than the whole picture; a decoder that relies on distant context shows seams.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sumizome.data.canvas import Canvas
from sumizome.files import write_atomically
from sumizome.models.tiled_decode import decode_in_tiles
from sumizome.models.vae import decode_latents, encode_pixels, latent_statistics, normalise, vae_factor
from sumizome.models.vae_file import load_vae
from sumizome.vae.build import open_pictures
from sumizome.vae.config import VaeTrainConfig
from sumizome.vae.crop_loader import to_pixels
from sumizome.vae.evaluation import held_out_windows

__all__ = [
    "HALF_MAX",
    "TILE_TOLERANCE",
    "ActivationReport",
    "TileReport",
    "activation_maxima",
    "half_verdict",
    "record_maxima",
    "tile_difference",
    "tile_verdict",
    "usual_tile",
    "write_safety",
]

HALF_MAX = 65504.0
"""The largest finite float16."""
_LARGEST = torch.finfo(torch.float32).max
_MARGIN = 4.0
"""Other pictures go higher than those that were looked at: what is nearer to the limit than this is not called safe."""
TILE_TOLERANCE = 0.5
"""dB by which tiles of a finetuned decoder may agree less with the whole picture than those of the untouched one."""


@dataclass(frozen=True)
class ActivationReport:
    """The largest absolute values inside a decoder, over some pictures."""

    layer: str
    """Where the largest of all was given out."""
    largest: float
    by_layer: dict[str, float]
    """Every layer's, largest first."""
    pictures: int


def activation_maxima(vae: AutoencoderKL, pictures: Sequence[Canvas]) -> ActivationReport:
    """Of `post_quant_conv` and the decoder, computing in float32 as they are."""
    with record_maxima({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}) as maxima:
        for picture in pictures:
            decode_latents(vae, _latents(vae, picture))
    ordered = dict(sorted(maxima.items(), key=lambda item: -item[1]))
    layer = next(iter(ordered))
    return ActivationReport(layer, ordered[layer], ordered, len(pictures))


@contextmanager
def record_maxima(networks: dict[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Within, each layer that gives out a tensor notes its largest absolute value, by its dotted name."""
    found: dict[str, float] = {}

    def note(name: str) -> object:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                # NaN counts as the largest number there is.
                largest = float(output.detach().float().nan_to_num(nan=_LARGEST, posinf=_LARGEST).abs().max())
                found[name] = max(found.get(name, 0.0), largest)

        return hook

    handles = [
        module.register_forward_hook(note(f"{network}.{name}".rstrip(".")))
        for network, whole in networks.items()
        for name, module in whole.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def half_verdict(report: ActivationReport) -> tuple[bool, str]:
    """(whether it is safe in float16, the verdict in a sentence)."""
    told = (
        f"the largest activation over {report.pictures} pictures is {report.largest:,.0f} of 65,504, at {report.layer}"
    )
    if report.largest > HALF_MAX:
        return False, f"not safe in float16: {told}; use it in bfloat16 or float32 (a VAE without fp16)"
    if report.largest * _MARGIN > HALF_MAX:
        return False, f"near the limit of float16: {told}; other pictures may go beyond it, use bfloat16 or float32"
    return True, f"safe in float16: {told}"


@dataclass(frozen=True)
class TileReport:
    """How far tiles are from the whole picture."""

    tile: int
    """px"""
    psnr: float
    """Of the tiled decode against the whole one, dB, over all pictures; 100 where all fit into a tile."""
    largest: float
    """Largest difference of a pixel's channel, levels of 255."""


def tile_difference(vae: AutoencoderKL, pictures: Sequence[Canvas], tile: int) -> TileReport:
    """Tiled against whole decodes of the same latents."""
    squared, count, largest = 0.0, 0, 0.0
    for picture in pictures:
        latents = _latents(vae, picture)
        difference = (decode_in_tiles(vae, latents, tile).cpu() - decode_latents(vae, latents).cpu()).double() / 2
        squared += float(difference.square().sum())
        count += difference.numel()
        largest = max(largest, float(difference.abs().max()))
    return TileReport(tile, float(-10 * np.log10(max(squared / count, 1e-10))), 255 * largest)


def tile_verdict(before: TileReport, after: TileReport) -> tuple[bool, str]:
    """(whether tiles agree with the whole picture as they did, the verdict in a sentence)."""
    agrees = after.psnr >= before.psnr - TILE_TOLERANCE
    told = (
        f"tiles of {after.tile} px agree with the whole picture to {after.psnr:.1f} dB (untouched: {before.psnr:.1f})"
    )
    return agrees, told if agrees else f"{told}: seams are more visible than they were; train with larger crops"


def _latents(vae: AutoencoderKL, picture: Canvas) -> Tensor:
    return normalise(encode_pixels(vae, to_pixels(picture)[None]), latent_statistics(vae))


def usual_tile(vae: AutoencoderKL, pictures: Sequence[Canvas]) -> int:
    """512 px, or half of the longest side where pictures are smaller: a tile that does cut them."""
    longest: int = max(max(picture.shape[:2]) for picture in pictures)
    least = 16 * vae_factor(vae)
    return max(least, min(512, longest // 2 // 16 * 16))


def write_safety(
    run_dir: Path, config: VaeTrainConfig, vae: AutoencoderKL, step: int, *, count: int, side: int
) -> tuple[list[str], Path]:
    """(both verdicts, the file with what they rest on): run_dir/safety.json. `vae`: the run's, after `step` steps.

    Raises: ConfigError if no picture is held out; DataError, ModelError where pictures or the base cannot be read.
    """
    pictures = [picture for _, picture in held_out_windows(open_pictures(config.manifest), count, side)]
    activations = activation_maxima(vae, pictures)
    half_is_safe, half = half_verdict(activations)
    tile = usual_tile(vae, pictures)
    before, after = (tile_difference(each, pictures, tile) for each in (load_vae(config.model, vae.device), vae))
    tiles_agree, tiled = tile_verdict(before, after)
    facts = {
        "format": 1,
        "step": step,
        "half": {"safe": half_is_safe, "limit": HALF_MAX, **asdict(activations)},
        "tiles": {"agree": tiles_agree, "tolerance": TILE_TOLERANCE, "before": asdict(before), "after": asdict(after)},
    }
    path, text = run_dir / "safety.json", json.dumps(facts, indent=1)
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    return [half, tiled], path
