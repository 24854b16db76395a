"""The plan's sums against closed forms, the optimizers' real state, and the advice against the plan itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sumizome.cli.main import main
from sumizome.data.buckets import BucketConfig
from sumizome.data.latent_plan import CachePlan, Fingerprint, write_plan
from sumizome.distributed.parallelize import ParallelConfig
from sumizome.distributed.runtime import Ranks
from sumizome.errors import ConfigError
from sumizome.models.architecture import unet_config
from sumizome.models.networks import build_network
from sumizome.models.tiny import build_tiny_model
from sumizome.planning.advice import way_to_fit
from sumizome.planning.memory import Cluster
from sumizome.planning.networks import Networks, read_networks
from sumizome.planning.plan import Plan, make_plan
from sumizome.planning.work import work_of
from sumizome.train.build import build_trainer
from sumizome.train.config import PreviewConfig, TrainConfig
from sumizome.train.flop import forward_flop
from sumizome.train.optim import OptimConfig, build_optimizer
from sumizome.train.stages import Stage
from sumizome.train.state import optimizer_tensors

BUCKETS = BucketConfig(area=64, step=16)


@pytest.fixture(scope="module")
def tiny_networks() -> Networks:
    model = build_tiny_model().to("meta")
    return Networks(model.unet, tuple(model.text_encoders), model.vae, 4, "tiny")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(model=tmp_path / "no", latents=tmp_path / "no", run_dir=tmp_path / "run", max_chunks=1)


def plan_of(config: TrainConfig, cluster: Cluster, networks: Networks, images: int = 0) -> Plan:
    return make_plan(config, cluster, networks, work_of(config, BUCKETS, images))


def test_the_state_is_what_training_allocates(tiny_networks: Networks, config: TrainConfig) -> None:
    for name, precision in (("adamw", "fp32"), ("adamw", "pure_bf16"), ("adafactor", "fp32"), ("adamw8bit", "fp32")):
        planned = replace(config, precision=precision, optim=OptimConfig(name=name))
        memory = plan_of(planned, Cluster(), tiny_networks, 1).memory
        dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
        parameters = {f"unet.{n}": p for n, p in build_tiny_model().unet.to(dtype).named_parameters()}
        optimizer = build_optimizer(planned.optim, parameters)
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = optimizer_tensors(optimizer, parameters)
        # bitsandbytes keeps small tensors in 32 bits, and its code book beside each: nothing at SDXL's size.
        held = sum(t.nbytes for key, t in state.items() if not key.endswith(("step", "qmap1", "qmap2")))
        assert memory.parts["optimizer"] == pytest.approx(held, rel=0.1 if name == "adamw8bit" else 1e-4)
        assert memory.parts["weights"] == sum(p.nbytes for p in parameters.values())


def test_sharding_divides_the_state_and_not_the_activations(tiny_networks: Networks, config: TrainConfig) -> None:
    config = replace(config, micro_batches_per_step=16)

    def parts(strategy: str, gpus: int) -> dict[str, float]:
        planned = replace(config, parallel=replace(config.parallel, strategy=strategy))
        cluster = Cluster(gpus=gpus, gpus_per_machine=4)
        return plan_of(planned, cluster, tiny_networks, 1).memory.parts

    whole, cut, hybrid = parts("ddp", 16), parts("fsdp", 16), parts("hybrid", 16)
    for part in ("weights", "gradients", "optimizer", "average"):
        assert cut[part] == pytest.approx(whole[part] / 16)
        assert hybrid[part] == pytest.approx(whole[part] / 4)
    config = replace(config, micro_batches_per_step=32)  # FSDP2 accumulates whole gradients until they cross ranks
    accumulated = {strategy: parts(strategy, 16)["gradients"] for strategy in ("ddp", "fsdp", "hybrid")}
    assert accumulated["fsdp"] == accumulated["ddp"] == whole["gradients"]
    assert accumulated["hybrid"] == hybrid["gradients"]


def test_flop_of_a_canvas_that_was_not_measured_are_those_of_its_forward_pass(
    tiny_networks: Networks, config: TrainConfig
) -> None:
    plan = plan_of(config, Cluster(), tiny_networks, 1)
    unet = tiny_networks.unet
    for canvas in ((64, 64), (48, 80)):
        direct = 3 * forward_flop(unet, canvas=canvas, vae_factor=4, tokens=77)
        text = plan.flop_by_bucket[canvas] - direct
        encoders = sum(
            p.numel() for e in tiny_networks.text_encoders for n, p in e.named_parameters() if "token_embed" not in n
        )
        assert text == pytest.approx(2 * 77 * encoders, rel=1e-3)


def test_time_is_flop_over_speed(tiny_networks: Networks, config: TrainConfig) -> None:
    config = replace(config, micro_batches_per_step=8, precision="bf16")
    cluster = Cluster(gpus=8, peak_tflops=(100.0, 50.0), mfu=0.5)
    plan = plan_of(config, cluster, tiny_networks, 1000)
    mean = sum(plan.flop_by_bucket.values()) / len(plan.flop_by_bucket)
    assert plan.seconds == pytest.approx(1000 * mean / (100e12 * 0.5 * 8))
    again = plan_of(replace(config, gradient_checkpointing=True), cluster, tiny_networks, 1000)
    assert again.seconds == pytest.approx(plan.seconds * 4 / 3)


def test_the_advice_makes_the_plan_fit_and_nothing_of_it_is_idle(tiny_networks: Networks, config: TrainConfig) -> None:
    plan = plan_of(config, Cluster(gpu_memory=1.3), tiny_networks, 1)
    assert plan.fits
    needed = plan.memory.total / 1e9
    tight = plan_of(config, Cluster(gpu_memory=needed * 0.96), tiny_networks, 1)
    assert not tight.fits
    changes, fitting = way_to_fit(tight, tiny_networks)
    assert changes and fitting.fits
    changed = config
    for change in changes:
        changed = change.apply(changed)
    assert changed == fitting.config
    hopeless = plan_of(config, Cluster(gpu_memory=0.5), tiny_networks, 1)
    assert not way_to_fit(hopeless, tiny_networks)[1].fits


@pytest.mark.parametrize(
    ("optim", "gpus"),
    [({"fused_backward": True}, 1), ({"name": "adamw8bit"}, 2), ({"name": "adafactor"}, 2)],
)
def test_no_advice_is_what_training_refuses(
    tiny_networks: Networks, config: TrainConfig, optim: dict[str, Any], gpus: int
) -> None:
    config = replace(config, micro_batches_per_step=gpus, optim=OptimConfig(**optim))
    changes, found = way_to_fit(plan_of(config, Cluster(gpus=gpus, gpu_memory=0.5), tiny_networks, 1), tiny_networks)
    assert changes and not found.fits
    assert found.strategy == ("ddp" if gpus > 1 else "none")


REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "8-bit Adam cut up": (2, {"optim": OptimConfig(name="adamw8bit"), "parallel": ParallelConfig("fsdp")}),
    "Adafactor cut up": (2, {"optim": OptimConfig(name="adafactor"), "parallel": ParallelConfig("hybrid")}),
    "fused backward on two": (2, {"optim": OptimConfig(fused_backward=True)}),
    "two alone": (2, {"parallel": ParallelConfig("none")}),
    "groups of three of four": (4, {"parallel": ParallelConfig("hybrid", shard_size=3)}),
    "8-bit Adam of bfloat16": (1, {"optim": OptimConfig(name="adamw8bit"), "precision": "pure_bf16"}),
    "epsilon from pure noise": (1, {"prediction_type": "epsilon"}),
    "a canvas between two": (1, {"preview": PreviewConfig(every=1, canvas=(65, 64))}),
}


@pytest.mark.parametrize(("gpus", "settings"), REFUSED.values(), ids=REFUSED.keys())
def test_no_run_is_planned_that_training_refuses(
    tiny_folder: Path, config: TrainConfig, gpus: int, settings: dict[str, Any]
) -> None:
    fused = "optim" in settings and settings["optim"].fused_backward
    config = replace(config, model=tiny_folder, micro_batches_per_step=1 if fused else gpus, **settings)
    with pytest.raises(ConfigError) as of_training:
        build_trainer(config, Ranks(world=gpus, local_world=gpus))
    with pytest.raises(ConfigError) as of_plan:
        plan_of(config, Cluster(gpus=gpus), read_networks(tiny_folder), 1)
    assert str(of_plan.value) == str(of_training.value)


def test_a_rate_of_no_part_is_not_planned(tiny_networks: Networks, config: TrainConfig) -> None:
    for text_encoder_lr, pattern in ((0.0, "unet.side"), (0.0, "text_encoder"), (1e-5, "text_encoder_3")):
        optim = OptimConfig(lr_of={pattern: 0.5}, text_encoder_lr=text_encoder_lr)
        with pytest.raises(ConfigError, match=f'lr_of "{pattern}" fits no parameter'):
            plan_of(replace(config, optim=optim), Cluster(), tiny_networks, 1)
    plan_of(replace(config, optim=replace(optim, lr_of={"text_encoder_2": 0.5})), Cluster(), tiny_networks, 1)


@pytest.fixture
def staged(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Two stages, the second on latents that are here, of one larger canvas."""
    fingerprint = Fingerprint("vae", 4, (0.0,) * 4, (1.0,) * 4, ((96, 96),), 4.0, "random", 0, "made up", "m" * 64)
    write_plan(tmp_path / "curated", CachePlan(fingerprint, 10, 10, "prepare"))
    stages = (
        Stage(steps=10, micro_batch_size=3, micro_batches_per_step=4),
        Stage(latents=str(tmp_path / "curated"), micro_batch_size=2, micro_batches_per_step=2),
    )
    return replace(config, steps=40, stage=stages)


