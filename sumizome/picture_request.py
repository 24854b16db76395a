"""What is asked for: one picture's prompt, canvas, seed and way of sampling, as frozen values.

Owns no drawing. The invariant: a request is all that a picture depends on, beside the model (and, to the last bit, its
place in a batch). Sizes are (height, width) in pixels.
"""

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.samplers import SamplerName
from sumizome.diffusion.sigmas import BASE_SIGMA_MAX, Grid, SigmaMax
from sumizome.errors import ConfigError
from sumizome.prompts import PromptSyntax

__all__ = ["Picture", "PictureRequest", "RedrawConfig", "SamplingConfig", "SecondPassConfig"]

_BATCH = 4096
"""Pictures of a ComfyUI batch at most, as ComfyUI's own limit is."""


@dataclass(frozen=True)
class RedrawConfig:
    """A picture to begin with, instead of noise alone."""

    image: Path | None = None
    """The picture; it is resized to the canvas. None = begin with noise alone."""
    strength: float = 0.75
    """Share of the steps that are made, 0 to 1: their last ones, as A1111 counts. 1 = from the grid's start."""
    mask: Path | None = None
    """White where the picture is drawn anew, black where it stays. None = everywhere."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ConfigError(f"redraw.strength must be above 0 and at most 1, found {self.strength}")
        if self.mask is not None and self.image is None:
            raise ConfigError("redraw.mask needs the picture that it masks; give redraw.image")


@dataclass(frozen=True)
class SecondPassConfig:
    """A larger canvas, drawn over the enlarged result of the first."""

    scale: float = 1.0
    """Of both sides; the result's canvas is the request's times this. 1 = no second pass."""
    steps: int = 14
    """Sampling steps of the second pass."""
    detail_sigma: float = 0.7
    """Detail below this noise level of the first canvas is drawn anew: the second pass starts at the level that hides
    as much on its own canvas, detail_sigma·√(area/first area)."""

    def __post_init__(self) -> None:
        if self.scale < 1 or self.steps < 1:
            raise ConfigError(f"second_pass: scale and steps must be 1 or more, found {self.scale} and {self.steps}")


@dataclass(frozen=True)
class SamplingConfig:
    """How noise becomes a picture."""

    steps: int = 28
    """Network calls, or pairs of them for second-order samplers; 28 is the report's."""
    sampler: SamplerName = "euler"
    """Euler and euler_ancestral are the report's."""
    grid: Grid = "native"
    """Where the steps stand: native = evenly in timestep, the report's."""
    sigma_max: SigmaMax = "pure"
    """Where sampling starts: pure noise, a finite sigma, or one scaled with the canvas."""
    base_sigma_max: float = BASE_SIGMA_MAX
    """For sigma_max "canvas": the sigma of a canvas of 512×512, from which it grows with √area."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)


@dataclass(frozen=True)
class PictureRequest:
    """One picture to draw."""

    prompt: str
    negative_prompt: str = ""
    canvas: tuple[int, int] = (1024, 1024)
    """(height, width) in pixels."""
    seed: int = 0
    """Of its noise; the same seed gives the same picture alone or in a batch."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    noise_row: int = 0
    """Which picture of a ComfyUI batch it is: all of a batch are drawn from one seed. A1111 counts the seed up."""
    syntax: PromptSyntax = "plain"
    """How weights, breaks and schedules are written in its prompts; plain = not at all."""
    redraw: RedrawConfig = field(default_factory=RedrawConfig)
    second_pass: SecondPassConfig = field(default_factory=SecondPassConfig)

    def __post_init__(self) -> None:
        for text in (self.prompt, self.negative_prompt):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ConfigError(
                    "a prompt holds bytes that are no UTF-8 text; type it anew, or save its file as UTF-8"
                )
        if not 0 <= self.noise_row < _BATCH:
            raise ConfigError(f"noise_row must be 0 to {_BATCH - 1}, found {self.noise_row}")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"a seed has 64 bits (at most {2**64 - 1}), found {self.seed}")


@dataclass(frozen=True)
class Picture:
    """A drawn picture and what was asked for."""

    request: PictureRequest
    image: Image.Image
    batch: tuple[int, int] = (0, 1)
    """Its row, and how many rows were drawn together: what bit-equal repetition needs beside the request."""
    dropped: str = ""
    """The ends of prompt and negative prompt that did not fit into the chunks; "" if all did."""
