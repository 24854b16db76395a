"""Which device computes, and what it can: the one place where a device's name is understood."""

import torch

from sumizome.errors import ConfigError

__all__ = ["GPUS", "choose_device", "peak_flop"]

GPUS: dict[str, tuple[float, float, float]] = {
    # dense peak TFLOP/s in bfloat16, in tf32; memory, GB
    "h100": (989.0, 494.5, 80.0),
    "h200": (989.0, 494.5, 141.0),
    "a100": (312.0, 156.0, 80.0),
    "a100-40": (312.0, 156.0, 40.0),
    "l40s": (362.0, 183.0, 48.0),
    "a6000": (154.8, 77.4, 48.0),
    "4090": (165.2, 82.6, 24.0),
    "3090": (71.0, 35.6, 24.0),
    "5090": (209.5, 104.8, 32.0),
}
"""By the makers' data sheets; GeForce cards with float32 accumulation, which is what training uses."""


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" → a CUDA device when there is one, else the CPU; any other name as torch spells it.

    Raises: ConfigError for a name that torch does not know, or a CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device '{name}' is none that torch knows; give auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{name}' was asked for, but torch sees no CUDA device; give --device cpu")
    return device


def peak_flop(device_name: str, *, tf32: bool) -> float | None:
    """Dense peak FLOP/s of a GPU by the name that its driver gives it; None for one that `GPUS` does not know."""
    words = device_name.lower().replace("-", " ").split()
    for name, (half, single, _) in GPUS.items():
        if name in words:
            return (single if tf32 else half) * 1e12
    return None
