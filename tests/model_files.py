"""Model files for tests: a safetensors header of SDXL's real size over a hole in the disk, and what varies it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from sumizome.models.architecture import Config, clip_config, unet_config, vae_config
from sumizome.models.expected import expected_original

__all__ = ["SDXL", "full_size_shapes", "write_sparse"]

SDXL: dict[str, Config] = {
    "unet": unet_config(),
    "vae": vae_config(),
    "text_encoder": clip_config(),
    "text_encoder_2": clip_config(width=1280, layers=32, intermediate=5120, activation="gelu", projection_dim=1280),
}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def full_size_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of SDXL's original layout."""
    return {key: shape for name, config in SDXL.items() for key, shape in expected_original(name, config).items()}


def write_sparse(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str = "F16",
    marks: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A valid file with these tensors, all zeros, that takes the disk no more than its header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for name, shape in shapes.items():
        size = _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [reached, reached + size]}
        reached += size
    for mark in marks:
        header[mark] = {"dtype": "F32", "shape": [0], "data_offsets": [reached, reached]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + reached)
    return path
