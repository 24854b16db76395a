"""The run as a whole: it learns, it resumes bit for bit, and it refuses to train what it should not."""

import hashlib
import importlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import short_run

from sumizome.data.buckets import BucketConfig
from sumizome.data.captions import CaptionConfig
from sumizome.data.ingest import ingest
from sumizome.data.tags import TagWeightConfig
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.distributed.parallelize import ParallelConfig
from sumizome.distributed.runtime import Ranks
from sumizome.distributed.watchdog import verdict
from sumizome.errors import CheckpointError, ConfigError, NonFiniteError, ShardError
from sumizome.models.sdxl import SDXLModel, load_model
from sumizome.prepare import PrepareConfig, prepare_latents
from sumizome.train.build import build_trainer
from sumizome.train.checkpoint import PARTS, list_checkpoints, open_checkpoint
from sumizome.train.config import BrightnessConfig, CheckpointConfig, PreviewConfig, TrainConfig, ValidationConfig
from sumizome.train.metrics import read_metrics
from sumizome.train.mirror import CheckpointMirror
from sumizome.train.optim import OptimConfig
from sumizome.train.run_dir import hold_run_dir, load_trained_model, read_run_config
from sumizome.train.trainer import Asked, StepReport


@pytest.fixture
def config(tiny_folder: Path, tiny_latents: Path, tmp_path: Path) -> TrainConfig:
    return short_run(
        tiny_folder,
        tiny_latents,
        tmp_path / "run",
        log_every=2,
        captions=CaptionConfig(tag_dropout=0.2, caption_dropout=0.2),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, lr_schedule="cosine"),
    )


def train(config: TrainConfig, until: int | None = None) -> list[StepReport]:
    """Trains to the end, or stops after step `until` as Ctrl-C would."""
    with hold_run_dir(config.run_dir):
        trainer, warnings = build_trainer(config)
        assert not warnings
        with closing(trainer.steps()) as steps:
            return list(_until(steps, until))


def _until(steps: Iterator[StepReport], until: int | None) -> Iterator[StepReport]:
    for report in steps:
        yield report
        if report.steps_done == until:
            return


