"""A decoder's run: what moves and what never does, resuming, NaN, precision, and that it gets better."""

import io
import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sumizome.data.buckets import BucketConfig
from sumizome.data.ingest import ingest
from sumizome.data.manifest import load_manifest, write_manifest
from sumizome.errors import CheckpointError, ConfigError, NonFiniteError
from sumizome.models.vae import model_digest
from sumizome.models.vae_file import load_vae
from sumizome.prepare import PrepareConfig, prepare_latents
from sumizome.train.checkpoint import PARTS, list_checkpoints, open_checkpoint
from sumizome.train.config import CheckpointConfig
from sumizome.train.metrics import read_metrics
from sumizome.train.optim import OptimConfig
from sumizome.train.run_dir import hold_run_dir, load_trained_model
from sumizome.train.trainer import StepReport, Trainer
from sumizome.vae.bake import bake_vae
from sumizome.vae.build import build_vae_trainer, check_encoder, open_pictures
from sumizome.vae.config import DecoderValidationConfig, VaeTrainConfig
from sumizome.vae.crop_loader import CropBatch
from sumizome.vae.crops import CropConfig
from sumizome.vae.discriminator import AdversarialConfig
from sumizome.vae.evaluation import Candidate, evaluate_decoders, held_out_windows
from sumizome.vae.losses import DecoderLossConfig
from sumizome.vae.trained_vae import load_trained_vae


def train(config: VaeTrainConfig, until: int | None = None) -> Trainer:
    """Trains to the end, or stops after step `until` as Ctrl-C would."""
    with hold_run_dir(config.run_dir):
        trainer, _ = build_vae_trainer(config)
        with closing(trainer.steps()) as steps:
            list(_until(steps, until))
    return trainer


def _until(steps: Iterator[StepReport], until: int | None) -> Iterator[StepReport]:
    for report in steps:
        yield report
        if report.steps_done == until:
            return


def state(config: VaeTrainConfig) -> dict[str, torch.Tensor]:
    newest = open_checkpoint(list_checkpoints(config.run_dir / "checkpoints")[-1])
    tensors = {f"{part}:{name}": value for part in PARTS for name, value in newest.read(part).items()}
    return tensors | {"step": torch.tensor(newest.step)}


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture
def adversarial(config: VaeTrainConfig) -> VaeTrainConfig:
    """The adversary learns from the second step on, and has a word from the third."""
    return replace(config, adversarial=AdversarialConfig(weight=0.1, start=1, warmup_steps=2, width=8))


def test_a_killed_run_goes_on_bit_for_bit_with_its_adversary(adversarial: VaeTrainConfig) -> None:
    train(adversarial)
    killed = replace(
        adversarial,
        run_dir=adversarial.run_dir.with_name("killed"),
        checkpoint=CheckpointConfig(every=2, asynchronous=False),
    )
    with hold_run_dir(killed.run_dir):
        trainer, _ = build_vae_trainer(killed)
        steps = trainer.steps()
        assert [next(steps).steps_done for _ in range(3)] == [1, 2, 3]
        with pytest.raises(RuntimeError, match="killed"):
            steps.throw(RuntimeError("killed"))  # saves nothing, as a kill does
    assert int(state(killed)["step"]) == 2
    train(killed)
    a, b = state(adversarial), state(killed)
    assert_equal_states(a, b)
    assert any(name.startswith("weights:discriminator.") for name in a)
    assert any(name.startswith("optimizer:discriminator.") for name in a)
    assert not any(name.startswith("ema:discriminator.") for name in a)
    records = [read_metrics(c.run_dir / "metrics.jsonl") for c in (adversarial, killed)]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    assert {"l1", "l2", "structure", "blocking", "adversarial", "discriminator"} == set(records[0][-1]["loss_of"])


def test_the_encoder_keeps_its_bits_and_the_decoder_does_not(config: VaeTrainConfig) -> None:
    start = load_vae(config.model)
    trainer = train(replace(config, steps=2))
    vae, step = load_trained_vae(config.run_dir)
    assert step == 2
    for part in ("encoder", "quant_conv"):
        assert model_digest(getattr(vae, part)) == model_digest(getattr(start, part))
        assert model_digest(getattr(trainer.task.vae, part)) == model_digest(getattr(start, part))
    for part in ("decoder", "post_quant_conv"):
        assert model_digest(getattr(vae, part)) != model_digest(getattr(start, part))
    assert check_encoder(trainer) == trainer.facts["base_model"]["encoder"]
    with torch.no_grad():
        trainer.task.vae.encoder.conv_in.bias[0] += 1e-6
    with pytest.raises(Exception, match="latents would no longer fit"):
        check_encoder(trainer)


