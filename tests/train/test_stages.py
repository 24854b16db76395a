"""Stages: laid out in closed form, resumed inside any of them bit for bit, and no held-out picture is trained on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from short_runs import short_run

from sumizome.data.captions import CaptionConfig
from sumizome.errors import CheckpointError, ConfigError
from sumizome.settings import read_toml, to_toml
from sumizome.train.build import build_trainer
from sumizome.train.checkpoint import PARTS, list_checkpoints, open_checkpoint
from sumizome.train.config import TrainConfig, ValidationConfig
from sumizome.train.metrics import read_metrics
from sumizome.train.optim import OptimConfig
from sumizome.train.run_dir import hold_run_dir, read_run_config
from sumizome.train.stages import Stage, lay_out, samples_before, span_at
from sumizome.train.summary import TRAINING_KEY, training_summary

if TYPE_CHECKING:
    from sumizome.models.sdxl import SDXLModel

RUN = {"latents": Path("all"), "lr": 1e-3, "micro_batch_size": 4, "micro_batches_per_step": 2}


def test_stages_lie_end_to_end_and_fill_in_what_is_the_runs() -> None:
    stages = [
        Stage(steps=10, name="broad"),
        Stage(latents="few", lr=5e-4, micro_batch_size=1, micro_batches_per_step=3),
    ]
    broad, last = spans = lay_out(stages, 25, **RUN)
    assert (broad.first, broad.last, broad.name, broad.latents, broad.lr_factor) == (0, 10, "broad", Path("all"), 1.0)
    assert (last.first, last.last, last.name, last.latents, last.lr_factor) == (10, 25, "2", "few", 0.5)
    assert [span_at(spans, step).number for step in (0, 9, 10, 24, 99)] == [0, 0, 1, 1, 1]
    assert [samples_before(spans, step) for step in (0, 9, 10, 11, 25)] == [0, 72, 80, 83, 125]
    (alone,) = lay_out([], 7, **RUN)
    assert (alone.first, alone.last, samples_before([alone], 7)) == (0, 7, 56)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([Stage(), Stage(steps=5)], "only the last"),
        ([Stage(steps=5), Stage(steps=6)], "take 5 steps and all 11, but steps is 10"),
        ([Stage(steps=10), Stage()], "steps is 10"),
    ],
)
def test_stages_that_do_not_end_with_the_run_are_refused(stages: list[Stage], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lay_out(stages, 10, **RUN)


@pytest.fixture(scope="module")
def curated(tagged_folder: Path, tiny: "SDXLModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the tagged pictures, at a higher resolution."""
    from sumizome.data.buckets import BucketConfig
    from sumizome.data.ingest import ingest
    from sumizome.prepare import PrepareConfig, prepare_latents

    folder = tmp_path_factory.mktemp("chosen")
    for path in sorted(tagged_folder.glob("*.png"))[::2]:
        Image.open(path).resize((80, 80)).save(folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(path.with_suffix(".txt").read_text())
    out = folder.with_name("curated")
    for _ in prepare_latents(
        ingest([folder], workers=0).manifest, tiny.vae, out, PrepareConfig(BucketConfig(64, step=16))
    ):
        pass
    return out


@pytest.fixture
def config(small_folder: Path, tiny_latents: Path, curated: Path, tmp_path: Path) -> TrainConfig:
    return short_run(
        small_folder,
        tiny_latents,
        tmp_path / "run",
        steps=6,
        stage=(
            Stage(steps=2, name="broad"),
            Stage(steps=4, latents=str(curated), lr=5e-4, micro_batch_size=1, micro_batches_per_step=3),
        ),
        log_every=3,
        log_samples=True,
        captions=CaptionConfig(tag_dropout=0.2, caption_dropout=0.2),
        optim=OptimConfig(lr=1e-3, warmup_steps=1, lr_schedule="linear"),
        validation=ValidationConfig(every=0, count=2),
    )


def train(config: TrainConfig, until: int | None = None) -> None:
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        for report in trainer.steps():
            trainer.asked.stop = report.steps_done + 1 == until


def state(config: TrainConfig) -> dict[str, torch.Tensor]:
    newest = open_checkpoint(list_checkpoints(config.run_dir / "checkpoints")[-1])
    return {f"{part}:{name}": value for part in PARTS for name, value in newest.read(part).items()}


def samples(config: TrainConfig) -> list[dict[str, object]]:
    return [json.loads(line) for line in (config.run_dir / "samples" / "rank-00000.jsonl").read_text().splitlines()]


def test_a_run_resumes_inside_and_between_its_stages_bit_for_bit(config: TrainConfig) -> None:
    train(config)
    parts = replace(config, run_dir=config.run_dir.with_name("parts"))
    for until in (2, 4, None):  # where they meet, and inside the second
        train(parts, until)
    whole, resumed = state(config), state(parts)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert samples(config) == samples(parts)

    records = [r for r in read_metrics(config.run_dir / "metrics.jsonl") if "loss" in r]
    # A record does not mix stages; warm-up and shape run through each.
    assert [(r["step"], r["stage"], r["samples_seen"]) for r in records] == [
        (2, "broad", 8),
        (3, "2", 11),
        (6, "2", 20),
    ]
    assert [r["lr"] for r in records] == pytest.approx([1e-3, 5e-4, 5e-4 * (1 - 2 / 3)])


def test_a_relative_run_directory_is_recorded_in_full(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.run_dir.parent)
    here = replace(config, run_dir=Path("run"), validation=ValidationConfig(every=6, count=2, timesteps=(999,)))
    train(here)
    assert read_run_config(Path("run")).run_dir == config.run_dir
    readme = (config.run_dir / "README.txt").read_text()
    assert f"sumizome train {config.run_dir}/config.toml" in readme
    assert "samples/" in readme and "previews/" not in readme
    assert {record["stage"] for record in read_metrics(Path("run/metrics.jsonl"))} == {"broad", "2"}


def test_no_stage_trains_on_what_is_held_out_and_none_repeats_anothers_noise(config: TrainConfig) -> None:
    config = replace(config, steps=40, stage=(config.stage[0], replace(config.stage[1], steps=38)))
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        held_out = {id_ for batch in trainer.loader.validation_batches(4) for id_ in batch.sample_ids}
        of_steps = [trainer.loader.step(step) for step in range(40)]
    assert len(held_out) == 2
    trained = [{id_ for batch in batches for id_ in batch.sample_ids} for batches in of_steps]
    assert not held_out & set().union(*trained)
    assert of_steps[1][0].latents.shape[-1] < of_steps[2][0].latents.shape[-1]
    assert [len(batches) for batches in of_steps[:4]] == [2, 2, 3, 3]
    seeds = [{int(seed) for batch in batches for seed in batch.seeds} for batches in of_steps]
    assert not set().union(*seeds[:2]) & set().union(*seeds[2:])


def test_what_has_begun_stays_and_what_comes_may_change(config: TrainConfig, tiny_latents: Path) -> None:
    train(config, until=3)
    first, second = config.stage
    for changed in (
        (first, replace(second, lr=1e-4)),
        (replace(first, steps=1), replace(second, steps=5)),
        (replace(first, micro_batch_size=1), second),
    ):
        with pytest.raises(ConfigError, match=r"would train something else; restore \[\[stage\]\]"):
            train(replace(config, stage=changed))
    with pytest.raises(CheckpointError, match=f"trained on other latents than those of {tiny_latents} "):
        train(replace(config, stage=(first, replace(second, latents=str(tiny_latents)))))
    train(replace(config, stage=(first, second, Stage(steps=1, latents=str(tiny_latents), lr=1e-4)), steps=7))
    assert read_metrics(config.run_dir / "metrics.jsonl")[-1]["stage"] == "3"


def test_what_holds_for_the_run_holds_for_every_stage(config: TrainConfig) -> None:
    fused = replace(config, stage=(), micro_batches_per_step=1, optim=replace(config.optim, fused_backward=True))
    with pytest.raises(ConfigError, match="micro_batches_per_step cannot be 3; set it to 1"):
        replace(fused, stage=config.stage)
    replace(fused, stage=(config.stage[0], replace(config.stage[1], micro_batches_per_step=1)))  # is allowed


def test_a_rate_that_is_no_number_is_refused() -> None:
    for lr in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ConfigError, match=r"stage\.lr is"):
            Stage(lr=lr)


