"""Write a corrected copy of a model, never in place, and read it back to be sure.

    sumizome mend model.safetensors --out mended.safetensors --prediction v --zero-terminal-snr
    sumizome mend model.safetensors --out folder
    sumizome mend folder --out model.safetensors --dtype bf16 --vae other-vae.safetensors

The copy says what it is in every place where some program looks: `v_pred`, `ztsnr`, `alphas_cumprod`, ModelSpec
metadata, A1111's .yaml beside it; or the scheduler config of a diffusers folder. Weights stay as they are, but for
their dtype if asked. What the source does not tell is asked for: `sumizome inspect` shows what it tells.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome mend` takes."""

    model: Annotated[Path, tyro.conf.Positional]
    """The model: a safetensors file in SDXL's original layout, whole or the U-Net alone, or a diffusers folder."""
    out: Path
    """Where the copy goes. NAME.safetensors: one file in the original layout. Any other name: a diffusers folder."""
    prediction: Literal["v", "epsilon"] | None = None
    """What the U-Net was trained to predict, where the file does not say or says it wrongly."""
    zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """It was trained to pure noise."""
    no_zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """It was not trained to pure noise: SDXL's own schedule."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Of all weights in the copy, refused if one overflows. Left out: as they are."""
    vae: Path | None = None
    """Put this VAE in: a VAE file, a diffusers VAE folder, or a model that holds one."""
    noise_table: bool = True
    """Write `alphas_cumprod` into a single file with zero terminal SNR, for stable-diffusion.cpp."""
    title: str | None = None
    """The model's name in the copy's metadata; by default the source's."""
    overwrite: bool = False
    """Replace what stands at --out."""


def run(command: Command) -> None:
    """Writes the copy and says what differs from the source.

    Raises:
        ConfigError: a question that only a flag can answer, or flags that exclude each other.
        ModelError: a source that is damaged, incomplete or no SDXL.
        ExportError: the copy cannot be written, overflows, or does not read back.
    """
    from sumizome.errors import ConfigError
    from sumizome.files import readable_size
    from sumizome.mend_decision import MendConfig
    from sumizome.mending import mend_model

    if command.zero_terminal_snr and command.no_zero_terminal_snr:
        raise ConfigError("--zero-terminal-snr and --no-zero-terminal-snr exclude each other; give one of them")
    schedule = True if command.zero_terminal_snr else False if command.no_zero_terminal_snr else None
    config = MendConfig(
        prediction=command.prediction,
        zero_terminal_snr=schedule,
        dtype=command.dtype,
        vae=command.vae,
        noise_table=command.noise_table,
        title=command.title,
    )
    mended = mend_model(command.model, command.out, config, overwrite=command.overwrite)
    for change in mended.changes:
        print(f"  {change}")
    for line in mended.told:
        print(f"! {line}")
    print(f"{mended.path}: {readable_size(mended.bytes)}, read back bit for bit, one denoising step compared")
    if mended.sidecar:
        print(f"{mended.sidecar}: for A1111, which reads it where it stands beside the file")
