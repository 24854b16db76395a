"""A new trainer put where its run directory stands: the newest whole checkpoint, found, checked and restored.

What every kind of run shares once its parts are built; what the parts are is `build`'s, or another task's own.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sumizome.distributed.runtime import Ranks
from sumizome.train.checkpoint import SavedCheckpoint, latest_checkpoint, remove_unfinished
from sumizome.train.mirror import CheckpointMirror
from sumizome.train.run_dir import record_run, recorded_settings
from sumizome.train.run_readme import code_facts, machine_facts
from sumizome.train.saver import Saver
from sumizome.train.stages import span_at
from sumizome.train.state import restore
from sumizome.train.task import Batches, RunSettings, Task
from sumizome.train.trainer import Trainer

__all__ = ["build_saver", "go_on"]


def build_saver(config: RunSettings, ranks: Ranks) -> Saver:
    """What writes the run's checkpoints, here and at their mirror."""
    options = config.checkpoint
    mirror = CheckpointMirror(options.mirror, options.keep) if options.mirror else None
    return Saver(
        config.run_dir / "checkpoints", ranks, keep=options.keep, asynchronous=options.asynchronous, mirror=mirror
    )


def go_on(
    trainer: Trainer[RunSettings, Task, Batches],
    told: Mapping[str, Any],
    check_origin: Callable[[SavedCheckpoint], None],
    write_readme: Callable[[Mapping[str, Any]], Any],
) -> list[str]:
    """Restores the newest whole checkpoint, if there is one, and records the run; returns what a user should be told.

    `told`: more for environment.json. `check_origin` refuses a checkpoint of another base or other data. Collective.
    Raises: ConfigError, CheckpointError, before anything is restored.
    """
    config, ranks, saver = trainer.config, trainer.ranks, trainer.saver
    checkpoints, mirror = saver.directory, saver.mirror
    ranks.first(lambda: remove_unfinished(checkpoints))
    complaints = ranks.first(lambda: mirror.bring_back(checkpoints)) if mirror else []
    saved, damages = latest_checkpoint(checkpoints, ranks=ranks)
    complaints += [f"{damage}; going on from the checkpoint before it" for damage in damages]
    if saved is not None:
        step = saved.step
        complaints += ranks.first(lambda: _lr_complaint(config, step))
        check_origin(saved)
    facts = {
        **trainer.facts,
        **code_facts(),
        **machine_facts(ranks.device),
        **told,
        "device": str(ranks.device),
        "ranks": ranks.world,
        "strategy": trainer.parallel.strategy,
    }
    ranks.first(lambda: record_run(config, facts))
    ranks.first(lambda: write_readme(facts))
    ranks.first(lambda: checkpoints.mkdir(exist_ok=True))
    if saved is not None:
        restore(saved, trainer.parameters, trainer.optimizer, trainer.ema)
        trainer.steps_done = trainer.saver.saved_step = saved.step
    return complaints + _warmup_complaint(config, trainer.steps_done)


def _lr_complaint(config: RunSettings, step: int) -> list[str]:
    """A word on a learning rate that depends on its stage's length, when that changes after the stage has begun."""
    if not (config.run_dir / "config.toml").exists():
        return []
    before, now = (span_at(each.spans(), step) for each in (recorded_settings(config), config))
    if config.optim.lr_schedule == "constant" or before.number != now.number or before.last == now.last:
        return []
    shape = f"the {config.optim.lr_schedule} learning rate"
    if len(config.spans()) > 1:
        return [
            f"the end of stage '{now.name}' was step {before.last} and is now step {now.last}: from here on {shape} is "
            f"that of a stage that ends there, so this is not the run that it would have been with that end from the "
            "start"
        ]
    return [
        f"steps was {before.last} and is now {now.last}: from here on {shape} is that of {now.last} steps, so this is "
        f"not the run that {now.last} steps from the start would have been"
    ]


def _warmup_complaint(config: RunSettings, steps_done: int) -> list[str]:
    """A word on a warm-up that outlasts the run or one of its stages: their rate never comes to its peak."""
    warmup, spans = config.optim.warmup_steps, config.spans()
    for span in spans:
        length = span.last - span.first
        if warmup > length and span.last > steps_done:
            whose = f"stage '{span.name}'" if len(spans) > 1 else "the run"
            return [
                f"optim.warmup_steps is {warmup}, but {whose} has {length} steps, so that its learning rate reaches "
                f"only {length / warmup:.0%} of its peak; set optim.warmup_steps to less than {length}"
            ]
    return []