def test_a_stage_appended_behind_a_finished_one_is_no_longer_run(config: TrainConfig, tiny_latents: Path) -> None:
    train(config)
    longer = replace(config, steps=7, stage=(config.stage[0], replace(config.stage[1], steps=5)))
    with hold_run_dir(config.run_dir):
        assert "the end of stage '2' was step 6 and is now step 7" in build_trainer(longer)[1][0]
    more = replace(config, steps=7, stage=(*config.stage, Stage(latents=str(tiny_latents))))
    with hold_run_dir(config.run_dir):
        assert build_trainer(more)[1] == []


def test_an_export_tells_of_the_stage_that_it_is_of(config: TrainConfig, curated: Path) -> None:
    train(config)
    told = training_summary(config.run_dir, 6, "ema")
    ours = json.loads(told.metadata[TRAINING_KEY])
    assert (ours["samples_seen"], ours["global_batch_size"], ours["resolution"]) == (20, 3, "64x64")
    assert [(stage["name"], stage["steps"], stage["lr"]) for stage in ours["stages"]] == [
        ("broad", 2, 1e-3),
        ("2", 4, 5e-4),
    ]
    assert told.metadata["ss_unet_lr"] == "0.0005"
    assert told.metadata["ss_batch_size_per_device"] == "1"


def test_a_settings_file_holds_stages(config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))
    assert "[[stage]]" in path.read_text()
    assert read_toml(path, TrainConfig) == config
    path.write_text(path.read_text().replace("micro_batch_size = 1", "micro_batchsize = 1"))
    with pytest.raises(
        ConfigError, match=r"unknown key 'stage\.micro_batchsize'; did you mean 'stage\.micro_batch_size'"
    ):
        read_toml(path, TrainConfig)


def test_a_warm_up_longer_than_a_stage_to_come_is_told(config: TrainConfig) -> None:
    long = replace(config, optim=replace(config.optim, warmup_steps=3))
    with hold_run_dir(config.run_dir):
        trainer, (told,) = build_trainer(long)
        assert "stage 'broad' has 2 steps" in told
        for report in trainer.steps():
            trainer.asked.stop = report.steps_done == 2
    with hold_run_dir(config.run_dir):
        assert build_trainer(long)[1] == []  # that stage is over
