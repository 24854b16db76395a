"""Say what a run would take, without a GPU and without allocating the model: memory, FLOP, checkpoints, days.

    sumizome plan run.toml --gpus 256 --gpu h100 --images 6000000 --epochs 10
    sumizome plan run.toml --gpu 4090

Reads the same file as `sumizome train`, stages too. Model and latents need not be there: SDXL's own shapes and buckets
stand in for them. What would make an impossible plan fit is said with its price.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sumizome.data.buckets import BucketConfig
from sumizome.errors import ConfigError
from sumizome.train.config import TrainConfig

if TYPE_CHECKING:
    from sumizome.planning.advice import Change
    from sumizome.planning.memory import Cluster
    from sumizome.planning.plan import Plan

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command(TrainConfig):
    """The run, and the machine that it is to run on."""

    gpus: int = 1
    """GPUs in all; micro_batches_per_step must be a multiple of it."""
    gpu: str = "h100"
    """h100, h200, a100, a100-40, l40s, a6000, 4090, 3090 or 5090: its memory and its peak FLOP."""
    gpu_memory: float = 0.0
    """GB (10⁹ bytes) of one GPU; 0 = those of `gpu`."""
    mfu: float = 0.35
    """Share of the peak FLOP that training reaches; an assumption, so state your own once you have measured it."""
    images: int = 0
    """Pictures of the set; 0 = as many as the steps train on. Stages are planned by their steps."""
    epochs: float = 1.0
    """How often each of `images` is shown."""
    gpus_per_machine: int = 8
    """For the disk's speed, and for hybrid sharding."""
    disk_speed: float = 1.0
    """GB/s at which one machine writes checkpoints."""
    buckets: BucketConfig = field(default_factory=BucketConfig)
    """Of latents that are not here to say."""
    json: bool = False
    """Print one JSON object instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus < 1 or self.gpus_per_machine < 1:
            raise ConfigError("gpus and gpus_per_machine must be at least 1")
        if not 0 < self.mfu <= 1 or self.disk_speed <= 0 or self.epochs <= 0 or self.gpu_memory < 0:
            raise ConfigError("mfu lies between 0 and 1; disk_speed and epochs are above 0; gpu_memory is not negative")
        if self.images < 0:
            raise ConfigError(f"images is {self.images}; give the number of pictures, or 0 to go by the steps")
        if self.stage and (self.images or self.epochs != 1):
            raise ConfigError("a run with stages is planned by their steps; leave out images and epochs")


def run(command: Command) -> None:
    """Prints the plan, and a way to make it fit where it does not."""
    from sumizome.planning.advice import way_to_fit
    from sumizome.planning.networks import read_networks
    from sumizome.planning.plan import make_plan
    from sumizome.planning.work import work_of

    networks = read_networks(command.model)
    work = work_of(command, command.buckets, int(command.images * command.epochs))
    plan = make_plan(command, _cluster(command), networks, work)
    changes, fitting = ([], plan) if plan.fits else way_to_fit(plan, networks)
    if command.json:
        print(json.dumps(_as_json(plan) | {"changes": [change.setting for change in changes]}))
        return
    print(f"{networks.origin}; {_machine(plan)}")
    for line in (*_memory_lines(plan), *_work_lines(plan), *_stage_lines(plan), *_fit_lines(plan, changes, fitting)):
        print(line)


def _cluster(command: Command) -> "Cluster":
    from sumizome.device import GPUS
    from sumizome.planning.memory import Cluster

    if command.gpu not in GPUS:
        raise ConfigError(f"gpu is {command.gpu!r}; give one of {', '.join(GPUS)}, or the nearest and --gpu-memory")
    half, tf32, memory = GPUS[command.gpu]
    return Cluster(
        gpus=command.gpus,
        gpu_memory=command.gpu_memory or memory,
        peak_tflops=(half, tf32),
        mfu=command.mfu,
        gpus_per_machine=command.gpus_per_machine,
        disk_speed=command.disk_speed,
    )


def _machine(plan: "Plan") -> str:
    cluster = plan.cluster
    gpus = f"{cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''} of {cluster.gpu_memory:g} GB"
    # In the order of the stages, each once.
    batches = dict.fromkeys(str(stage.span.images_per_step) for stage in plan.stages)
    strategy = plan.strategy if cluster.gpus > 1 else "one process"
    return f"{gpus}, {strategy}, {plan.config.precision}, {' and then '.join(batches)} images a step"


def _memory_lines(plan: "Plan") -> Iterator[str]:
    from sumizome.planning.memory import GAPS
    from sumizome.planning.work import largest

    fullest = plan.fullest
    height, width = largest(fullest.work.canvases)
    sizes = {**plan.memory.parts, f"gaps ({GAPS:.0%})": plan.memory.gaps, "CUDA": plan.memory.context}
    stage = f" in stage {fullest.span.name}" if len(plan.stages) > 1 else ""
    yield ""
    yield (
        f"memory of one GPU{stage}, at {height}×{width}, {fullest.span.micro_batch_size} a micro-batch, GB (10⁹ bytes):"
    )
    for name, size in sizes.items():
        yield f"  {name:<17} {size / 1e9:7.2f}"
    verdict = "fits" if plan.fits else f"does not fit into {plan.cluster.gpu_memory:g}"
    yield f"  {'together':<17} {plan.memory.total / 1e9:7.2f}   {verdict}"


def _work_lines(plan: "Plan") -> Iterator[str]:
    cluster = plan.cluster
    counts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in plan.parameters.items())
    yield ""
    yield f"parameters: {counts}; trained: {plan.trained / 1e6:.1f} M"
    by_flop = sorted(plan.flop_by_bucket.items(), key=lambda item: item[1])
    for label, (canvas, flop) in (("least", by_flop[0]), ("most", by_flop[-1])):
        yield f"an image, forward and backward: {label} {_tflop(flop)} at {canvas[0]}×{canvas[1]}"
    yield (
        f"a checkpoint: {_bytes(plan.checkpoint_bytes)}, {_duration(plan.checkpoint_seconds)} at "
        f"{cluster.disk_speed:g} GB/s a machine, beside training"
    )
    yield (
        f"{plan.images:,} images at {plan.images_per_second:.1f} a second and GPU (MFU {cluster.mfu:.0%}, assumed): "
        f"{_duration(plan.seconds)}, {plan.gpu_hours:,.0f} GPU-hours"
    )


def _stage_lines(plan: "Plan") -> Iterator[str]:
    for stage in plan.stages if len(plan.stages) > 1 else ():
        span, work = stage.span, stage.work
        yield (
            f"  stage {span.name}: steps {span.first + 1} to {span.last}, {work.images:,} images, "
            f"{_duration(stage.seconds)}, {stage.memory.total / 1e9:.1f} GB"
        )


def _tflop(flop: float) -> str:
    return f"{flop / 1e12:.2f} TFLOP" if flop >= 1e11 else f"{flop / 1e9:.3g} GFLOP"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, name, least in ((86400, "days", 2.0), (3600, "hours", 1.5), (60, "minutes", 1.5)):
        if seconds > least * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"


def _fit_lines(plan: "Plan", changes: "list[Change]", fitting: "Plan") -> Iterator[str]:
    if plan.fits:
        return
    yield ""
    if fitting.fits:
        yield f"to make it fit ({fitting.memory.total / 1e9:.1f} GB, {_duration(fitting.seconds)}):"
    else:
        yield f"no change of settings makes it fit; with all of these it takes {fitting.memory.total / 1e9:.1f} GB:"
    for change in changes:
        yield f"  {change.setting}   ({change.price})"
    if not fitting.fits:
        yield (
            '  Take a larger GPU, a smaller canvas, or more GPUs with parallel.strategy = "fsdp", optim.name = "adamw" '
            "and no optim.fused_backward."
        )


def _as_json(plan: "Plan") -> dict[str, Any]:
    return {
        "fits": plan.fits,
        "strategy": plan.strategy,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "memory_bytes": {**plan.memory.parts, "context": plan.memory.context, "total": plan.memory.total},
        "flop_by_bucket": {f"{height}x{width}": flop for (height, width), flop in plan.flop_by_bucket.items()},
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_seconds": plan.checkpoint_seconds,
        "images": plan.images,
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "stages": [
            {
                "name": stage.span.name,
                "steps": stage.span.last - stage.span.first,
                "images": stage.work.images,
                "seconds": stage.seconds,
                "memory_bytes": stage.memory.total,
            }
            for stage in plan.stages
        ],
    }
