"""Two ranks train what one process trains: DDP, FSDP2 and hybrid, resumes across world sizes, and one NaN."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import short_run

from sumizome.data.captions import CaptionConfig
from sumizome.settings import to_toml
from sumizome.train.build import build_trainer
from sumizome.train.checkpoint import PARTS, list_checkpoints, open_checkpoint
from sumizome.train.config import TrainConfig, ValidationConfig
from sumizome.train.metrics import read_metrics
from sumizome.train.optim import OptimConfig
from sumizome.train.run_dir import hold_run_dir, load_trained_model
from sumizome.train.stages import Stage

pytestmark = pytest.mark.xdist_group("two ranks")  # one process runs the ranks once for all of these tests

SCENARIOS = Path(__file__).with_name("rank_scenarios.py")
STAGES = (Stage(steps=2, name="broad"), Stage(lr=5e-5, micro_batch_size=1, micro_batches_per_step=2))


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    saved = open_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    return {f"{part}:{name}": value for part in PARTS for name, value in saved.read(part).items()}


def train(config: TrainConfig, until: int | None = None) -> None:
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        for report in trainer.steps():
            trainer.asked.stop = report.steps_done + 1 == until


def samples(run_dir: Path) -> list[dict[str, Any]]:
    """The sample logs of all ranks, in the order of the global batch."""
    lines = [line for path in (run_dir / "samples").glob("rank-*.jsonl") for line in read_metrics(path)]
    return sorted(lines, key=lambda line: (line["step"], line["place"]))


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line}


class Runs:
    def __init__(self, work: Path, found: list[dict[str, Any]]) -> None:
        self.work, self.found = work, found


@pytest.fixture(scope="module")
def config(small_folder: Path, tiny_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return short_run(
        small_folder,
        tiny_latents,
        tmp_path_factory.mktemp("ranks") / "whole",
        micro_batches_per_step=4,
        log_samples=True,
        captions=CaptionConfig(tag_dropout=0.2, caption_dropout=0.2),
        optim=OptimConfig(lr=1e-4, text_encoder_lr=1e-4, warmup_steps=1, eps=1e-3),
        validation=ValidationConfig(every=4, count=2, timesteps=(100, 999)),
    )


@pytest.fixture(scope="module")
def runs(config: TrainConfig) -> Runs:
    """One process's run, the start of another, and all that two ranks do."""
    work = config.run_dir.parent
    train(config)
    train(replace(config, run_dir=work / "alone"), until=2)
    staged = replace(config, run_dir=work / "staged alone", stage=STAGES)
    train(staged)
    (work / "staged.toml").write_text(to_toml(staged))
    (work / "run.toml").write_text(to_toml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(SCENARIOS), str(work / "run.toml")],
        env={**os.environ, **ranks, **quiet, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Runs(work, [json.loads((work / f"found-{rank}.json").read_text()) for rank in (0, 1)])


@pytest.mark.parametrize("name", ["ddp", "hybrid", "alone"])
def test_two_ranks_train_what_one_process_trains(config: TrainConfig, runs: Runs, name: str) -> None:
    expected, found = state(config.run_dir), state(runs.work / name)
    assert found.keys() == expected.keys()
    # Sums of gradients in another order; Adam divides by the root of their square, hence the large epsilon above.
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-5)
    assert samples(runs.work / name) == samples(config.run_dir)
    whole, shared = losses(config.run_dir), losses(runs.work / name)
    assert shared.keys() == whole.keys() == {1, 2, 3, 4}
    assert all(shared[step] == pytest.approx(whole[step], rel=1e-5) for step in whole)
    a, b = (read_metrics(d / "metrics.jsonl")[-1]["validation_loss"] for d in (config.run_dir, runs.work / name))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("name", ["staged", "killed"])
