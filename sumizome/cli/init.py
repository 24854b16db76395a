"""Make a tiny model of SDXL's architecture (2.8 M-parameter U-Net, real tokenizers), as a diffusers folder.

It trains on two CPU cores in minutes and goes through the very same commands as a real SDXL: use it to try a
dataset, a setting or a change of code before spending GPU hours.
"""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome init` takes."""

    out: Path
    """Folder to write; it must not exist yet."""
    seed: int = 0
    """Seed of the random weights. The VAE's are trained ones that come with Sumizome."""


def run(command: Command) -> None:
    """Writes the model and says how to go on."""
    from sumizome.export import write_diffusers_folder
    from sumizome.models.tiny import build_tiny_model

    model = build_tiny_model(command.seed)
    write_diffusers_folder(model, command.out)
    parameters = sum(parameter.numel() for parameter in model.unet.parameters())
    print(f"{command.out}: a tiny SDXL, U-Net of {parameters / 1e6:.2f} M parameters, untrained, v-prediction")
    print(f"next: sumizome prepare MANIFEST --model {command.out} --out LATENTS --area 64 --step 16")
