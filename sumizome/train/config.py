"""A run's settings, as one tree of frozen dataclasses: the TOML file's tables and the command line's dotted flags.

Each part stands beside the code that it configures; the parts here belong to the training loop itself, or to code that
imports networks, which `--help` need not wait for. The tree is taken apart in `build.build_trainer`; nothing below it
sees more than its own part.
"""

from dataclasses import dataclass, field
from pathlib import Path

from sumizome.data.captions import CaptionConfig
from sumizome.data.latent_statistics import LatentStatisticsConfig
from sumizome.data.tags import TagWeightConfig
from sumizome.diffusion.loss import LossConfig
from sumizome.diffusion.prediction import PredictionType
from sumizome.diffusion.schedule import ScheduleConfig
from sumizome.distributed.parallelize import ParallelConfig
from sumizome.errors import ConfigError
from sumizome.train.ema import EmaConfig
from sumizome.train.optim import OptimConfig
from sumizome.train.precision import PrecisionName
from sumizome.train.stages import Span, Stage, lay_out
from sumizome.train.timesteps import TimestepSampling

__all__ = ["BrightnessConfig", "CheckpointConfig", "PreviewConfig", "TrainConfig", "ValidationConfig"]

_TERMINAL = 999


@dataclass(frozen=True)
class ValidationConfig:
    """The loss of held-out pictures at fixed noise, timestep by timestep."""

    every: int = 500
    """Steps between validations; 0 = never. One is always made at the last step."""
    count: int = 64
    """Pictures held out of training, one in twenty at most, chosen by a hash of their id: the same on every run."""
    timesteps: tuple[int, ...] = (20, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950, 990, _TERMINAL)
    """Timesteps at which the loss is measured; 999 is pure noise."""


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn while training, with the averaged weights and the same seeds each time."""

    every: int = 0
    """Steps between preview grids; 0 = none."""
    prompts: tuple[str, ...] = ("completely black", "completely white")
    """One picture a prompt."""
    canvas: tuple[int, int] = (1024, 1024)
    """(height, width) in pixels."""
    sampling_steps: int = 28
    """Steps from pure noise."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 = off."""
    seed: int = 0
    """Noise of the first picture; the next has seed + 1."""


