"""Measure decoders on pictures that training did not see, before and after, and write one JSON and one HTML page.

    sumizome vae evaluate --model work/decoder --out evaluation.html
    sumizome vae evaluate --model base.safetensors other-vae.safetensors --manifest manifest.parquet --out page.html

A run directory is measured beside the decoder that it began with. In the same table: the pictures themselves, saved as
JPEG 75 and 90.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Command", "run"]


@dataclass(frozen=True)
class Command:
    """What `sumizome vae evaluate` takes."""

    model: tuple[Path, ...]
    """Run directories of `sumizome vae train`, models, or VAEs alone. The first is what the others are compared with;
    of a run directory it is the decoder that it began with."""
    out: Path
    """The .html page; its numbers are written beside it as .json."""
    manifest: Path | None = None
    """The pictures; by default those of the first run directory."""
    count: int = 64
    """Held-out pictures that are measured; one in twenty of the manifest at most, and of a run's own manifest no more
    than it held out."""
    side: int = 1024
    """Of the window in the middle of each picture that is measured, px at most."""
    shown: int = 8
    """Pictures of which the page shows a crop."""
    lpips_weights: Path | None = None
    """Your LPIPS weights as safetensors; without them LPIPS is not measured."""
    weights: Literal["ema", "raw"] = "ema"
    """Of run directories: the averaged decoder, or the trained one as it is."""
    device: str = "auto"
    """"auto" takes a CUDA device when there is one; else cpu, cuda, cuda:1."""


def run(command: Command) -> None:
    """Measures, writes page and JSON, prints a line a row."""
    import json

    from rich.console import Console

    from sumizome.device import choose_device
    from sumizome.errors import ConfigError
    from sumizome.files import write_atomically
    from sumizome.report.page import check_page_path, write_page
    from sumizome.train.run_dir import is_run_dir
    from sumizome.vae.build import open_pictures
    from sumizome.vae.evaluation import evaluate_decoders, held_out_windows
    from sumizome.vae.page import decoder_page
    from sumizome.vae.perceptual import load_lpips
    from sumizome.vae.scores import MEASURES
    from sumizome.vae.trained_vae import held_out_by, load_candidates, read_vae_config

    check_page_path(command.out)
    if command.count < 1 or command.side < 64:
        raise ConfigError("--count must be 1 or more, and --side 64 px or more")
    runs = [path for path in command.model if is_run_dir(path)]
    manifest = command.manifest or (read_vae_config(runs[0]).manifest if runs else None)
    if manifest is None:
        raise ConfigError("no run directory among the models says which pictures are meant: give --manifest")
    of_these = [path for path in runs if read_vae_config(path).manifest == manifest.resolve()]
    count = min([command.count, *map(held_out_by, of_these)])
    if not count:
        raise ConfigError(
            "a run directory among the models held no picture out (validation.count), so it was trained on all of "
            "these: give other pictures with --manifest"
        )
    device = choose_device(command.device)
    lpips = None if command.lpips_weights is None else load_lpips(command.lpips_weights).to(device)
    with Console(stderr=True).status("loading") as status:
        candidates = load_candidates(command.model, command.weights, device)
        pictures = list(held_out_windows(open_pictures(manifest), count, command.side))
        facts, closes = evaluate_decoders(
            candidates, pictures, lpips=lpips, shown=command.shown, told=lambda line: status.update(line)
        )
    facts = {"manifest": str(manifest), "side": command.side, **facts}
    table = command.out.with_suffix(".json")
    text = json.dumps(facts, ensure_ascii=False, indent=1)
    write_atomically(table, lambda path: path.write_text(text, encoding="utf-8"))
    write_page(command.out, decoder_page(facts, closes))
    for row in facts["rows"]:
        parts = [f"{MEASURES[name].title} {v['value']:.{MEASURES[name].digits}f}" for name, v in row["values"].items()]
        better = "" if row["better"] is None else f"; better in {sum(row['better'].values())} of {len(row['better'])}"
        print(f"{row['name']}: {', '.join(parts)}{better}")
    print(f"wrote {command.out} and {table}")
