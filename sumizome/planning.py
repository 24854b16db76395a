"""What a run would take, before anybody rents a GPU: memory by part, FLOP, checkpoints, days; what would make it fit.

Owns the sums. What a step keeps alive is found by `train.footprint` on shapes alone; bytes of weights and moments
follow from the settings as training uses them. Nothing is allocated and no weight is read. What cannot be known without
the machine is an assumption that stands beside its number: the share of peak FLOP that is reached (MFU), the disk's
speed, and what the CUDA context and the allocator's gaps take.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from diffusers import UNet2DConditionModel
from torch import nn

from sumizome.data.buckets import BucketConfig, bucket_table
from sumizome.device import GPUS
from sumizome.errors import ConfigError
from sumizome.models.architecture import clip_config, unet_config, vae_config
from sumizome.models.diffusers_folder import open_folder
from sumizome.models.networks import build_network
from sumizome.models.single_file import open_single_file
from sumizome.train.config import TrainConfig
from sumizome.train.footprint import StepFootprint, forward_flop, measure_step
from sumizome.train.precision import PrecisionName

__all__ = ["GPUS", "Change", "Cluster", "Memory", "Networks", "Plan", "make_plan", "read_networks", "way_to_fit"]

GIB = 2**30

_CONTEXT = 1.0 * GIB
"""CUDA's context, cuBLAS and cuDNN handles: between 0.5 and 1 GiB on every card."""
_GAPS = 0.05
"""Share of the tensors' memory that the allocator loses to gaps; more where every bucket has other sizes."""

Network: TypeAlias = nn.Module


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


@dataclass(frozen=True, eq=False)
class Networks:
    """The shapes of a model, on the meta device."""

    unet: UNet2DConditionModel
    text_encoders: tuple[Network, ...]
    vae: Network
    vae_factor: int
    origin: str
    """Where the shapes were read, in words."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for."""

    parts: dict[str, float]
    context: float = _CONTEXT

    @property
    def total(self) -> float:
        return sum(self.parts.values()) * (1 + _GAPS) + self.context


@dataclass(frozen=True, eq=False)
class Plan:
    """The answer, for one way of training."""

    config: TrainConfig
    cluster: Cluster
    strategy: str
    parameters: dict[str, int]
    """Of each network."""
    trained: int
    memory: Memory
    """At the largest bucket."""
    flop_by_bucket: dict[tuple[int, int], float]
    """(height, width) → FLOP of one image, forward and backward, text encoders included."""
    checkpoint_bytes: int
    checkpoint_seconds: float
    """To write one, all machines at once."""
    images: int
    """To be trained on in all."""
    seconds: float

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


# ── The model's shapes ──


def read_networks(path: Path | None) -> Networks:
    """The shapes of the model at `path`, from its header or its configs; SDXL's own where there is none.

    Raises: ModelError if it is there and is no SDXL.
    """
    if path is None or not path.exists():
        texts = (
            clip_config(),
            clip_config(width=1280, layers=32, intermediate=5120, activation="gelu", projection_dim=1280),
        )
        configs = {"unet": unet_config(), "text_encoder": texts[0], "text_encoder_2": texts[1], "vae": vae_config()}
        origin = "SDXL's own shapes" + (f", since {path} is not here" if path else "")
    else:
        source = open_folder(path) if path.is_dir() else open_single_file(path)
        configs = {name: source.config(name) for name in ("unet", "text_encoder", "text_encoder_2", "vae")}
        origin = f"the shapes of {path}"
    made: dict[str, Any] = {name: build_network(name, config, device="meta") for name, config in configs.items()}
    levels = len(made["vae"].config.block_out_channels)
    encoders = (made["text_encoder"], made["text_encoder_2"])
    return Networks(made["unet"], encoders, made["vae"], 2 ** (levels - 1), origin)