@dataclass(frozen=True)
class BrightnessConfig:
    """How bright flat pictures come out, with the averaged weights."""

    every: int = 0
    """Steps between tests; 0 = never. One is then made at the last step, too."""
    prompts: tuple[str, ...] = ("completely black", "completely white", "completely grey")
    """What is drawn: words that the captions of the run's pictures use."""
    wanted: tuple[float, ...] = (0.0, 1.0, 0.5)
    """Mean brightness that each prompt asks for: 0 black, 1 white."""
    seeds: int = 4
    """Pictures a prompt."""
    canvas: tuple[int, int] = (1024, 1024)
    """(height, width) in pixels."""
    sampling_steps: int = 28
    """Steps from pure noise."""
    guidance_scale: float = 5.0
    """Classifier-free guidance; 1 = off."""

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.wanted) or not self.prompts:
            raise ConfigError(
                f"brightness has {len(self.prompts)} prompts and {len(self.wanted)} wanted values; give one of each"
            )
        if self.every < 0 or self.seeds < 1 or not all(0 <= value <= 1 for value in self.wanted):
            raise ConfigError("brightness takes every ≥ 0, seeds ≥ 1, and wanted values from 0 (black) to 1 (white)")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the training state is written to disk."""

    every: int = 500
    """Steps between checkpoints; one is always written at the last step and when the run is asked to stop."""
    keep: int = 3
    """Checkpoints kept; the newest two that verify always are."""
    asynchronous: bool = True
    """Write in the background: training waits for a copy to main memory alone. Needs that memory once."""
    mirror: str = ""
    """s3://bucket/prefix, or a folder of another disk: each checkpoint is put there too, once it is whole here. A run
    directory without any goes on from the newest there."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 0:
            raise ConfigError("checkpoint.every and checkpoint.keep cannot be negative")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run."""

    model: Path
    """Base model: a diffusers SDXL folder or a single safetensors file. It is only read."""
    latents: Path
    """Latent shards, as `sumizome prepare` wrote them with this model's VAE: a folder, or s3://bucket/prefix."""
    run_dir: Path
    """Where the run lives. One that holds checkpoints is continued; the same command resumes."""
    steps: int = 1000
    """Optimizer steps in all; raise it to train a finished run further."""
    micro_batch_size: int = 4
    """Samples in one forward pass, all of one bucket."""
    micro_batches_per_step: int = 1
    """Forward passes whose gradients make one step, shared out over all processes; what is more, accumulates."""
    max_chunks: int = 3
    """Longest caption, in chunks of 75 tokens."""
    seed: int = 0
    """The run's seed: order, captions, noise and timesteps follow from it."""
    prediction_type: PredictionType = "v_prediction"
    """What the U-Net learns to predict. An epsilon model becomes a v model by training on (report §2.1)."""
    timestep_sampling: TimestepSampling = "stratified"
    """"stratified": each step covers the whole schedule evenly. "uniform": each sample on its own."""
    timestep_shift_from: int = 0
    """Side in pixels of the square canvas that the schedule suits; on larger canvases timesteps are drawn noisier, as
    if SNR were divided by canvas area / side², on smaller ones less noisy. 0 = off."""
    noise_offset: float = 0.0
    """Moves the training noise of each channel as a whole by this many standard deviations ("offset noise"; others take
    0.05 to 0.1 with epsilon). 0 = none, the report's: the terminal step is in its place. Validation never has it."""
    precision: PrecisionName = "fp32"
    """"fp32": float32, with tf32 matrix products on a GPU (the report's). "bf16": float32 weights, bfloat16 compute.
    "pure_bf16": weights and moments too are bfloat16, rounded stochastically: half the memory (adamw only)."""
    gradient_checkpointing: bool = False
    """Recompute the U-Net's activations in the backward pass: less memory, about a third more time."""
    offload_text_encoders: bool = False
    """Keep frozen text encoders in main memory, and copy them to the device for as long as a batch is encoded."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else as torch names it: cpu, cuda, cuda:1."""
    log_every: int = 10
    """Steps averaged into one record of metrics.jsonl."""
    cache_dir: Path = Path("~/.cache/sumizome")
    """Where shards of latents on S3 are kept on this machine; all processes of a machine may share it."""
    cache_size: float = 100.0
    """GB (10⁹ bytes) of them at most. What has no room is read record by record; 0 = everything is."""
    tensorboard: bool = True
    """Write TensorBoard events below run_dir/tensorboard."""
    wandb: str = ""
    """Project of Weights & Biases to write to as well (`pip install 'sumizome[wandb]'`); "" = none. WANDB_MODE=offline
    keeps it below run_dir/wandb."""
    peak_tflops: float = 0.0
    """Dense peak of one device in this precision, for the share of it that is reached (MFU); 0 = by the GPU's name."""
    log_samples: bool = False
    """Write which samples, seeds and timesteps each step trained on: run_dir/samples/rank-00000.jsonl."""
    stage: tuple[Stage, ...] = ()
    """Stages one behind the other, each a `[[stage]]` with what it has of its own: steps, name, latents, lr,
    micro_batch_size, micro_batches_per_step. Optimizer and average go on from one to the next."""
    latent_statistics: LatentStatisticsConfig = field(default_factory=LatentStatisticsConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    tag_weights: TagWeightConfig = field(default_factory=TagWeightConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    brightness: BrightnessConfig = field(default_factory=BrightnessConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_size", "micro_batches_per_step", "max_chunks", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a number of 1 or more")
        accumulated = max(span.micro_batches_per_step for span in self.spans())
        if self.optim.fused_backward and accumulated > 1:
            raise ConfigError(
                f"optim.fused_backward updates in every backward pass, so micro_batches_per_step cannot be "
                f"{accumulated}; set it to 1, or fused_backward to false"
            )
        if self.offload_text_encoders and self.optim.text_encoder_lr > 0:
            raise ConfigError("offload_text_encoders needs frozen ones; set optim.text_encoder_lr to 0")
        if self.noise_offset < 0:
            raise ConfigError(f"noise_offset is {self.noise_offset}; give 0 for none, or a number such as 0.05")
        if self.timestep_shift_from < 0:
            raise ConfigError(
                f"timestep_shift_from is {self.timestep_shift_from}; give pixels, such as 512, or 0 for off"
            )
        if self.peak_tflops < 0:
            raise ConfigError(f"peak_tflops is {self.peak_tflops}; give TFLOP/s of one device, or 0 to go by its name")
        if self.cache_size < 0:
            raise ConfigError(f"cache_size is {self.cache_size}; give 0 or more GB")
        top = self.schedule.num_timesteps - 1
        if self.validation.every and not self.validation.timesteps:
            raise ConfigError("validation.timesteps is empty; name some, or set validation.every to 0")
        if self.preview.every and not self.preview.prompts:
            raise ConfigError("preview.prompts is empty; give some, or set preview.every to 0")
        outside = [t for t in self.validation.timesteps if not 0 <= t <= top]
        if outside:
            raise ConfigError(f"validation.timesteps holds {outside[0]}; they go from 0 to {top}")

    def spans(self) -> tuple[Span, ...]:
        """The run's stages, laid out over its steps; a run without stages is one."""
        return lay_out(
            self.stage,
            self.steps,
            latents=self.latents,
            lr=self.optim.lr,
            micro_batch_size=self.micro_batch_size,
            micro_batches_per_step=self.micro_batches_per_step,
        )
