"""Features of pictures from a local vision model (CLIP's, DINOv2, ViT …): a folder of transformers with safetensors.

Owns bringing pictures to the model's size and normalisation, as its `preprocessor_config.json` says. Nothing is
fetched, nothing is unpickled.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sumizome.errors import ModelError

__all__ = ["VisionFeatures", "load_vision_features"]

VisionFeatures = Callable[[Sequence[Image.Image]], np.ndarray]
"""Pictures → float64 [n, d]."""

_AT_ONCE = 16


def load_vision_features(folder: Path, device: torch.device | str = "cpu") -> VisionFeatures:
    """The feature function of the model in `folder`: its pooled output, before any projection.

    Raises: ModelError where it is no vision model with safetensors.
    """
    from transformers import AutoConfig, AutoModel, CLIPVisionModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = CLIPVisionModel if config.model_type in ("clip", "clip_vision_model") else AutoModel
        with _quietly():
            model, loading = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(
            f"{folder}: expected a folder of a transformers vision model with safetensors: {reason}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{folder}: {len(missing)} tensors of its {kind.__name__} are not there, such as {missing[0]}, and would "
            "be random; give a folder that holds the whole vision model"
        )
    model.eval().to(device)
    size, mean, deviation = _preprocessing(folder, model.config)

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> np.ndarray:
        found = []
        for start in range(0, len(images), _AT_ONCE):
            square = [
                image.resize((size, size), Image.Resampling.BICUBIC) for image in images[start : start + _AT_ONCE]
            ]
            pixels = torch.from_numpy(np.stack([np.asarray(image, np.float32) / 255 for image in square]))
            pixels = ((pixels - torch.tensor(mean)) / torch.tensor(deviation)).permute(0, 3, 1, 2).to(device)
            found.append(model(pixel_values=pixels).pooler_output.double().cpu().numpy())
        return np.concatenate(found)

    return features


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """transformers draws bars over the command's status, and lists each tensor of CLIP's text encoder as unexpected."""
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _preprocessing(folder: Path, config: object) -> tuple[int, list[float], list[float]]:
    """(side px, mean, deviation of each channel)."""
    path = folder / "preprocessor_config.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    crop = told.get("crop_size") or {}
    side = crop.get("height") if isinstance(crop, dict) else crop
    usual: int = getattr(config, "image_size", 224)
    return (
        int(side or usual),
        told.get("image_mean", [0.5, 0.5, 0.5]),
        told.get("image_std", [0.5, 0.5, 0.5]),
    )
