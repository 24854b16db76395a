"""Put a finetuned decoder into a model, and say whether it is safe in float16 and in tiles.

    sumizome vae bake work/decoder --out model.safetensors
    sumizome vae bake work/decoder --model other-model --out folder --dtype fp16
    sumizome vae bake work/decoder --vae-only --out decoder-vae.safetensors

The copy is `sumizome mend`'s: everything but the VAE's decoder is the model's own, and it is read back before it gets
its name. Held-out pictures go through the decoder before: their largest activations decide the verdict on float16, and
tiles are compared with the whole picture.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome vae bake` takes."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """A run directory of `sumizome vae train`."""
    out: Path
    """Where the copy goes. NAME.safetensors: one file in the original layout. Any other name: a diffusers folder."""
    model: Path | None = None
    """The model that gets the decoder; by default the one that the run began with. Its VAE must have the same encoder:
    a finetuned U-Net of the same base."""
    vae_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the VAE alone, for programs that load one beside a model."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Of all weights in the copy, refused if one overflows. Left out: as they are, the VAE in float32."""
    prediction: Literal["v", "epsilon"] | None = None
    """What the U-Net was trained to predict, where the model does not say."""
    zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """It was trained to pure noise, where the model does not say."""
    no_zero_terminal_snr: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """It was not trained to pure noise, where the model does not say."""
    title: str | None = None
    """The model's name in the copy's metadata; by default the source's."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged decoder, or the trained one as it is."""
    pictures: int = 16
    """Held-out pictures that the verdicts rest on."""
    side: int = 1024
    """Of the window in the middle of each, px at most: take the side that you draw at."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else cpu, cuda, cuda:1."""
    overwrite: bool = False
    """Replace what stands at --out."""


def run(command: Command) -> None:
    """Looks, writes, and prints the verdicts.

    Raises: CheckpointError, ModelError, ConfigError, ExportError, each before anything is written.
    """
    from sumizome.device import choose_device
    from sumizome.errors import ConfigError
    from sumizome.mend_decision import MendConfig, check_place
    from sumizome.vae.bake import bake_model, bake_vae, check_vae_place
    from sumizome.vae.safety import write_safety
    from sumizome.vae.trained_vae import load_trained_vae, read_vae_config

    if command.zero_terminal_snr and command.no_zero_terminal_snr:
        raise ConfigError("--zero-terminal-snr and --no-zero-terminal-snr exclude each other; give one of them")
    if command.pictures < 1 or command.side < 64:
        raise ConfigError("--pictures must be 1 or more, and --side 64 px or more")
    config = read_vae_config(command.run_dir)
    if command.model is not None and not config.model.exists():
        config = replace(config, model=command.model)  # the model was moved: what matters is that its VAE is the same
    model = command.model or config.model
    if command.vae_only:
        check_vae_place(config.model, command.out, command.overwrite)
    else:
        check_place(model, command.out, command.overwrite)
    device = choose_device(command.device)
    vae, step = load_trained_vae(command.run_dir, command.weights, base=config.model, device=device)
    print(f"{command.run_dir}: the decoder of step {step} ({command.weights})")
    told, path = write_safety(command.run_dir, config, vae, step, count=command.pictures, side=command.side)
    for line in told:
        print(f"  {line}")
    vae.to("cpu")
    if command.vae_only:
        written = bake_vae(vae, config.model, command.out, dtype=command.dtype or "fp32", overwrite=command.overwrite)
        print(f"{written}: the VAE alone, read back bit for bit")
        return
    schedule = True if command.zero_terminal_snr else False if command.no_zero_terminal_snr else None
    options = MendConfig(
        prediction=command.prediction, zero_terminal_snr=schedule, dtype=command.dtype, title=command.title
    )
    mended = bake_model(vae, model, command.out, options, overwrite=command.overwrite)
    for change in mended.changes:
        print(f"  {change}")
    for line in mended.told:
        print(f"! {line}")
    print(f"{mended.path}: {mended.bytes / 1e9:.2f} GB, read back bit for bit; the numbers behind the verdicts: {path}")
    if mended.sidecar:
        print(f"{mended.sidecar}: for A1111, which reads it where it stands beside the file")
