"""Train a model, or go on training: on a run directory that holds checkpoints the same command resumes.

    sumizome train run.toml
    sumizome train run.toml --steps 20000 --optim.lr 2e-5
    torchrun --nproc-per-node 8 -m sumizome train run.toml        one process a card: DDP, or --parallel.strategy fsdp

Ctrl-C or SIGTERM finishes the step, writes a checkpoint and stops; SIGUSR1 writes a checkpoint and goes on.
Exit status: 0 all steps are done, 75 stopped and saved (run the same command again), 2 an error that the message
explains, 70 another rank hangs.
"""

from typing import TYPE_CHECKING

from sumizome.cli.quick_imports import quick_imports
from sumizome.train.config import TrainConfig as Command

if TYPE_CHECKING:
    from sumizome.train.build import DenoisingTrainer

__all__ = ["Command", "run"]


def run(command: Command) -> None:
    """Trains, showing progress; what the run writes is described in `sumizome.train.run_dir`."""
    with quick_imports():
        from sumizome.cli.training_session import run_session
        from sumizome.train.build import build_trainer

    run_session(command, build_trainer, _opening, _closing_words)


def _closing_words(trainer: "DenoisingTrainer") -> str:
    run_dir, steps = trainer.config.run_dir, trainer.config.steps
    return f"{run_dir}: step {steps} saved; try `sumizome sample --model {run_dir} --prompt … --out pictures`"


def _opening(trainer: "DenoisingTrainer") -> str:
    config, count = trainer.config, sum(p.numel() for p in trainer.parameters.values())
    spans = config.spans()
    batch = spans[0].images_per_step
    stages = "".join(
        f"\nstage {span.name}: to step {span.last}, {span.images_per_step} images a step of {span.latents}"
        for span in spans
        if len(spans) > 1
    )
    start = f"resuming at step {trainer.steps_done}" if trainer.steps_done else "from the base model"
    ranks = trainer.ranks.world
    where = trainer.device.type if ranks == 1 else f"{ranks} × {trainer.device.type}, {trainer.parallel.strategy}"
    return (
        f"{config.run_dir}: {count / 1e6:.1f} M parameters on {where} ({config.precision}), "
        f"{trainer.loader.plan.samples_per_epoch} images an epoch, "
        f"{len(trainer.loader.validation_rows)} held out for validation, {batch} a step, "
        f"{config.steps} steps, {start}{stages}"
    )