def test_a_staged_run_needs_its_fullest_stage_and_the_time_of_all(tiny_networks: Networks, staged: TrainConfig) -> None:
    whole = plan_of(staged, Cluster(), tiny_networks)
    alone = [
        plan_of(
            replace(
                staged,
                stage=(),
                steps=span.last - span.first,
                latents=Path(span.latents),
                micro_batch_size=span.micro_batch_size,
                micro_batches_per_step=span.micro_batches_per_step,
            ),
            Cluster(),
            tiny_networks,
        )
        for span in staged.spans()
    ]
    assert [plan.images for plan in alone] == [10 * 12, 30 * 4]
    assert list(alone[1].flop_by_bucket) == [(96, 96)]
    assert whole.images == 240
    assert whole.seconds == pytest.approx(sum(plan.seconds for plan in alone))
    assert whole.memory.total == max(plan.memory.total for plan in alone) == alone[1].memory.total
    assert whole.flop_by_bucket == alone[0].flop_by_bucket | alone[1].flop_by_bucket


def test_the_gpus_must_share_out_every_stages_step(tiny_networks: Networks, staged: TrainConfig) -> None:
    assert len(plan_of(staged, Cluster(gpus=2), tiny_networks).stages) == 2
    with pytest.raises(ConfigError, match="stage 2: micro_batches_per_step 2 cannot be shared evenly by 4 processes"):
        plan_of(staged, Cluster(gpus=4), tiny_networks)