def test_a_staged_run_of_two_ranks_is_that_of_one_even_when_it_is_killed(runs: Runs, name: str) -> None:
    expected, found = state(runs.work / "staged alone"), state(runs.work / name)
    assert found.keys() == expected.keys()
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-5)
    assert samples(runs.work / name) == samples(runs.work / "staged alone")
    assert [len(line["samples"]) for line in samples(runs.work / name)] == [2] * 8 + [1] * 4
    stages = [line["stage"] for line in read_metrics(runs.work / name / "metrics.jsonl") if "loss" in line]
    assert stages == ["broad", "broad", "2", "2"]


def test_a_kill_across_a_stages_end_leaves_no_trace(runs: Runs) -> None:
    assert all(0 < found["killed run began again at"] <= 3 for found in runs.found)
    undisturbed, found = state(runs.work / "staged"), state(runs.work / "killed")
    assert [tensor for tensor in undisturbed if not torch.equal(undisturbed[tensor], found[tensor])] == []


def test_8_bit_moments_are_resumed_bit_for_bit_under_ddp(runs: Runs) -> None:
    assert [found["8-bit moments"] for found in runs.found] == [2, 2]
    whole, parts = state(runs.work / "eight"), state(runs.work / "eight in parts")
    assert whole.keys() == parts.keys()
    assert [tensor for tensor in whole if not torch.equal(whole[tensor], parts[tensor])] == []
    assert {tensor.dtype for name, tensor in whole.items() if name.endswith("/state1")} >= {torch.uint8}


def test_a_run_of_one_process_goes_on_sharded_over_two(runs: Runs) -> None:
    assert [found["resumed at"] for found in runs.found] == [2, 2]
    shards = sorted(path.name for path in (runs.work / "alone/checkpoints/step-00000004/ema").iterdir())
    assert [name[:11] for name in shards] == ["shard-00001", "shard-00002"]


def test_a_sharded_run_goes_on_in_one_process(config: TrainConfig, runs: Runs) -> None:
    assert (runs.work / "fsdp/previews/step-00000003.png").is_file()
    sharded = replace(config, run_dir=runs.work / "fsdp")
    model, step = load_trained_model(sharded.run_dir)
    assert step == 3
    average = open_checkpoint(list_checkpoints(sharded.run_dir / "checkpoints")[-1]).read("ema")
    assert all(torch.equal(p, average[f"unet.{name}"]) for name, p in model.unet.named_parameters())
    train(sharded)
    expected, found = state(config.run_dir), state(sharded.run_dir)
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-5)
    assert samples(sharded.run_dir) == samples(config.run_dir)


def test_who_is_asked_to_stop_stops_all(runs: Runs) -> None:
    assert [found["stopped after"] for found in runs.found] == [2, 2]


def test_a_stop_within_a_look_stops_all_before_another_step(runs: Runs) -> None:
    assert [found["stopped in a look after"] for found in runs.found] == [[[1, 1]] * 6] * 2


def test_a_directory_that_is_held_is_refused_on_every_rank(runs: Runs) -> None:
    assert all("another trainer is at work here (process" in found["refused"] for found in runs.found)


def test_ranks_that_cannot_share_a_step_are_told_what_to_set(runs: Runs) -> None:
    assert all("cannot be shared evenly by 2 processes" in found["no equal shares"] for found in runs.found)


def test_a_first_rank_without_wandb_keeps_no_other_waiting(runs: Runs) -> None:
    assert all("pip install 'sumizome[wandb]'" in found["without wandb"] for found in runs.found)


def test_logs_that_cannot_be_opened_end_no_run_of_two_ranks(runs: Runs) -> None:
    assert [found["logs that cannot be opened"] for found in runs.found] == [4, 4]


def test_nan_on_one_rank_moves_no_weight_and_names_the_sample(runs: Runs) -> None:
    for found in runs.found:
        nan = found["nan"]
        assert nan["unmoved"]
        assert nan["checkpoints"] == 0
        assert f"step 1: the loss is not finite, in samples {nan['culprit']}" in nan["said"]
        assert "(rank 1)" in nan["said"]


def test_a_step_after_a_look_at_the_average_computes_with_the_weights(runs: Runs) -> None:
    for found in runs.found:
        for before, seen, after in found["before, at and after a look"]:
            assert seen == 0
            assert after == before != 0
