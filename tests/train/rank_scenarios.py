"""What each of two ranks does in `test_two_ranks.py`: all scenarios in one start, since a start costs seconds.

Called with the run's TOML file; every scenario trains in a run directory of its own beside that of the file.
"""

import json
import math
import multiprocessing
import os
import signal
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sumizome.distributed.parallelize import ParallelConfig, local, parallelize, whole
from sumizome.distributed.runtime import Ranks, join_ranks
from sumizome.errors import CheckpointError, ConfigError, NonFiniteError
from sumizome.settings import read_toml
from sumizome.train.build import build_trainer
from sumizome.train.config import BrightnessConfig, CheckpointConfig, PreviewConfig, TrainConfig
from sumizome.train.ema import Ema, EmaConfig
from sumizome.train.lookout import Lookout
from sumizome.train.run_dir import hold_run_dir
from sumizome.train.trainer import Trainer

KILLED_AFTER = 3
"""steps: one of the second stage"""


def train(config: TrainConfig, ranks: Ranks, until: int | None = None) -> Trainer:
    with hold_run_dir(config.run_dir, ranks):
        trainer, _ = build_trainer(config, ranks)
        with closing(trainer.steps()) as reports:
            for report in reports:
                if report.steps_done == until:
                    break
    return trainer


def scenarios(config: TrainConfig, ranks: Ranks) -> dict[str, object]:
    found: dict[str, object] = {}
    work = config.run_dir.parent

    def at(name: str, strategy: str = "ddp", **changes: object) -> TrainConfig:
        return replace(config, run_dir=work / name, parallel=ParallelConfig(strategy=strategy), **changes)

    train(at("ddp"), ranks)
    fsdp = at("fsdp", "fsdp", preview=PreviewConfig(every=3, canvas=(32, 32), sampling_steps=1, prompts=("a",)))
    train(replace(fsdp, ema=replace(fsdp.ema, device="cpu")), ranks, until=3)
    train(at("hybrid", "hybrid"), ranks)  # one group of two
    found["resumed at"] = build_and_train_on(at("alone", "fsdp"), ranks)

    train(at("staged", stage=staged(config).stage), ranks)
    found["killed run began again at"] = build_and_train_on(killed(config), ranks)

    eight_bit = replace(config.optim, name="adamw8bit", text_encoder_lr=0.0)
    train(at("eight", optim=eight_bit), ranks)
    train(at("eight in parts", optim=eight_bit), ranks, until=2)
    found["8-bit moments"] = build_and_train_on(at("eight in parts", optim=eight_bit), ranks)

    # One rank is asked to stop; both do, after the same step.
    stopping = at("stopping")
    with hold_run_dir(stopping.run_dir, ranks):
        trainer, _ = build_trainer(stopping, ranks)
        for report in trainer.steps():
            if report.steps_done == 1 and ranks.rank == 1:
                trainer.asked.stop = True
        found["stopped after"] = trainer.steps_done
        # Another trainer on a directory that is held.
        found["refused"] = refused(stopping, ranks, CheckpointError)

    found["stopped in a look after"] = [
        stopped_in_a_look(at(f"{look} {strategy}", strategy), look, ranks)
        for strategy in ("ddp", "fsdp")
        for look in ("validation", "preview", "brightness")
    ]
    found["no equal shares"] = refused(at("odd", micro_batches_per_step=3), ranks, ConfigError)
    found["without wandb"] = without_wandb(at("no wandb", wandb="project"), ranks)
    found["logs that cannot be opened"] = logs_in_the_way(at("no logs"), ranks)
    found["nan"] = not_finite_on_one_rank(at("nan"), ranks)
    found["before, at and after a look"] = [outputs_around_a_look(name, ranks) for name in ("ddp", "fsdp", "hybrid")]
    return found


def stopped_in_a_look(config: TrainConfig, look: str, ranks: Ranks) -> list[int]:
    """Steps done and saved when rank 1 is asked to stop as a look begins that is due after each step."""
    small = {"every": 1, "canvas": (32, 32), "sampling_steps": 1, "prompts": ("a",)}
    looks = {
        "validation": replace(config.validation, every=1),
        "preview": PreviewConfig(**small),
        "brightness": BrightnessConfig(**small, wanted=(0.5,), seeds=1),
    }
    config = replace(config, validation=replace(config.validation, every=0))
    with hold_run_dir(config.run_dir, ranks):
        trainer, _ = build_trainer(replace(config, **{look: looks[look]}), ranks)
        (observer,) = trainer.observers

        def interrupted(step: int, metrics: object, lookout: Lookout) -> str | None:
            trainer.asked.stop = ranks.rank == 1 and step > 0
            return observer.look(step, metrics, lookout)

        trainer.observers = [replace(observer, look=interrupted)]
        for _ in trainer.steps():
            pass
    return [trainer.steps_done, trainer.saver.saved_step or 0]