def _count(network: Network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# ── One way of training ──


def make_plan(
    config: TrainConfig,
    cluster: Cluster,
    networks: Networks,
    *,
    images: int,
    buckets: BucketConfig | None = None,
) -> Plan:
    """What training on `images` pictures in all (showings, over all epochs) would take.

    Raises: ConfigError if the GPUs cannot share the step out.
    """
    strategy = _strategy(config, cluster)
    if config.micro_batches_per_step % cluster.gpus:
        raise ConfigError(
            f"micro_batches_per_step is {config.micro_batches_per_step}, which {cluster.gpus} GPUs cannot share out; "
            f"give a multiple, such as {cluster.gpus}"
        )
    canvases = [(height, width) for height, width in bucket_table(buckets or BucketConfig()).tolist()]
    largest = max(canvases, key=lambda canvas: canvas[0] * canvas[1])
    footprint = _simulated(
        networks, largest, config.micro_batch_size, config.max_chunks, config.precision, config.gradient_checkpointing
    )
    text_flop = _text_flop(networks, config)
    flop = {canvas: 3 * _forward_flop(networks, canvas, config.max_chunks) + text_flop for canvas in canvases}
    trained = _count(networks.unet) + (_text_count(networks) if config.optim.text_encoder_lr > 0 else 0)
    checkpoint = _checkpoint_bytes(config, networks, trained)
    machines = -(-cluster.gpus // cluster.gpus_per_machine)
    again = 4 / 3 if config.gradient_checkpointing else 1.0  # a second forward pass, which MFU does not count
    peak = cluster.peak_tflops[1 if config.precision == "fp32" else 0] * 1e12
    # Each bucket is taken as often as any other; their FLOP differ by a few per cent.
    seconds = images * float(np.mean(list(flop.values()))) * again / (peak * cluster.mfu * cluster.gpus)
    return Plan(
        config=config,
        cluster=cluster,
        strategy=strategy,
        parameters={
            "U-Net": _count(networks.unet),
            "text encoders": _text_count(networks),
            "VAE": _count(networks.vae),
        },
        trained=trained,
        memory=_memory(config, cluster, networks, strategy, footprint, trained),
        flop_by_bucket=flop,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint / (cluster.disk_speed * 1e9 * machines),
        images=images,
        seconds=seconds,
    )


def _strategy(config: TrainConfig, cluster: Cluster) -> str:
    if cluster.gpus == 1:
        return "none"
    return "ddp" if config.parallel.strategy == "auto" else config.parallel.strategy


def _text_count(networks: Networks) -> int:
    return sum(_count(encoder) for encoder in networks.text_encoders)


def _text_flop(networks: Networks, config: TrainConfig) -> float:
    """Forward through both text encoders, and backward where they are trained: 2 FLOP a weight and token."""
    embeddings = sum(encoder.get_input_embeddings().weight.numel() for encoder in networks.text_encoders)
    passes = 3 if config.optim.text_encoder_lr > 0 else 1
    return 2.0 * (_text_count(networks) - embeddings) * 77 * config.max_chunks * passes


def _memory(
    config: TrainConfig,
    cluster: Cluster,
    networks: Networks,
    strategy: str,
    footprint: StepFootprint,
    trained: int,
) -> Memory:
    shards = _shards(config, cluster, strategy)
    width = 2 if config.precision == "pure_bf16" else 4
    text_is_trained = config.optim.text_encoder_lr > 0
    on_device = 0 if config.offload_text_encoders else width * _text_count(networks)
    # What is kept beyond gradients at the fullest moment of the pass.
    peak = footprint.peak(gradient_shards=shards, fused_backward=config.optim.fused_backward)
    gradients = 0.0 if config.optim.fused_backward else footprint.gradient_bytes / shards
    parts = {
        "weights": width * trained / shards,
        "gradients": gradients + (width * (trained - _count(networks.unet)) / shards if text_is_trained else 0),
        "activations": max(0.0, peak - gradients),
        "optimizer": _moment_bytes(config, networks, trained) / shards,
        "average": 0.0 if config.ema.device == "cpu" else 4 * trained / shards,
        "text encoders": 0 if text_is_trained else on_device,
        "VAE": 4.0 * _count(networks.vae) if config.preview.every else 0.0,
    }
    if strategy in ("fsdp", "hybrid"):
        # Two blocks' weights are gathered whole at a time: the one that computes and the one that comes next.
        parts["gathered weights"] = 2 * width * max(_count(block) for block in networks.unet.up_blocks[0].attentions)
    return Memory({name: size for name, size in parts.items() if size})


def _shards(config: TrainConfig, cluster: Cluster, strategy: str) -> int:
    """Over how many GPUs one copy of the state is cut."""
    if strategy == "fsdp":
        return cluster.gpus
    if strategy == "hybrid":
        return config.parallel.shard_size or min(cluster.gpus, cluster.gpus_per_machine)
    return 1


def _moment_bytes(config: TrainConfig, networks: Networks, trained: int) -> float:
    if config.optim.name == "adamw8bit":
        return trained * (2 + 8 / 256)  # two bytes a weight, two float32 scales a block of 256
    if config.optim.name == "adafactor":
        share = sum(_factored(parameter.shape) for parameter in networks.unet.parameters()) / _count(networks.unet)
        return 4.0 * share * trained
    return (4.0 if config.precision == "pure_bf16" else 8.0) * trained


def _factored(shape: tuple[int, ...]) -> int:
    """Numbers that Adafactor keeps for a weight: a row and a column of its last two dimensions, or all of a vector."""
    size = int(np.prod(shape))
    return size if len(shape) < 2 else size // shape[-1] + size // shape[-2]


def _checkpoint_bytes(config: TrainConfig, networks: Networks, trained: int) -> int:
    width = 2 if config.precision == "pure_bf16" else 4
    return int(width * trained + 4 * trained + _moment_bytes(config, networks, trained))


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


def _flop_by_canvas(
    networks: Networks, canvases: Sequence[tuple[int, int]], chunks: int
) -> dict[tuple[int, int], float]:
    """FLOP of one image's forward and backward pass on each canvas.

    A quadratic in the number of latents, exactly: convolutions, projections and the text's attention are linear in it,
    self-attention is quadratic. So three canvases say it for all.
    """
    step = 8 * networks.vae_factor  # divisible by what the U-Net halves
    sides = [2 * step, 4 * step, 8 * step]
    measured = [3 * _forward_flop(networks, (side, side), chunks) for side in sides]
    curve = np.polynomial.Polynomial.fit([side**2 for side in sides], measured, 2)
    return {canvas: float(curve(canvas[0] * canvas[1])) for canvas in canvases}


@lru_cache(maxsize=32)
def _forward_flop(networks: Networks, canvas: tuple[int, int], chunks: int) -> float:
    return forward_flop(networks.unet, canvas=canvas, vae_factor=networks.vae_factor, tokens=77 * chunks)


# ── What would make it fit ──


@dataclass(frozen=True)
class Change:
    """A setting that saves memory, and its price in words."""

    setting: str
    price: str
    changes: dict[str, Any] = field(default_factory=dict)

    def apply(self, config: TrainConfig) -> TrainConfig:
        nested = {
            name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in self.changes.items()
        }
        return replace(config, **nested)


def _changes(config: TrainConfig, cluster: Cluster) -> Iterator[Change]:
    """What can be changed, the cheapest first."""
    if cluster.gpus > 1 and config.parallel.strategy not in ("fsdp", "hybrid"):
        yield Change('parallel.strategy = "fsdp"', "weights travel in every pass", {"parallel": {"strategy": "fsdp"}})
    if config.ema.device != "cpu":
        yield Change('ema.device = "cpu"', "4 bytes a weight over the bus in each step", {"ema": {"device": "cpu"}})
    if not config.gradient_checkpointing:
        yield Change("gradient_checkpointing = true", "a third more time", {"gradient_checkpointing": True})
    if config.precision == "fp32":
        yield Change('precision = "bf16"', "products in bfloat16 instead of tf32", {"precision": "bf16"})
    if config.micro_batch_size > 1:
        step = config.micro_batches_per_step
        smaller = {"micro_batch_size": 1, "micro_batches_per_step": step * config.micro_batch_size}
        yield Change(
            f"micro_batch_size = 1, micro_batches_per_step = {step * config.micro_batch_size}",
            "the same step in smaller parts: slower on a large GPU",
            smaller,
        )
    if config.optim.name == "adamw" and cluster.gpus == 1:
        yield Change('optim.name = "adamw8bit"', "moments in 8 bits", {"optim": {"name": "adamw8bit"}})
    if not config.offload_text_encoders and config.optim.text_encoder_lr == 0:
        yield Change("offload_text_encoders = true", "they travel in each step", {"offload_text_encoders": True})
    if config.precision != "pure_bf16":
        yield Change(
            'precision = "pure_bf16", optim.name = "adamw"',
            "weights and moments in bfloat16, rounded stochastically",
            {"precision": "pure_bf16", "optim": {"name": "adamw"}},
        )
    if not config.optim.fused_backward and cluster.gpus == 1:
        yield Change(
            "optim.fused_backward = true, micro_batches_per_step = 1",
            "no accumulation; each gradient clipped on its own",
            {"micro_batches_per_step": 1, "optim": {"fused_backward": True}},
        )


def way_to_fit(plan: Plan, networks: Networks, buckets: BucketConfig | None = None) -> tuple[list[Change], Plan]:
    """The cheapest changes found that make a plan fit, and the plan with them; if it still does not fit, all of them.

    Changes are added in the order of their price until the plan fits, then those that were not needed are taken back.
    """

    def planned(changes: list[Change]) -> Plan:
        config = plan.config
        for change in changes:
            config = change.apply(config)
        return make_plan(config, plan.cluster, networks, images=plan.images, buckets=buckets)

    taken: list[Change] = []
    found = plan
    for change in _changes(plan.config, plan.cluster):
        taken.append(change)
        found = planned(taken)
        if found.fits:
            break
    for change in list(taken[:-1]) if found.fits else ():
        without = [other for other in taken if other is not change]
        if (lighter := planned(without)).fits:
            taken, found = without, lighter
    return taken, found