def state(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, and the step."""
    newest = open_checkpoint(list_checkpoints(config.run_dir / "checkpoints")[-1])
    tensors = {f"{part}:{name}": value for part in PARTS for name, value in newest.read(part).items()}
    return tensors | {"step": torch.tensor(newest.step)}


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("text_encoder_lr", [0.0, 1e-3])
def test_four_steps_are_two_a_resume_and_two_bit_for_bit(config: TrainConfig, text_encoder_lr: float) -> None:
    config = replace(config, optim=replace(config.optim, text_encoder_lr=text_encoder_lr))
    train(config)
    parts = replace(config, run_dir=config.run_dir.with_name("parts"))
    assert [report.steps_done for report in train(parts, until=2)] == [1, 2]
    assert int(state(parts)["step"]) == 2
    assert [report.steps_done for report in train(parts)] == [3, 4]
    assert_equal_states(state(config), state(parts))
    assert any(name.startswith("weights:text_encoder_2.") for name in state(config)) == bool(text_encoder_lr)
    whole, resumed = (read_metrics(c.run_dir / "metrics.jsonl") for c in (config, parts))
    assert [r["loss"] for r in whole] == [r["loss"] for r in resumed]


def test_watching_a_run_does_not_change_it(config: TrainConfig) -> None:
    train(config)
    watched = replace(
        config,
        run_dir=config.run_dir.with_name("watched"),
        log_every=1,
        tensorboard=True,
        validation=replace(config.validation, every=1),
        preview=PreviewConfig(every=2, prompts=("a", "b"), canvas=(32, 32), sampling_steps=2),
        brightness=BrightnessConfig(every=4, canvas=(32, 32), sampling_steps=2, seeds=2),
        peak_tflops=0.01,
        checkpoint=CheckpointConfig(every=1, keep=2),
    )
    train(watched)
    assert_equal_states(state(config), state(watched))
    assert len(list_checkpoints(watched.run_dir / "checkpoints")) == 2
    assert sorted(p.name for p in (watched.run_dir / "previews").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    records = read_metrics(watched.run_dir / "metrics.jsonl")
    losses = [r["validation_loss"] for r in records if "validation_loss" in r]
    assert [set(loss) for loss in losses] == [{"100", "999"}] * 5  # and before the first step
    tests = [r for r in records if "brightness" in r]
    assert [r["step"] for r in tests] == [4]
    assert all(0 <= mean <= 1 for mean in tests[0]["brightness"].values())
    trained = [r for r in records if "loss" in r]
    for r in trained:
        squares = sum(norm**2 for norm in r["grad_norm_of"].values())
        assert squares == pytest.approx(r["grad_norm"] ** 2, rel=1e-4)
        assert r["mfu"] == pytest.approx(r["tflop_per_second"] / 0.01)
        assert r["memory_gb"]["resident"] > 0.1
    # Every picture of the set bears general tags alone: the category's loss is the loss.
    assert [r["loss_by_category"] for r in trained] == [{"general": pytest.approx(r["loss"])} for r in trained]


def test_it_learns_and_says_so(config: TrainConfig) -> None:
    long = replace(
        config,
        steps=40,
        log_every=10,
        optim=replace(config.optim, lr=2e-3, warmup_steps=5),
    )
    reports = train(long)
    records = read_metrics(long.run_dir / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < 0.8 * losses[0]
    assert max(r.get("samples_seen", 0) for r in records) == 40 * 4
    assert (
        sum(len(r["loss_by_timestep"]) for r in records if "loss" in r) == 40
    )  # every tenth of the schedule, each time
    assert all(0 < report.images_per_second < math.inf for report in reports)


def test_a_loss_that_is_not_finite_names_step_and_sample_and_changes_nothing(config: TrainConfig) -> None:
    train(config, until=2)
    before = state(config)
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        bad = trainer.loader.step(2)[1].sample_ids[0]
        honest = trainer.task.objective.loss

        def poisoned(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weighted, unweighted = honest(*arguments)
            return weighted * torch.tensor([math.nan if poisoned.calls else 1.0, 1.0]), unweighted

        poisoned.calls = 0

        def counted(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            result = poisoned(*arguments)
            poisoned.calls += 1
            return result

        trainer.task = replace(trainer.task, objective=replace(trainer.task.objective, loss=counted))
        with pytest.raises(NonFiniteError, match=f"step 3: the loss is not finite, in samples {bad}\\."):
            list(trainer.steps())
        for name, parameter in trainer.parameters.items():
            assert torch.equal(parameter, before[f"weights:{name}"])
    assert_equal_states(state(config), before)


def test_a_gradient_that_is_not_finite_stops_the_run_too(config: TrainConfig) -> None:
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        parameter = next(iter(trainer.parameters.values()))
        parameter.register_hook(lambda gradient: gradient * math.inf)
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        with pytest.raises(NonFiniteError, match="step 1: the gradient is not finite"):
            list(trainer.steps())
        assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(config: TrainConfig) -> None:
    config = replace(config, checkpoint=CheckpointConfig(every=2))
    train(config)
    done = state(config)
    newest = list_checkpoints(config.run_dir / "checkpoints")[-1]
    (damaged,) = (newest / "ema").iterdir()
    damaged.write_bytes(b"")
    with hold_run_dir(config.run_dir):
        trainer, warnings = build_trainer(config)
        assert trainer.steps_done == 2
        assert str(damaged) in warnings[0]
        assert [report.steps_done for report in trainer.steps()] == [3, 4]
    assert_equal_states(state(config), done)


def test_what_would_train_something_else_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    train(config, until=1)
    for changed, words in (
        (replace(config, seed=1), "seed = 0, now it is 1"),
        (replace(config, optim=replace(config.optim, lr=5e-4)), "optim.lr"),
        (replace(config, validation=replace(config.validation, count=5)), "validation.count"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(changed)
    constant = replace(config, run_dir=tmp_path / "constant", optim=replace(config.optim, lr_schedule="constant"))
    train(constant, until=1)
    allowed = replace(constant, steps=2, log_every=1, validation=replace(config.validation, every=1, timesteps=(5,)))
    assert [report.steps_done for report in train(allowed)] == [2]


def test_rows_of_a_tag_table_without_effect_are_told_when_training_begins(config: TrainConfig, tmp_path: Path) -> None:
    table = tmp_path / "tags.csv"
    table.write_text("tag,weight\nshape_1,2.0\nshap_2,2.0\n", "utf-8")
    trainer, warnings = build_trainer(replace(config, tag_weights=TagWeightConfig(table=table)))
    assert warnings == [f"1 of the 2 rows of {table} have no effect: no picture has such a tag (shap 2)"]
    assert trainer.loader.tag_weight.std() > 0, "the row with an underscore has one"


def test_an_edited_tag_table_is_refused_on_resuming(config: TrainConfig, tmp_path: Path) -> None:
    table = tmp_path / "tags.csv"
    table.write_text("tag,category,weight\nshape_1,general,2.0\n", "utf-8")
    config = replace(config, steps=2, tag_weights=TagWeightConfig(table=table))
    train(config, until=1)
    environment = json.loads((config.run_dir / "environment.json").read_text())
    assert environment["tag_table_sha256"] == hashlib.sha256(table.read_bytes()).hexdigest()
    table.write_text("tag,category,weight\nshape_1,general,1.0\n", "utf-8")
    with pytest.raises(ConfigError, match="tag_weights was edited since"):
        train(config)
    table.write_text("tag,category,weight\nshape_1,general,2.0\n", "utf-8")
    assert [report.steps_done for report in train(config)] == [2]


def test_another_base_model_or_other_latents_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    from sumizome.export import write_diffusers_folder
    from sumizome.models.tiny import build_tiny_model

    train(config, until=1)
    other = build_tiny_model(seed=1)
    folder = write_diffusers_folder(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="another base model"):
        train(replace(config, model=folder))
    other.vae.post_quant_conv.bias.data += 1
    foreign = write_diffusers_folder(other, tmp_path / "foreign")
    with pytest.raises(ShardError, match="VAE"):
        train(replace(config, model=foreign, run_dir=tmp_path / "fresh"))


def test_the_same_pictures_in_another_order_are_refused(
    config: TrainConfig, tagged_folder: Path, tiny: SDXLModel, tmp_path: Path
) -> None:
    latents, fewer = tmp_path / "latents", Path(shutil.copytree(tagged_folder, tmp_path / "fewer"))
    first = sorted(fewer.glob("*.png"))[0]
    first.unlink()

    def prepare(folder: Path) -> None:
        manifest = ingest([folder], workers=0).manifest
        list(prepare_latents(manifest, tiny.vae, latents, PrepareConfig(BucketConfig(area=32, step=16))))

    config = replace(config, latents=latents)
    prepare(fewer)
    prepare(tagged_folder)  # one picture more, which stands behind all others
    train(config, until=1)
    prepare(tagged_folder)  # nothing to do, so nothing is another
    train(config, until=2)
    shutil.rmtree(latents)
    prepare(tagged_folder)  # now it stands where the manifest has it, and nothing else tells
    with pytest.raises(CheckpointError, match="stand in another order now"):
        train(config)


def test_two_trainers_on_one_run_directory(config: TrainConfig) -> None:
    with hold_run_dir(config.run_dir), pytest.raises(CheckpointError, match="another trainer is at work here"):
        train(config)


def test_the_trained_model_comes_back_as_it_was(config: TrainConfig) -> None:
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        list(trainer.steps())
    for weights, expected in (("raw", trainer.parameters), ("ema", trainer.ema.average)):
        model, step = load_trained_model(config.run_dir, weights)
        assert step == 4
        assert model.prediction_type == "v_prediction"
        found = dict(model.unet.named_parameters())
        assert all(torch.equal(found[name.removeprefix("unet.")], value) for name, value in expected.items())
    assert read_run_config(config.run_dir) == config


def test_a_directory_without_a_run_is_one_line(tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(CheckpointError, match="not a run directory"):
        load_trained_model(tmp_path)
    train(config, until=1)
    shutil.rmtree(config.run_dir / "checkpoints")
    (config.run_dir / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_trained_model(config.run_dir)


def test_bf16_stays_close_to_fp32(config: TrainConfig) -> None:
    train(config)
    half = replace(config, run_dir=config.run_dir.with_name("half"), precision="bf16")
    train(half)
    a, b = (read_metrics(c.run_dir / "metrics.jsonl")[0]["loss"] for c in (config, half))
    assert a == pytest.approx(b, rel=0.02)
    assert all(value.dtype == torch.float32 for name, value in state(half).items() if name.startswith("weights:"))


def test_gradient_checkpointing_changes_no_bit(config: TrainConfig) -> None:
    train(config)
    other = replace(config, run_dir=config.run_dir.with_name("other"), gradient_checkpointing=True)
    train(other)
    assert_equal_states(state(config), state(other))


def test_the_command_trains_and_says_where_it_stands(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sumizome.cli.main import main
    from sumizome.settings import to_toml

    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))
    assert main(["train", str(path), "--steps", "12", "--log-every", "1", "--validation.every", "6"]) == 0
    text = capsys.readouterr().out
    assert "12 steps, from the base model" in text
    assert "step 12: validation loss" in text
    assert "step 12 saved" in text
    assert main(["train", str(path), "--steps", "12"]) == 0
    assert "already at step 12" in capsys.readouterr().out
    assert main(["train", str(path), "--steps", "13", "--seed", "5"]) == 2
    assert "seed = 0, now it is 5" in capsys.readouterr().err


def test_captions_that_do_not_fit_are_counted_and_no_validation_is_no_error(
    config: TrainConfig, tmp_path: Path
) -> None:
    captions = replace(config.captions, tag_dropout=0.0, caption_dropout=0.0, separator=", " + "long " * 40)
    config = replace(config, captions=captions, validation=ValidationConfig(every=1, count=0), log_every=4)
    train(config)
    (record,) = read_metrics(config.run_dir / "metrics.jsonl")
    assert record["captions_cut"] == 4 * 4  # three tags and eighty words between them, one chunk of 75 tokens


BEFORE_AND_AFTER = {"base_loss", "validation_loss"}


@torch.no_grad()
def epsilon_error(model: SDXLModel, config: TrainConfig, t: int) -> float:
    """The mean of (ε̂ − ε)² / ᾱ over the held-out pictures, the network asked in its own schedule."""
    from sumizome.diffusion.schedule import build_noise_schedule
    from sumizome.models.conditioning import apply_unet
    from sumizome.models.text_encoding import tokenize
    from sumizome.train.step import condition, draw_noise

    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
    alpha = float(build_noise_schedule(config.schedule).alphas_cumprod[t])
    own = build_noise_schedule(model.schedule_config).alphas_cumprod
    nearest = int(((own / (1 - own)).log() - math.log(alpha / (1 - alpha))).abs().argmin())
    errors = []
    for batch in trainer.loader.validation_batches(2):
        noise = draw_noise(batch.seeds, batch.latents.shape[1:])
        noised = alpha**0.5 * batch.latents + (1 - alpha) ** 0.5 * noise
        asked = torch.full((len(noise),), nearest)
        answer = apply_unet(
            model.unet, noised, asked, condition(model, batch, tokenize(batch.captions, config.max_chunks))
        )
        errors += ((answer - noise).square().flatten(1).mean(1) / alpha).tolist()
    return sum(errors) / len(errors)


def test_an_epsilon_base_goes_on_as_a_v_model(config: TrainConfig, tiny: SDXLModel, tmp_path: Path) -> None:
    from sumizome.export import write_diffusers_folder

    epsilon = replace(tiny, prediction_type="epsilon", schedule_config=ScheduleConfig(zero_terminal_snr=False))
    base = write_diffusers_folder(epsilon, tmp_path / "epsilon")
    assert load_model(base).prediction_type == "epsilon"
    steady = replace(config, model=base, validation=ValidationConfig(every=4, count=4, timesteps=(100, 500, 999)))
    train(steady)
    before, start, end = [r for r in read_metrics(config.run_dir / "metrics.jsonl") if r.keys() & BEFORE_AND_AFTER]
    assert (before["step"], start["step"], end["step"]) == (0, 0, 4)
    assert before["base_loss"]["999"] is None  # sigma 14.6 is as far as the base's own schedule goes
    # Independently: the v error of an epsilon answer is its epsilon error over √ᾱ, since x₀ follows from either.
    expected = epsilon_error(epsilon, steady, 500)
    assert before["base_loss"]["500"] == pytest.approx(expected, rel=1e-4)
    assert start["validation_loss"]["500"] != pytest.approx(expected, rel=1e-2)
    table = (config.run_dir / "loss_by_timestep.txt").read_text().splitlines()
    assert [line.split()[:2] for line in table if line.strip().startswith(("100", "500", "999"))] == [
        [t, f"{before['base_loss'][t]:.4f}" if t != "999" else "–"] for t in ("100", "500", "999")
    ]
    assert "The base predicts epsilon" in (config.run_dir / "README.txt").read_text()
    model, _ = load_trained_model(config.run_dir)
    assert (model.prediction_type, model.schedule_config.zero_terminal_snr) == ("v_prediction", True)


def test_a_run_whose_base_model_was_swapped_is_not_sampled(config: TrainConfig, tmp_path: Path) -> None:
    from sumizome.export import write_diffusers_folder
    from sumizome.models.tiny import build_tiny_model

    train(config, until=1)
    other = write_diffusers_folder(build_tiny_model(seed=5), tmp_path / "other")
    path = config.run_dir / "config.toml"
    path.write_text(path.read_text().replace(str(config.model), str(other)))
    with pytest.raises(CheckpointError, match="another base model: the text encoders"):
        load_trained_model(config.run_dir)


def test_pictures_that_cannot_be_drawn_are_refused_before_training(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="65×64"):
        train(replace(config, preview=PreviewConfig(every=1, canvas=(65, 64))))
    with pytest.raises(ConfigError, match="64×65"):
        train(replace(config, brightness=BrightnessConfig(every=1, canvas=(64, 65))))
    assert not (config.run_dir / "metrics.jsonl").exists()


def test_what_fails_after_a_step_costs_no_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("sumizome.train.observers.write_preview", broken)
    config = replace(config, checkpoint=CheckpointConfig(every=1), preview=PreviewConfig(every=1, canvas=(32, 32)))
    with pytest.raises(RuntimeError, match="a bug"):
        train(config)
    assert int(state(config)["step"]) == 1


def test_pictures_and_tables_that_find_no_room_are_told_and_the_run_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    monkeypatch.setattr("sumizome.train.uptraining.write_atomically", full)
    config = replace(
        config,
        preview=PreviewConfig(every=1, canvas=(32, 32), sampling_steps=1, prompts=("a",)),
        validation=replace(config.validation, every=1),
    )
    reports = train(config)
    assert [report.steps_done for report in reports] == [1, 2, 3, 4]
    told = [note for report in reports for note in report.notes if "cannot be written" in note]
    assert [note.split(" cannot")[0] for note in told] == ["loss_by_timestep.txt", "the preview"]  # once each
    assert "No space left on device" in told[0] and "No space left on device" in told[1]
    assert list((config.run_dir / "previews").iterdir()) == []


def test_pictures_are_drawn_with_as_many_chunks_as_captions_have(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("preview", "brightness"):
        module = importlib.import_module(f"sumizome.train.{name}")

        def recorded(*arguments: Any, honest: Any = module.draw_pictures, **options: Any) -> Any:
            found.append(options["max_chunks"])
            return honest(*arguments, **options)

        monkeypatch.setattr(module, "draw_pictures", recorded)
    small = {"every": 1, "canvas": (32, 32), "sampling_steps": 1, "prompts": ("a",)}
    looks = {"preview": PreviewConfig(**small), "brightness": BrightnessConfig(**small, wanted=(0.5,), seeds=1)}
    optim = replace(config.optim, warmup_steps=0)
    train(replace(config, steps=1, max_chunks=2, optim=optim, **looks))
    assert found == [2, 2]


def test_a_stop_is_saved_and_nothing_is_looked_at(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system kills half a minute after it asked: previews must not come first."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sumizome.train.observers.write_preview", killed)
    config = replace(config, preview=PreviewConfig(every=2, canvas=(32, 32)))
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        reports = []
        for report in trainer.steps():
            trainer.asked.stop = True
            reports.append(report)
    assert reports[-1].notes == ("checkpoint", "asked to stop, so there is no preview")
    assert int(state(config)["step"]) == 2


@pytest.mark.parametrize(
    ("look", "piece"),
    [
        ("validation", "validation.denoising_loss"),
        ("preview", "preview.draw_pictures"),
        ("brightness", "brightness.draw_pictures"),
    ],
)
def test_a_stop_within_a_look_ends_it_at_its_next_piece(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, look: str, piece: str
) -> None:
    """Neither the rest of the look nor one more step comes before the checkpoint."""
    small = {"canvas": (32, 32), "sampling_steps": 2}
    looks = {
        "validation": replace(config.validation, every=2),
        "preview": PreviewConfig(every=2, **small),
        "brightness": BrightnessConfig(every=2, seeds=1, **small),
    }
    config = replace(config, **{look: looks[look]})
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        module = importlib.import_module(f"sumizome.train.{piece.split('.')[0]}")
        honest, pieces = getattr(module, piece.split(".")[1]), 0

        def interrupted(*arguments: Any, **options: Any) -> Any:
            nonlocal pieces
            if trainer.steps_done:
                trainer.asked.stop = True
                pieces += 1
            return honest(*arguments, **options)

        monkeypatch.setattr(module, piece.split(".")[1], interrupted)
        reports = list(trainer.steps())
        assert [report.steps_done for report in reports] == [1, 2]
        assert reports[-1].notes[-1] == f"asked to stop, so there is no {look}"
        saved = state(config)
        assert all(torch.equal(p, saved[f"weights:{name}"]) for name, p in trainer.parameters.items())
    assert pieces == 1
    assert int(saved["step"]) == 2
    assert not list((config.run_dir / "previews").glob("*"))
    records = [r for r in read_metrics(config.run_dir / "metrics.jsonl") if r["step"] == 2]
    assert not any({"validation_loss", "brightness"} & r.keys() for r in records)


def test_a_last_checkpoint_that_is_not_in_the_mirror_is_told(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sumizome.cli.main import main
    from sumizome.settings import to_toml

    monkeypatch.setattr(CheckpointMirror, "put", lambda *_: ["step-00000004 is not in the mirror: no answer"])
    config = replace(config, checkpoint=CheckpointConfig(every=0, mirror=str(tmp_path / "there")))
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert main(["train", str(tmp_path / "run.toml")]) == 0
    assert "warning: step-00000004 is not in the mirror: no answer" in capsys.readouterr().out


def test_a_run_whose_directory_is_lost_goes_on_from_its_mirror(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, checkpoint=CheckpointConfig(every=0, mirror=str(tmp_path / "there")))
    train(config, until=2)
    shutil.rmtree(config.run_dir)
    with hold_run_dir(config.run_dir), pytest.raises(ConfigError, match="started with seed = 0, now it is 1"):
        build_trainer(replace(config, seed=1))
    shutil.rmtree(config.run_dir)
    (tmp_path / "there/config.toml").unlink()  # as mirrors were before
    with hold_run_dir(config.run_dir):
        trainer, (told,) = build_trainer(config)
    assert "step-00000002 was brought back" in told
    assert trainer.steps_done == 2


def test_a_longer_cosine_is_said_to_be_another_run(config: TrainConfig) -> None:
    train(config)
    with hold_run_dir(config.run_dir):
        _, warnings = build_trainer(replace(config, steps=8))
    assert "steps was 4 and is now 8" in warnings[0]


def test_the_watchdog_waits_for_the_first_step_of_a_process_and_not_for_its_second(config: TrainConfig) -> None:
    def verdicts(until: int) -> list[tuple[int, bool]]:
        """(step, whether standing still within it ends the run) of each backward pass."""
        with hold_run_dir(config.run_dir):
            trainer, _ = build_trainer(config)
            honest, found = trainer.task.objective.loss, []

            def looked_at(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                sign = trainer._watchdog.sign
                found.append((sign.step, bool(verdict([sign] * 2, [1.0] * 2, [500.0] * 2, timeout=10.0))))
                return honest(*arguments)

            trainer.task = replace(trainer.task, objective=replace(trainer.task.objective, loss=looked_at))
            with closing(trainer.steps()) as steps:
                list(_until(steps, until))
        return sorted(set(found))

    assert verdicts(until=2) == [(1, False), (2, True)]
    assert verdicts(until=4) == [(3, False), (4, True)]  # a resume compiles anew


def test_a_save_that_is_asked_for_within_the_last_words_of_a_step_is_made(config: TrainConfig) -> None:
    class Interrupted(Asked):
        """The signal's handler runs just behind the second time that the loop looks."""

        looks = 0
        asked_for = False

        @property
        def save(self) -> bool:
            self.looks += 1
            before, self.asked_for = self.asked_for, self.asked_for or self.looks == 2
            return before

        @save.setter
        def save(self, value: bool) -> None:
            self.asked_for = value

    config = replace(config, checkpoint=CheckpointConfig(every=0, keep=9))
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        trainer.asked = Interrupted()
        list(trainer.steps())
    assert len(list_checkpoints(config.run_dir / "checkpoints")) == 2  # what was asked for, and the last


def test_a_first_step_that_is_not_finite_claims_no_saved_weights(config: TrainConfig) -> None:
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        next(iter(trainer.parameters.values())).register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(NonFiniteError, match="No step was done, nothing is saved"):
            list(trainer.steps())
    assert list_checkpoints(config.run_dir / "checkpoints") == []


@pytest.mark.parametrize("asynchronous", [True, False])
def test_two_failed_saves_are_warnings_and_the_run_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    from sumizome.train.checkpoint import flush_to_disk

    def flush(path: Path) -> None:
        if any(step in str(path) for step in ("step-00000001", "step-00000002")):
            raise OSError(28, "No space left on device")
        flush_to_disk(path)

    monkeypatch.setattr("sumizome.train.checkpoint.flush_to_disk", flush)
    checkpoint = CheckpointConfig(every=1, asynchronous=asynchronous)
    reports = train(replace(config, checkpoint=checkpoint))
    told = [note for report in reports for note in report.notes if "could not be written" in note]
    assert [f"step-{step:08d}" in note for step, note in zip((1, 2), told, strict=True)] == [True, True]
    assert [path.name for path in list_checkpoints(config.run_dir / "checkpoints")][-1] == "step-00000004"


def test_a_warm_up_longer_than_the_run_is_told(config: TrainConfig) -> None:
    with hold_run_dir(config.run_dir):
        _, (told,) = build_trainer(replace(config, optim=replace(config.optim, warmup_steps=8)))
    assert told == (
        "optim.warmup_steps is 8, but the run has 4 steps, so that its learning rate reaches only 50% of its peak; "
        "set optim.warmup_steps to less than 4"
    )


MEMORY_SAVERS = {
    "8-bit Adam": {"optim": {"name": "adamw8bit"}},
    "Adafactor": {"optim": {"name": "adafactor"}},
    "fused backward": {"optim": {"fused_backward": True}},
    "bfloat16 weights": {"precision": "pure_bf16"},
    "bfloat16 weights, fused, average and text encoders in main memory": {
        "precision": "pure_bf16",
        "offload_text_encoders": True,
        "gradient_checkpointing": True,
        "optim": {"fused_backward": True},
        "ema": {"device": "cpu"},
    },
}


@pytest.mark.parametrize("settings", MEMORY_SAVERS.values(), ids=MEMORY_SAVERS.keys())
def test_what_saves_memory_trains_and_resumes_bit_for_bit(config: TrainConfig, settings: dict[str, Any]) -> None:
    nested = {name: replace(getattr(config, name), **settings[name]) for name in ("optim", "ema") if name in settings}
    config = replace(config, micro_batches_per_step=1, **{**settings, **nested})
    reports = train(config)
    assert all(math.isfinite(report.loss) for report in reports)
    parts = replace(config, run_dir=config.run_dir.with_name("parts"))
    train(parts, until=2)
    train(parts)
    whole = state(config)
    assert_equal_states(whole, state(parts))
    weights = {tensor.dtype for name, tensor in whole.items() if name.startswith("weights:")}
    assert weights == {torch.bfloat16 if config.precision == "pure_bf16" else torch.float32}
    assert {tensor.dtype for name, tensor in whole.items() if name.startswith("ema:")} == {torch.float32}
    load_trained_model(config.run_dir)  # in float32, from whatever the weights were trained in


def test_settings_of_one_device_or_of_frozen_encoders_are_refused_elsewhere(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="micro_batches_per_step"):
        replace(config, optim=replace(config.optim, fused_backward=True))
    with pytest.raises(ConfigError, match="text_encoder_lr"):
        replace(config, offload_text_encoders=True, optim=replace(config.optim, text_encoder_lr=1e-4))
    with pytest.raises(ConfigError, match="stochastically"):
        train(replace(config, precision="pure_bf16", optim=replace(config.optim, name="adafactor")))
    sharded = replace(config, parallel=ParallelConfig("fsdp"))
    for name in ("adafactor", "adamw8bit"):
        with pytest.raises(ConfigError, match=f'"{name}" cannot be cut over ranks'):
            build_trainer(replace(sharded, optim=replace(config.optim, name=name)), Ranks(world=2))


def test_a_fused_update_that_meets_infinity_is_not_saved(config: TrainConfig) -> None:
    config = replace(config, micro_batches_per_step=1, optim=replace(config.optim, fused_backward=True))
    train(config, until=2)
    before = state(config)
    with hold_run_dir(config.run_dir):
        trainer, _ = build_trainer(config)
        last = next(iter(trainer.parameters.values()))  # the backward pass comes to the first layer last
        last.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(NonFiniteError, match=r"gradient is not finite.*last checkpoint is what there is"):
            list(trainer.steps())
    assert_equal_states(state(config), before)
    assert [report.steps_done for report in train(config)] == [3, 4]


def test_offset_noise_is_trained_on_and_not_validated_with(config: TrainConfig) -> None:
    """The rate is too small to learn from: what differs is the noise."""
    validation = ValidationConfig(every=1, count=1, timesteps=(500, 999))
    still = replace(config, steps=1, optim=OptimConfig(lr=1e-12, warmup_steps=0), validation=validation)
    offset = replace(still, noise_offset=1.0, run_dir=config.run_dir.with_name("offset"))
    (plain_step,), (offset_step,) = train(still), train(offset)
    assert offset_step.loss != pytest.approx(plain_step.loss, rel=1e-3)
    records = [read_metrics(each.run_dir / "metrics.jsonl") for each in (still, offset)]
    plain, other = ([r["validation_loss"] for r in of_run if "validation_loss" in r] for of_run in records)
    assert plain and other[-1] == pytest.approx(plain[-1], rel=1e-5)