def outputs_around_a_look(strategy: str, ranks: Ranks) -> list[float]:
    """What a network with a block answers with its weights, with an average of zeros, and with its weights again."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 1))
    nn.utils.vector_to_parameters(torch.full((45,), 0.5), network.parameters())
    parallel = parallelize(
        {"network": network}, lambda whole: [whole[1]], ranks, ParallelConfig(strategy=strategy, shard_size=2)
    )
    ema = Ema(EmaConfig(), dict(network.named_parameters()))
    for average in ema.average.values():
        local(average).zero_()

    def answer() -> torch.Tensor:
        return parallel.forward(network, torch.ones(1, 4)).sum()

    before = answer()
    before.backward()
    with ema.applied(), torch.no_grad():
        seen = answer()
    return [float(output) for output in (before, seen, answer())]


def staged(config: TrainConfig) -> TrainConfig:
    return read_toml(config.run_dir.with_name("staged.toml"), TrainConfig)


def killed(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        run_dir=config.run_dir.with_name("killed"),
        stage=staged(config).stage,
        parallel=ParallelConfig(strategy="ddp"),
        checkpoint=CheckpointConfig(every=1, keep=4),
    )


def train_until_killed(config: TrainConfig, ranks: Ranks) -> None:
    """Ends by SIGKILL once a step of the second stage is done, whatever is being written."""
    with hold_run_dir(config.run_dir, ranks):
        trainer, _ = build_trainer(config, ranks)
        for report in trainer.steps():
            if report.steps_done == KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)


def build_and_train_on(config: TrainConfig, ranks: Ranks) -> int:
    with hold_run_dir(config.run_dir, ranks):
        trainer, _ = build_trainer(config, ranks)
        begun = trainer.steps_done
        for _ in trainer.steps():
            pass
    return begun


def refused(config: TrainConfig, ranks: Ranks, error: type[Exception]) -> str:
    try:
        train(config, ranks)
    except error as refusal:
        return str(refusal)
    return ""


def without_wandb(config: TrainConfig, ranks: Ranks) -> str:
    """What each rank says where the first one lacks wandb, which no other needs."""
    if ranks.is_first:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    said = refused(config, ranks, ConfigError)
    if ranks.is_first:
        del sys.modules["wandb"]
    return said


def logs_in_the_way(config: TrainConfig, ranks: Ranks) -> int:
    """Steps done where the logs' places are taken."""
    if ranks.is_first:
        (config.run_dir / "metrics.jsonl").mkdir(parents=True)
        (config.run_dir / "samples").write_text("")
    ranks.gather(None)
    return train(config, ranks).steps_done


def not_finite_on_one_rank(config: TrainConfig, ranks: Ranks) -> dict[str, object]:
    """NaN in the loss of rank 1's second sample: what each rank says, and whether its weights moved."""
    with hold_run_dir(config.run_dir, ranks):
        trainer, _ = build_trainer(config, ranks)
        honest = trainer.task.objective.loss

        def poisoned(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weighted, unweighted = honest(*arguments)
            return weighted * torch.tensor([1.0, math.nan if ranks.rank == 1 else 1.0]), unweighted

        objective = replace(trainer.task.objective, loss=poisoned)
        trainer.task = replace(trainer.task, objective=objective)
        before = {name: whole(p.detach()).clone() for name, p in trainer.parameters.items()}
        said = ""
        try:
            list(trainer.steps())
        except NonFiniteError as error:
            said = str(error)
        unmoved = all(torch.equal(whole(p.detach()), before[name]) for name, p in trainer.parameters.items())
        culprit = ranks.gather(trainer.loader.step(0)[0].sample_ids[1])[1]
    return {
        "said": said,
        "unmoved": unmoved,
        "culprit": culprit,
        "checkpoints": len(list(config.run_dir.glob("checkpoints/step*"))),
    }


def doomed(number: int, settings: TrainConfig) -> None:
    port = str(int(os.environ["MASTER_PORT"]) + 1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "MASTER_PORT": port}
    with join_ranks("cpu", timeout=300) as joined:
        train_until_killed(killed(settings), joined)


def rank(number: int, settings: TrainConfig) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    with join_ranks("cpu", timeout=300) as joined:
        result = scenarios(settings, joined)
        settings.run_dir.with_name(f"found-{joined.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    # One process imports, which costs more than all the training, and all ranks are forks of it.
    read = read_toml(Path(sys.argv[1]), TrainConfig)
    pair = [multiprocessing.get_context("fork").Process(target=doomed, args=(number, read)) for number in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert pair[0].exitcode == -signal.SIGKILL
    other = multiprocessing.get_context("fork").Process(target=rank, args=(1, read))
    other.start()
    rank(0, read)
    other.join()
    sys.exit(other.exitcode)
