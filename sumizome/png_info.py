"""What a drawn picture says of itself: A1111's `parameters` text, which most programs read, and our own JSON.

Nothing here claims to be another program: `Software` is ours, and no signed or hidden data is written. `png_settings`
reads what is written here, and other programs' pictures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sumizome import __version__
from sumizome.diffusion.samplers import SamplerName
from sumizome.diffusion.sigmas import Grid
from sumizome.files import write_atomically
from sumizome.inference import PictureRequest, SamplingConfig
from sumizome.settings import as_mapping

__all__ = ["GRID_LABELS", "SAMPLER_LABELS", "parameters_text", "write_png"]

SAMPLER_LABELS: dict[SamplerName, str] = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "lms": "LMS",
    "ddim": "DDIM",
    "unipc": "UniPC",
    "euler_cfg_pp": "Euler CFG++",
}
GRID_LABELS: dict[Grid, str] = {
    "native": "Uniform",
    "trailing": "SGM Uniform",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "beta": "Beta",
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "kl_optimal": "KL Optimal",
}


def parameters_text(request: PictureRequest, model_name: str, zero_terminal_snr: bool) -> str:
    """The picture's settings as A1111 writes and reads them, `Noise Schedule: Zero Terminal SNR` included."""
    sampling: SamplingConfig = request.sampling
    height, width = request.canvas
    settings: dict[str, Any] = {
        "Steps": sampling.steps,
        "Sampler": SAMPLER_LABELS[sampling.sampler],
        "Schedule type": GRID_LABELS[sampling.grid],
        "CFG scale": f"{sampling.guidance.guidance_scale:g}",
        "Seed": request.seed,
        "Size": f"{width}x{height}",
        "Model": model_name,
        "RNG": "CPU",
    }
    if isinstance(sampling.sigma_max, float):
        settings["Schedule max sigma"] = f"{sampling.sigma_max:g}"
    if sampling.guidance.guidance_rescale:
        settings["Rescale CFG"] = f"{sampling.guidance.guidance_rescale:g}"
    if request.redraw.image is not None:
        settings["Denoising strength"] = f"{request.redraw.strength:g}"
    if request.second_pass.scale > 1:
        # A1111's passes are of as many steps and this enlargement; its own strength says where the second begins by a
        # share of steps, ours by a sigma, so that none is claimed.
        settings["Hires upscale"] = f"{request.second_pass.scale:g}"
        settings["Hires steps"] = request.second_pass.steps
        settings["Hires upscaler"] = "Latent (bicubic antialiased)"
    if zero_terminal_snr:
        settings["Noise Schedule"] = "Zero Terminal SNR"
    settings["Version"] = f"Sumizome {__version__}"
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """A value as A1111's reader expects it: quoted where it holds a separator."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def _utf8(text: str) -> str:
    """The text with "?" for bytes of a file's name that are no UTF-8, which no text of a PNG can hold."""
    return text.encode("utf-8", "replace").decode()


def write_png(
    image: Image.Image,
    path: Path,
    request: PictureRequest,
    model_name: str,
    zero_terminal_snr: bool,
    drawn: Mapping[str, Any] | None = None,
) -> None:
    """Writes the picture with its settings inside; `drawn` is what repetition needs beside the request.

    Raises: DataError when it cannot be written.
    """
    own = {"model": model_name, **(drawn or {}), **as_mapping(request)}
    info = PngInfo()
    info.add_itxt("parameters", _utf8(parameters_text(request, model_name, zero_terminal_snr)))
    info.add_itxt("sumizome", _utf8(json.dumps(own, ensure_ascii=False)))
    info.add_text("Software", f"Sumizome {__version__}")
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))
