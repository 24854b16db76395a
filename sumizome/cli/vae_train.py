"""Finetune a VAE's decoder on your pictures, or go on: the encoder, and with it all latents, stay as they are.

    sumizome vae train decoder.toml
    sumizome vae train --model sd_xl_base_1.0.safetensors --manifest work/manifest.parquet --run-dir work/decoder
    torchrun --nproc-per-node 8 -m sumizome vae train decoder.toml --micro-batches-per-step 8

Ctrl-C or SIGTERM finishes the step, writes a checkpoint and stops; SIGUSR1 writes a checkpoint and goes on.
Exit status: 0 all steps are done, 75 stopped and saved (run the same command again), 2 an error that the message
explains, 70 another rank hangs.
"""

from typing import TYPE_CHECKING

from sumizome.cli.quick_imports import quick_imports
from sumizome.vae.config import VaeTrainConfig as Command

if TYPE_CHECKING:
    from sumizome.vae.build import DecoderTrainer

__all__ = ["Command", "run"]


def run(command: Command) -> None:
    """Trains, showing progress; what the run writes is described in `sumizome.train.run_dir`.

    Raises: ModelError if the encoder should ever have changed.
    """
    with quick_imports():
        from sumizome.cli.training_session import run_session
        from sumizome.vae.build import build_vae_trainer

    run_session(command, build_vae_trainer, _opening, _closing_words)


def _opening(trainer: "DecoderTrainer") -> str:
    config, loader = trainer.config, trainer.loader
    count = sum(p.numel() for name, p in trainer.parameters.items() if not name.startswith("discriminator."))
    ranks = trainer.ranks.world
    where = trainer.device.type if ranks == 1 else f"{ranks} × {trainer.device.type}, {trainer.parallel.strategy}"
    side = config.crops.side
    start = f"resuming at step {trainer.steps_done}" if trainer.steps_done else "from the model's own decoder"
    return (
        f"{config.run_dir}: {count / 1e6:.2f} M parameters of a decoder on {where} ({config.precision}), "
        f"{loader.plan.samples_per_epoch} {f'crops of {side} px' if side else 'whole canvases'} an epoch, "
        f"{len(loader.validation_rows)} pictures held out, {config.spans()[0].images_per_step} crops a step, "
        f"{config.steps} steps, {start}"
    )


def _closing_words(trainer: "DecoderTrainer") -> str:
    from sumizome.vae.build import check_encoder

    run_dir = trainer.config.run_dir
    digest = check_encoder(trainer)
    return (
        f"{run_dir}: step {trainer.steps_done} saved, the encoder is unchanged (SHA-256 {digest[:12]}…); "
        f"try `sumizome vae evaluate --model {run_dir} --out evaluation.html`"
    )