def test_advice_changes_every_stage_and_no_stage_loses_pictures(tiny_networks: Networks, staged: TrainConfig) -> None:
    hopeless = plan_of(staged, Cluster(gpu_memory=0.5), tiny_networks)
    _, found = way_to_fit(hopeless, tiny_networks)
    assert found.config.optim.fused_backward
    assert [(s.span.micro_batch_size, s.span.micro_batches_per_step) for s in found.stages] == [(1, 1), (1, 1)]
    assert found.images == hopeless.images
    several = plan_of(staged, Cluster(gpus=2, gpu_memory=0.5), tiny_networks)  # where nothing can be fused
    smaller = next(c for c in way_to_fit(several, tiny_networks)[0] if "micro_batch_size" in c.settings)
    assert [span.images_per_step for span in smaller.apply(staged).spans()] == [12, 4]


@pytest.mark.parametrize("gpus", [1, 2])
def test_no_two_changes_set_the_same(tiny_networks: Networks, staged: TrainConfig, gpus: int) -> None:
    for precision in ("fp32", "pure_bf16"):
        tight = plan_of(replace(staged, precision=precision), Cluster(gpus=gpus, gpu_memory=0.5), tiny_networks)
        changes, found = way_to_fit(tight, tiny_networks)
        names = [name for change in changes for name in change.settings]
        assert len(names) == len(set(names)) > 0
        assert found.config.optim.fused_backward == ("optim.fused_backward" in names) == (gpus == 1)


def test_a_staged_run_is_planned_by_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        'model = "none"\nlatents = "none"\nrun_dir = "none"\n[[stage]]\nsteps = 600\n[[stage]]\nname = "curated"\n'
    )
    assert main(["plan", str(run), "--images", "5"]) == 2
    assert "a run with stages is planned by their steps" in capsys.readouterr().err


def test_sdxl_has_its_published_size_and_no_memory_is_taken() -> None:
    networks = read_networks(None)
    assert sum(p.numel() for p in networks.unet.parameters()) == 2_567_463_684
    assert sum(p.numel() for e in networks.text_encoders for p in e.parameters()) == 817_720_320
    assert all(p.is_meta for n in (networks.unet, networks.vae, *networks.text_encoders) for p in n.parameters())
    assert unet_config()["block_out_channels"] == (320, 640, 1280)


def test_the_command_reads_a_runs_file_and_names_what_cannot_be(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        f'model = "{tiny_folder}"\nlatents = "none"\nrun_dir = "none"\nmicro_batches_per_step = 4\nmax_chunks = 1\n'
        "[buckets]\narea = 64\nstep = 16\n"
    )
    assert main(["plan", str(run), "--gpus", "4", "--images", "1000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["images"] == 1000 and found["strategy"] == "ddp"
    assert found["trained"] == sum(p.numel() for p in build_network("unet", _config_of(tiny_folder)).parameters())
    assert main(["plan", str(run), "--gpus", "3"]) == 2
    assert "micro_batches_per_step 4 cannot be shared evenly by 3 processes" in capsys.readouterr().err
    assert main(["plan", str(run), "--gpu", "tpu"]) == 2
    assert "h100" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def _config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "unet" / "config.json").read_text())
