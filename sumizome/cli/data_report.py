"""Show a data set on one HTML page: buckets, sizes, tags, weights, captions, duplicates, rejects, latents.

The page is one file that fetches nothing and runs nothing: keep it, send it, open it anywhere. On top stands what
deserves attention, with what to do about each.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from sumizome.data.captions import CaptionConfig
from sumizome.data.tags import TagWeightConfig

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """Show a data set on one HTML page."""

    manifest: Positional[Path]
    """the .parquet file that `sumizome ingest` wrote; its .rejects.csv and .duplicates.csv are read, too"""
    out: Path
    """the .html file to write, outside the picture folders; an older page is replaced"""
    latents: Path | None = None
    """folder that `sumizome prepare` wrote: shows its statistics, and its buckets instead of those below"""
    model: Path | None = None
    """with --latents: whether they fit this model's VAE"""
    area: int | tuple[int, int] = 1024
    """most pixels of a canvas: the side of a square, or height and width; as you will give it to `sumizome prepare`"""
    step: int = 64
    """sides are multiples of this, px; 16 for a tiny model"""
    min_side: int = 0
    """shortest side, px; 0 = half of √area"""
    max_side: int = 0
    """longest side, px; 0 = twice √area"""
    max_chunks: int = 3
    """chunks of 75 tokens that training will take of a caption"""
    validation_count: int = 64
    """pictures that training will hold out"""
    token_sample: int = 100_000
    """captions that are tokenised; of a larger set a random sample of so many"""
    workers: int | None = None
    """processes that decode thumbnails, by default one a core; 0 = no thumbnails"""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    weights: TagWeightConfig = field(default_factory=lambda: TagWeightConfig(strength=0.5))


def run(command: Command) -> None:
    """Writes the page, and prints what deserves attention."""
    from rich.console import Console

    from sumizome.data.buckets import BucketConfig
    from sumizome.data.listing import printable
    from sumizome.errors import ConfigError
    from sumizome.report.data_report import ReportConfig, write_data_report

    if command.model is not None and command.latents is None:
        raise ConfigError("--model: it is compared with latents, give --latents, too")
    config = ReportConfig(
        BucketConfig(area=command.area, step=command.step, min_side=command.min_side, max_side=command.max_side),
        command.captions,
        command.weights,
        command.max_chunks,
        command.validation_count,
        command.token_sample,
        command.workers,
    )
    console = Console()
    with Console(stderr=True).status("reading") as status:
        facts = write_data_report(
            command.manifest,
            command.out,
            config,
            latents=command.latents,
            vae_digest=_vae_digest(command.model) if command.model else None,
            progress=status.update,
        )
    for finding in facts["findings"]:
        what = printable(finding.what.replace("\N{THIN SPACE}", ","))  # as all numbers on a terminal
        console.print(f"{'!' if finding.grave else '·'} {what}", markup=False, highlight=False, soft_wrap=True)
    if not facts["findings"]:
        console.print("nothing deserves attention", highlight=False)
    console.print(f"wrote {command.out}", markup=False, highlight=False, soft_wrap=True)


def _vae_digest(model: Path) -> str:
    from sumizome.models.sdxl import load_model
    from sumizome.models.vae import vae_digest

    return vae_digest(load_model(model, components=("vae",)).vae)