def test_the_adversary_moves_no_decoder_before_its_word_counts(config: VaeTrainConfig) -> None:
    alone = replace(config, steps=1)
    beside = replace(
        alone,
        run_dir=alone.run_dir.with_name("beside"),
        adversarial=AdversarialConfig(weight=0.1, start=0, warmup_steps=10, width=8),
    )
    train(alone), train(beside)
    a, b = state(alone), state(beside)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert any(name.startswith("optimizer:discriminator.") for name in b)


@pytest.mark.parametrize("what", ["pixels", "region"])
def test_nan_in_an_image_stops_the_run_names_it_and_moves_nothing(
    config: VaeTrainConfig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with hold_run_dir(config.run_dir):
        trainer, _ = build_vae_trainer(config)
        bad = trainer.loader.step(1)[1].sample_ids[0]
        honest = type(trainer.loader).step

        def poisoned(self: object, step: int) -> list[CropBatch]:
            batches = honest(self, step)
            if step == 1:
                getattr(batches[1], what)[0, 0, 5, 5] = math.nan
            return batches

        monkeypatch.setattr(type(trainer.loader), "step", poisoned)
        steps = trainer.steps()
        next(steps)
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        with pytest.raises(NonFiniteError, match=f"step 2: the loss is not finite, in samples {bad}"):
            next(steps)
    assert all(torch.equal(p.detach(), before[name]) for name, p in trainer.parameters.items())
    assert int(state(config)["step"]) == 1


def test_bfloat16_learns_what_float32_learns(config: VaeTrainConfig) -> None:
    long = replace(config, steps=8, micro_batches_per_step=1)
    half = replace(long, run_dir=long.run_dir.with_name("half"), precision="bf16")
    train(long), train(half)
    records = [read_metrics(c.run_dir / "metrics.jsonl") for c in (long, half)]
    for a, b in zip(*records, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
        assert b["weighted_loss"] == pytest.approx(a["weighted_loss"], rel=0.05)
    start = load_vae(long.model)
    moved = [
        load_trained_vae(c.run_dir)[0].decoder.conv_out.weight - start.decoder.conv_out.weight for c in (long, half)
    ]
    assert torch.nn.functional.cosine_similarity(*(m.detach().flatten() for m in moved), dim=0) > 0.9
    assert all(tensor.dtype == torch.float32 for name, tensor in state(half).items() if name.startswith("weights:"))


def test_held_out_pictures_get_better_and_the_run_says_so(config: VaeTrainConfig) -> None:
    watched = replace(
        config,
        steps=30,
        log_every=10,
        optim=OptimConfig(lr=1e-3, warmup_steps=5),
        validation=DecoderValidationConfig(every=30, count=3, shown=3),
    )
    train(watched)
    before, after = (r["validation"] for r in read_metrics(watched.run_dir / "metrics.jsonl") if "validation" in r)
    assert after["psnr"] > before["psnr"] + 0.3
    assert after["ssim"] > before["ssim"]
    assert after["ms_ssim"] > before["ms_ssim"]


def test_a_run_of_decoders_is_no_model_and_says_what_to_do(config: VaeTrainConfig) -> None:
    train(replace(config, steps=1))
    with pytest.raises(CheckpointError, match="`sumizome vae bake` puts it into a model"):
        load_trained_model(config.run_dir)


def test_another_start_or_other_pictures_are_refused(config: VaeTrainConfig, tmp_path: Path) -> None:
    train(replace(config, steps=1))
    with pytest.raises(ConfigError, match=r"losses\.blocking = 0\.2, now it is 0\.5"):
        train(replace(config, losses=replace(config.losses, blocking=0.5)))
    other = tmp_path / "other"
    other.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number * 40, 0, 0)).save(other / f"{number}.png")
    write_manifest(ingest([other], workers=0).manifest, tmp_path / "other.parquet")
    with pytest.raises(CheckpointError, match="trained with other manifest"):
        train(replace(config, manifest=tmp_path / "other.parquet"))


