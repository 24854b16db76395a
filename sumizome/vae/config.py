"""The settings of a decoder's run: the parts of a U-Net's that apply, and its own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sumizome.distributed.parallelize import ParallelConfig
from sumizome.errors import ConfigError
from sumizome.train.config import CheckpointConfig
from sumizome.train.ema import EmaConfig
from sumizome.train.optim import OptimConfig
from sumizome.train.stages import Span, lay_out
from sumizome.vae.crops import CropConfig
from sumizome.vae.discriminator import AdversarialConfig
from sumizome.vae.losses import DecoderLossConfig
from sumizome.vae.regions import RegionConfig

__all__ = ["DecoderValidationConfig", "VaeTrainConfig"]


@dataclass(frozen=True)
class DecoderValidationConfig:
    """Held-out pictures, measured while training with the averaged weights."""

    every: int = 250
    """Steps between measurements; 0 = never. One is always made before the first step and at the last."""
    count: int = 64
    """Pictures held out of training, one in twenty at most, chosen by a hash of their id: the same ones as U-Net
    training holds out."""
    shown: int = 16
    """How many of them are measured each time; `sumizome vae evaluate` measures all."""
    side: int = 512
    """Of the window in their middle that is measured, px at most."""


@dataclass(frozen=True)
class VaeTrainConfig:
    """Everything that decides a decoder's run."""

    model: Path
    """The model whose VAE is finetuned: a diffusers SDXL folder, a single safetensors file, or a VAE alone. It is only
    read."""
    manifest: Path
    """The pictures, as `sumizome ingest` listed them."""
    run_dir: Path
    """Where the run lives. One that holds checkpoints is continued; the same command resumes."""
    latents: Path | None = None
    """Latents that `sumizome prepare` made with this VAE: pictures are then shown as the canvases that these are of,
    and the encoder has nothing to do."""
    masks: Path | None = None
    """A folder of masks (eyes, say): for pictures/a/b.jpg a grey picture masks/a/b.png, white where errors count for
    more."""
    steps: int = 2000
    """Optimizer steps in all; raise it to train a finished run further."""
    micro_batch_size: int = 4
    """Crops in one forward pass."""
    micro_batches_per_step: int = 1
    """Forward passes whose gradients make one step, shared out over all processes; what is more, accumulates."""
    seed: int = 0
    """The run's seed: order and crops follow from it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"fp32": float32, with tf32 matrix products on a GPU. "bf16": float32 weights, bfloat16 compute in the decoder."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: less memory, about a third more time."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else as torch names it: cpu, cuda, cuda:1."""
    workers: int = 0
    """Threads that decode pictures ahead; 0 = one a core, 8 at most."""
    log_every: int = 10
    """Steps averaged into one record of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events below run_dir/tensorboard."""
    wandb: str = ""
    """Project of Weights & Biases to write to as well; "" = none."""
    log_samples: bool = False
    """Write which crops of which pictures each step trained on: run_dir/samples/rank-00000.jsonl."""
    crops: CropConfig = field(default_factory=CropConfig)
    regions: RegionConfig = field(default_factory=RegionConfig)
    losses: DecoderLossConfig = field(default_factory=DecoderLossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: DecoderValidationConfig = field(default_factory=DecoderValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_size", "micro_batches_per_step", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a number of 1 or more")
        if self.optim.text_encoder_lr > 0 or self.optim.fused_backward:
            raise ConfigError(
                "a decoder's run has no text encoders, and its gradients are clipped together: leave "
                "optim.text_encoder_lr and optim.fused_backward out"
            )
        if self.parallel.strategy in ("fsdp", "hybrid"):
            raise ConfigError(
                f'parallel.strategy is "{self.parallel.strategy}", but a decoder of 50 M parameters is not cut up: '
                'take "ddp"'
            )
        if self.validation.count < 0 or self.validation.shown < 1 or self.validation.side < 64:
            raise ConfigError("validation: count cannot be negative, shown must be 1 or more, and side 64 px or more")

    def spans(self) -> tuple[Span, ...]:
        """The run as one stage."""
        return lay_out(
            (),
            self.steps,
            latents=self.latents or self.manifest,
            lr=self.optim.lr,
            micro_batch_size=self.micro_batch_size,
            micro_batches_per_step=self.micro_batches_per_step,
        )
