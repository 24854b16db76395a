"""Which device computes: the one place where a device's name is understood."""

import torch

from sumizome.errors import ConfigError

__all__ = ["choose_device"]


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