def test_the_same_latents_in_another_order_are_refused(config: VaeTrainConfig, pictures: Path, tmp_path: Path) -> None:
    folder, latents = tmp_path / "drawn", tmp_path / "latents"
    shutil.copytree(pictures, folder)
    vae = load_vae(config.model)
    later = (folder / "000.png").rename(tmp_path / "000.png")

    def prepare() -> Path:
        write_manifest(ingest([folder], workers=0).manifest, tmp_path / "m.parquet")
        manifest = load_manifest(tmp_path / "m.parquet")
        list(prepare_latents(manifest, vae, latents, PrepareConfig(BucketConfig(area=48, step=16))))
        return tmp_path / "m.parquet"

    prepare()
    later.rename(folder / "000.png")  # the first one, behind all others
    config = replace(config, manifest=prepare(), latents=latents)
    train(config, until=1)
    train(config, until=2)
    shutil.rmtree(latents)
    prepare()
    with pytest.raises(CheckpointError, match="with another order of latents than there is now"):
        train(config)


def test_what_cannot_be_is_said_before_anything_is_loaded(config: VaeTrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"nothing is ever fetched.*losses\.lpips_weights"):
        replace(config, losses=DecoderLossConfig(lpips=0.1))
    with pytest.raises(ConfigError, match="the other terms do not hold colours"):
        replace(config, losses=DecoderLossConfig(l1=0.0, l2=0.0))
    with pytest.raises(ConfigError, match='take "ddp"'):
        replace(config, parallel=replace(config.parallel, strategy="fsdp"))
    with pytest.raises(ConfigError, match="multiple of 16"):
        CropConfig(side=100)


# -- longer ones ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jpeg_in_the_training_set_raises_blockiness_without_the_term_and_not_with_it(
    config: VaeTrainConfig, pictures: Path, tmp_path: Path
) -> None:
    """Pictures saved as JPEG 30 are learned from; clean ones, held out, are decoded."""
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "JPEG", quality=30)
        (folder / f"{path.stem}.jpg").write_bytes(buffer.getvalue())
    write_manifest(ingest([folder], workers=0).manifest, tmp_path / "jpeg.parquet")
    long = replace(
        config,
        steps=100,
        micro_batch_size=8,
        micro_batches_per_step=1,
        optim=OptimConfig(lr=1e-3, warmup_steps=5),
        validation=DecoderValidationConfig(every=0, count=3),
    )
    # The tiny model's own decoder draws a grid already (its factor is 4): the start is one that has unlearned it.
    train(replace(long, run_dir=tmp_path / "clean"))
    start = bake_vae(load_trained_vae(tmp_path / "clean")[0], config.model, tmp_path / "start")
    candidates = [Candidate("start", load_vae(start), "")]
    for blocking in (0.0, DecoderLossConfig().blocking):
        run = replace(
            long,
            model=start,
            manifest=tmp_path / "jpeg.parquet",
            run_dir=tmp_path / f"blocking{blocking}",
            losses=DecoderLossConfig(blocking=blocking),
        )
        train(run)
        candidates.append(Candidate(f"term {blocking}", load_trained_vae(run.run_dir)[0], ""))
    clean = list(held_out_windows(open_pictures(config.manifest), 3, 64))
    table, _ = evaluate_decoders(candidates, clean)
    before, without, with_term = (row["values"]["blockiness"]["value"] for row in table["rows"][:3])
    print(f"blockiness: start {before:.3f}, without the term {without:.3f}, with it {with_term:.3f}")
    assert without > 1.1 * before
    assert with_term <= 1.02 * before


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(config: VaeTrainConfig, tmp_path: Path) -> None:
    import subprocess
    import sys

    from sumizome.settings import to_toml

    alone = replace(config, adversarial=AdversarialConfig(weight=0.1, start=1, warmup_steps=2, width=8))
    train(alone)
    together = replace(alone, run_dir=tmp_path / "together")
    settings = tmp_path / "together.toml"
    settings.write_text(to_toml(together))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "sumizome", "vae", "train", str(settings)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    a, b = state(alone), state(together)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-5, msg=lambda told, name=name: f"{name}: {told}")
    losses = [[r["loss"] for r in read_metrics(c.run_dir / "metrics.jsonl") if "loss" in r] for c in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
