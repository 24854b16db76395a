"""Put models together: a weighted mean, or a base with the difference of two others added.

    sumizome merge a.safetensors b.safetensors --weights 0.7 0.3 --out merged.safetensors
    sumizome merge base.safetensors --add finetune.safetensors --minus original.safetensors --out merged.safetensors

Computed in float32, tensor by tensor, and read back. The result keeps the marks that say what it predicts, which many
mergers lose. The VAE is the first model's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome merge` takes."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Models to average; or, with --add and --minus, the base alone. Files and diffusers folders, mixed at will."""
    out: Path
    """NAME.safetensors: one file in the original layout. Any other name: a diffusers folder."""
    weights: tuple[float, ...] | None = None
    """Of the models, in their order; scaled to sum 1. Left out: equal."""
    add: Path | None = None
    """The fine-tune whose difference from --minus is added to the base."""
    minus: Path | None = None
    """What --add was fine-tuned from."""
    scale: float = 1.0
    """Of the difference."""
    prediction: Literal["v", "epsilon"] | None = None
    """What the first model was trained to predict, where it does not say; the result's mark."""
    zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """It was trained to pure noise."""
    no_zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """It was not trained to pure noise: SDXL's own schedule."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the result. Left out: the first model's."""
    title: str | None = None
    """The result's name in its metadata; by default the file's."""
    overwrite: bool = False
    """Replace what stands at --out."""


def run(command: Command) -> None:
    """Merges, verifies and says what to be wary of.

    Raises:
        ConfigError: flags that do not fit together, or models that predict different things.
        ModelError, ExportError: as `sumizome mend` does.
    """
    from sumizome.errors import ConfigError
    from sumizome.files import readable_size
    from sumizome.mend_decision import MendConfig
    from sumizome.merging import add_difference, merge_weighted

    if command.zero_terminal_snr and command.no_zero_terminal_snr:
        raise ConfigError("--zero-terminal-snr and --no-zero-terminal-snr exclude each other; give one of them")
    if (command.add is None) != (command.minus is None):
        raise ConfigError("--add and --minus belong together: base + scale·(add − minus)")
    schedule = True if command.zero_terminal_snr else False if command.no_zero_terminal_snr else None
    config = MendConfig(command.prediction, schedule, command.dtype, title=command.title or command.out.stem)
    if command.add is not None and command.minus is not None:
        if len(command.models) != 1 or command.weights is not None:
            raise ConfigError("--add and --minus take one base model and no --weights; --scale weighs the difference")
        merged = add_difference(
            command.models[0],
            command.add,
            command.minus,
            command.out,
            config,
            scale=command.scale,
            overwrite=command.overwrite,
        )
    else:
        weights = command.weights or (1.0,) * len(command.models)
        merged = merge_weighted(command.models, weights, command.out, config, overwrite=command.overwrite)
    for warning in (*merged.warnings, *merged.mended.told):
        print(f"! {warning}")
    size = readable_size(merged.mended.bytes)
    print(
        f"{merged.mended.path}: {size}, {merged.mended.changes[0]}, read back bit for bit, one denoising step compared"
    )
