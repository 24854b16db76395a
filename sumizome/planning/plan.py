"""What a run would take, before anybody rents a GPU: memory by part, FLOP, checkpoints, days; stage by stage.

Owns the sums. Nothing is allocated and no weight is read. What cannot be known without the machine is an assumption
that stands beside its number: the share of peak FLOP that is reached (MFU) and the disk's speed. A run's memory is that
of its fullest stage; images, FLOP and time are summed over the stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sumizome.inference import check_canvas
from sumizome.planning.memory import Cluster, Memory, checkpoint_bytes, memory_of, trained_count
from sumizome.planning.networks import Networks, count
from sumizome.planning.work import Canvas, StageWork, largest
from sumizome.train.combinations import check_combinations
from sumizome.train.config import TrainConfig
from sumizome.train.flop import ImageFlop, image_flop
from sumizome.train.optim import lr_factors
from sumizome.train.stages import Span

__all__ = ["Plan", "StagePlan", "make_plan"]


@dataclass(frozen=True, eq=False)
class StagePlan:
    """The answer for one stage."""

    span: Span
    work: StageWork
    memory: Memory
    """At its largest canvas."""
    flop_by_bucket: dict[Canvas, float]
    """(height, width) → FLOP of one image, forward and backward, text encoders included."""
    seconds: float


@dataclass(frozen=True, eq=False)
class Plan:
    """The answer, for one way of training."""

    config: TrainConfig
    cluster: Cluster
    strategy: str
    parameters: dict[str, int]
    """Of each network."""
    trained: int
    stages: tuple[StagePlan, ...]
    checkpoint_bytes: int
    checkpoint_seconds: float
    """To write one, all machines at once."""

    @property
    def fullest(self) -> StagePlan:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def memory(self) -> Memory:
        return self.fullest.memory

    @property
    def work(self) -> tuple[StageWork, ...]:
        return tuple(stage.work for stage in self.stages)

    @property
    def images(self) -> int:
        """To be trained on in all."""
        return sum(stage.work.images for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def flop_by_bucket(self) -> dict[Canvas, float]:
        """Of every stage's canvases."""
        return {canvas: flop for stage in self.stages for canvas, flop in stage.flop_by_bucket.items()}

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.gpu_memory * 1e9

    @property
    def images_per_second(self) -> float:
        """Of one GPU."""
        return self.images / self.seconds / self.cluster.gpus

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.cluster.gpus / 3600


def make_plan(config: TrainConfig, cluster: Cluster, networks: Networks, work: Sequence[StageWork]) -> Plan:
    """What a run would take whose stages do this work (`work.work_of`).

    Raises: ConfigError for a run that `train` would refuse on these GPUs, or with these networks.
    """
    spans = config.spans()
    strategy = check_combinations(config, cluster.ranks)
    _check_networks(config, networks)
    checkpoint = checkpoint_bytes(config, networks)
    machines = -(-cluster.gpus // cluster.gpus_per_machine)
    return Plan(
        config=config,
        cluster=cluster,
        strategy=strategy,
        parameters={
            "U-Net": count(networks.unet),
            "text encoders": networks.text_count,
            "VAE": count(networks.vae),
        },
        trained=trained_count(config, networks),
        stages=tuple(_stage_plan(config, cluster, networks, span, its) for span, its in zip(spans, work, strict=True)),
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint / (cluster.disk_speed * 1e9 * machines),
    )


def _check_networks(config: TrainConfig, networks: Networks) -> None:
    lr_factors(config.optim.lr_of, networks.trained_names(text_is_trained=config.optim.text_encoder_lr > 0))
    for pictures in (config.preview, config.brightness):
        if pictures.every:
            check_canvas(networks.unet, networks.vae_factor, pictures.canvas)


def _stage_plan(config: TrainConfig, cluster: Cluster, networks: Networks, span: Span, work: StageWork) -> StagePlan:
    flop_of = _image_flop(networks, config.optim.text_encoder_lr > 0)
    flop = {canvas: flop_of(canvas, 77 * config.max_chunks) for canvas in work.canvases}
    again = 4 / 3 if config.gradient_checkpointing else 1.0  # a second forward pass, which MFU does not count
    speed = cluster.peak_tflops[1 if config.precision == "fp32" else 0] * 1e12 * cluster.mfu * cluster.gpus
    return StagePlan(
        span=span,
        work=work,
        memory=memory_of(
            config,
            cluster,
            networks,
            canvas=largest(work.canvases),
            batch=span.micro_batch_size,
            accumulates=span.micro_batches_per_step > cluster.gpus,
        ),
        flop_by_bucket=flop,
        # Each bucket is taken as often as any other; their FLOP differ by a few per cent.
        seconds=work.images * float(np.mean(list(flop.values()))) * again / speed,
    )


@lru_cache(maxsize=4)
def _image_flop(networks: Networks, text_is_trained: bool) -> ImageFlop:
    return image_flop(
        networks.unet, networks.text_encoders, vae_factor=networks.vae_factor, text_is_trained=text_is_trained
    )
