"""What an evaluation and the figures draw and measure, beside no heavy import: the command line reads it."""

from dataclasses import dataclass, field

from sumizome.errors import ConfigError
from sumizome.evaluate.scores import COLOURS
from sumizome.picture_request import SamplingConfig

__all__ = ["EvaluateConfig", "FigureConfig", "check_config"]


@dataclass(frozen=True)
class EvaluateConfig:
    """What is drawn and measured."""

    seeds: int = 8
    """Pictures of each colour."""
    colour_prompt: str = "completely {}"
    """The prompt of a colour, as the data's captions name it; {} is its name."""
    colours: tuple[str, ...] = tuple(COLOURS)
    """Of black white grey red green blue yellow orange purple pink brown cyan magenta."""
    pictures: int = 128
    """Pictures drawn from captions of held-out data: for tags and for the distance from the data."""
    held_out: int = 400
    """Pictures of the data that neither train the classifier nor, as far as it is known, trained the model."""
    train_pictures: int = 3000
    """Pictures of the data that the classifier is trained on."""
    validation_count: int = 64
    """Held-out pictures for the loss by timestep; a run directory's own number where that is smaller."""
    timesteps: tuple[int, ...] = (20, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950, 990, 999)
    """Where the loss is taken."""
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.5, 5.0, 7.5, 10.0)
    """Where saturation and sharpness are taken."""
    guidance_pictures: int = 12
    """Pictures at each of them."""
    max_chunks: int = 3
    """Longest prompt, in chunks of 75 tokens."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class FigureConfig:
    """What is drawn."""

    seeds: int = 4
    """Pictures of each prompt."""
    steps: int = 28
    """Sampling steps; the report's."""
    guidance_scale: float = 5.0
    """The report finds 3.5 to 5 right."""
    black_prompt: str = "completely black"
    """Of figures 2 and 4, as the data's captions say it."""
    opposing_prompts: tuple[str, str] = (
        "1girl, solo, black hair, white background, simple background",
        "1girl, solo, white hair, night, night sky",
    )
    """Of figure 3: large areas of opposing brightness; the canvas that should be the brighter one first."""
    large_prompt: str = "1girl, solo, long hair, blue hair, full body"
    """Of figures 5 to 7: one character on a canvas of double length."""


def check_config(config: EvaluateConfig) -> None:
    """Raises: ConfigError for what cannot be drawn or measured."""
    unknown = [colour for colour in config.colours if colour not in COLOURS]
    if unknown or not config.colours:
        raise ConfigError(f"colours: known are {' '.join(COLOURS)}; found {' '.join(unknown) or 'none'}")
    if "{}" not in config.colour_prompt:
        raise ConfigError(f"colour_prompt: {{}} stands for the colour's name; found '{config.colour_prompt}'")
    for name, least in (
        ("seeds", 2),
        ("pictures", 20),
        ("held_out", 40),
        ("train_pictures", 40),
        ("validation_count", 1),
        ("guidance_pictures", 2),
    ):
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is {getattr(config, name)}; give {least} or more")
