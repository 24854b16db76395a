"""What one GPU of a cluster would hold, by what it is for, and what a checkpoint takes.

What a step keeps alive is found by `train.footprint` on shapes alone; bytes of weights and moments follow from the
settings as training uses them. What the CUDA context and the allocator's gaps take is an assumption.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sumizome.distributed.parallelize import Strategy, resolve_strategy
from sumizome.distributed.runtime import Ranks
from sumizome.planning.networks import Networks, count
from sumizome.train.config import TrainConfig
from sumizome.train.footprint import StepFootprint, measure_step
from sumizome.train.precision import PrecisionName

__all__ = ["GAPS", "Cluster", "Memory", "checkpoint_bytes", "memory_of", "trained_count"]

GIB = 2**30

_CONTEXT = 1.0 * GIB
"""CUDA's context, cuBLAS and cuDNN handles: between 0.5 and 1 GiB on every card."""
GAPS = 0.05
"""Share of the tensors' memory that the allocator loses to gaps; more where every bucket has other sizes."""


@dataclass(frozen=True)
class Cluster:
    """The machine that the plan is for."""

    gpus: int = 1
    gpu_memory: float = 80.0
    """GB of 10⁹ bytes of one GPU, as makers count them."""
    peak_tflops: tuple[float, float] = (989.0, 494.5)
    """Dense peak of one GPU in bfloat16 and in tf32."""
    mfu: float = 0.35
    """Share of the peak that training reaches."""
    gpus_per_machine: int = 8
    disk_speed: float = 1.0
    """GB/s to the checkpoints' disk, of one machine."""

    @property
    def ranks(self) -> Ranks:
        """The numbers of its processes, one a GPU, for whoever asks what so many can train; they talk to nobody."""
        return Ranks(world=self.gpus, local_world=min(self.gpus, self.gpus_per_machine))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for."""

    parts: dict[str, float]
    context: float = _CONTEXT

    @property
    def gaps(self) -> float:
        return sum(self.parts.values()) * GAPS

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.gaps + self.context


def trained_count(config: TrainConfig, networks: Networks) -> int:
    """Parameters that are trained."""
    return count(networks.unet) + (networks.text_count if config.optim.text_encoder_lr > 0 else 0)


def memory_of(
    config: TrainConfig,
    cluster: Cluster,
    networks: Networks,
    *,
    canvas: tuple[int, int],
    batch: int,
    accumulates: bool = False,
) -> Memory:
    """What a GPU holds at the fullest moment of a step on micro-batches of `batch` pictures of a canvas.

    `accumulates`: a GPU has more than one of them a step.
    """
    trained, strategy = trained_count(config, networks), resolve_strategy(config.parallel, cluster.ranks)
    shards = _shards(config, cluster.ranks, strategy)
    # FSDP2 cuts gradients up as they cross ranks, which is after the last micro-batch; "hybrid" after each.
    gradient_shards = 1 if accumulates and strategy == "fsdp" else shards
    width = _weight_bytes(config)
    text_is_trained = config.optim.text_encoder_lr > 0
    on_device = 0 if config.offload_text_encoders else width * networks.text_count
    footprint = _simulated(networks, canvas, batch, config.max_chunks, config.precision, config.gradient_checkpointing)
    # What is kept beyond gradients at the fullest moment of the pass.
    peak = footprint.peak(gradient_shards=gradient_shards, fused_backward=config.optim.fused_backward)
    gradients = 0.0 if config.optim.fused_backward else footprint.gradient_bytes / gradient_shards
    text_gradients = width * (trained - count(networks.unet)) / gradient_shards if text_is_trained else 0
    parts = {
        "weights": width * trained / shards,
        "gradients": gradients + text_gradients,
        "activations": max(0.0, peak - gradients),
        "optimizer": _moment_bytes(config, networks, trained) / shards,
        "average": 0.0 if config.ema.device == "cpu" else 4 * trained / shards,
        "text encoders": 0 if text_is_trained else on_device,
        "VAE": 4.0 * count(networks.vae),
    }
    if strategy in ("fsdp", "hybrid"):
        # Two blocks' weights are gathered whole at a time: the one that computes and the one that comes next.
        parts["gathered weights"] = 2 * width * max(count(block) for block in networks.unet.up_blocks[0].attentions)
    return Memory({name: size for name, size in parts.items() if size})


def checkpoint_bytes(config: TrainConfig, networks: Networks) -> int:
    """Weights, average and moments."""
    trained = trained_count(config, networks)
    return int(_weight_bytes(config) * trained + 4 * trained + _moment_bytes(config, networks, trained))


def _weight_bytes(config: TrainConfig) -> int:
    return 2 if config.precision == "pure_bf16" else 4


def _shards(config: TrainConfig, ranks: Ranks, strategy: Strategy) -> int:
    """Over how many GPUs one copy of the state is cut."""
    if strategy == "fsdp":
        return ranks.world
    if strategy == "hybrid":
        return config.parallel.shard_size or ranks.local_world
    return 1


def _moment_bytes(config: TrainConfig, networks: Networks, trained: int) -> float:
    if config.optim.name == "adamw8bit":
        return trained * (2 + 8 / 256)  # two bytes a weight, two float32 scales a block of 256
    if config.optim.name == "adafactor":
        share = sum(_factored(parameter.shape) for parameter in networks.unet.parameters()) / count(networks.unet)
        return 4.0 * share * trained
    return (4.0 if config.precision == "pure_bf16" else 8.0) * trained


def _factored(shape: tuple[int, ...]) -> int:
    """Numbers that Adafactor keeps for a weight: a row and a column of its last two dimensions, or all of a vector."""
    size = int(np.prod(shape))
    return size if len(shape) < 2 else size // shape[-1] + size // shape[-2]


@lru_cache(maxsize=32)
def _simulated(
    networks: Networks, canvas: tuple[int, int], batch: int, chunks: int, precision: PrecisionName, checkpointing: bool
) -> StepFootprint:
    """A step's footprint takes seconds to find, and many settings share one."""
    return measure_step(
        networks.unet,
        canvas=canvas,
        vae_factor=networks.vae_factor,
        batch=batch,
        tokens=77 * chunks,
        precision=precision,
        checkpointing=checkpointing,
    )
