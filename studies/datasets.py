"""The studies' latents, made once by the commands a user would type: draw, ingest, prepare.

Owns where they lie (`work/studies/data`) and which sets there are. A set that stands there whole is used as it is.
"""

import contextlib
import fcntl
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from diffusers import AutoencoderKL

from studies.pictures import draw_demo_set, draw_discs, draw_people
from sumizome.cli.main import main as sumizome
from sumizome.data.latents import LatentCache, open_latents
from sumizome.evaluate.classifier import TagClassifier, read_classifier, train_classifier, write_classifier
from sumizome.evaluate.reference import Reference, load_reference
from sumizome.export import write_diffusers_folder
from sumizome.models.sdxl import load_model
from sumizome.models.tiny import TinySize, build_tiny_model

__all__ = ["ROOT", "SIZE", "WORK", "DataSet", "alone", "base_model", "latents", "reference"]

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "work" / "studies"

SIZE = TinySize(unet_widths=(16, 32, 64), text_widths=(32, 64))
"""A U-Net of 1.1 M parameters: 0.13 s of one core for a step of 16 latents of 16 × 16."""

_PICTURES: dict[str, tuple[Callable[[Path, int], None], int]] = {
    "demo": (draw_demo_set, 2400),
    "people": (draw_people, 1600),
    "discs": (draw_discs, 1600),
}


_HELD_OUT = 320
"""Half sets the classifier's thresholds and is what distances are measured from; the other half is the test."""


@dataclass(frozen=True)
class DataSet:
    """Pictures of one kind, on canvases of one area."""

    pictures: str
    """demo, people or discs."""
    side: int
    """px: of a square of that area; a latent is four pixels wide."""
    square: bool = True
    """Squares alone, or all aspect-ratio buckets of the area."""


def base_model(seed: int) -> Path:
    """The untrained model of a seed, as a diffusers folder. Its VAE is the same for all."""
    path = WORK / "data" / f"model-seed{seed}"
    if not path.exists():
        write_diffusers_folder(build_tiny_model(seed, SIZE), path)
    return path


def latents(data: DataSet) -> Path:
    """The set's latents, made where they are missing."""
    folder = WORK / "data"
    pictures, manifest = folder / data.pictures, folder / f"{data.pictures}.parquet"
    out = folder / f"{data.pictures}-{data.side}{'' if data.square else '-buckets'}"
    done = folder / f"{out.name}.done"
    if done.exists():
        return out
    draw, count = _PICTURES[data.pictures]
    if not manifest.exists():
        print(f"drawing {count} pictures: {data.pictures}", flush=True)
        draw(pictures, count)
        _run("ingest", pictures, "--manifest", manifest)
    side = str(data.side)
    square = ("--min-side", side, "--max-side", side) if data.square else ()
    _run("prepare", manifest, "--model", base_model(0), "--out", out, "--area", side, "--step", "16", *square)
    done.touch()
    return out


def _run(*words: str | Path) -> None:
    arguments = [str(word) for word in words]
    print("$ sumizome " + " ".join(arguments), flush=True)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = sumizome(arguments)
    if status:
        raise SystemExit(f"studies: that command ended with status {status}\n{said.getvalue()}")


@lru_cache(maxsize=8)
def reference(data: DataSet) -> tuple[Reference, TagClassifier]:
    """The set's held-out pictures as the VAE gives them back, and the classifier of its tags, made where it is missing.

    The reference has no training pictures: those that the classifier was trained on are needed for nothing else.
    """
    cache = open_latents(latents(data))
    vae = load_model(base_model(0), components=("vae",)).vae
    path = WORK / "data" / f"{cache.root.name}-classifier.safetensors"
    with alone(path):
        if not path.exists():
            _make_classifier(cache, vae, path)
    return load_reference(cache, vae, held_out=_HELD_OUT, train_pictures=0), read_classifier(path)


def _make_classifier(cache: LatentCache, vae: AutoencoderKL, path: Path) -> None:
    print(f"training a classifier: {path.stem}", flush=True)
    whole = load_reference(cache, vae, held_out=_HELD_OUT, train_pictures=1200)
    parts = (whole.train, whole.calibration, whole.test)
    write_classifier(train_classifier(whole.images, whole.tag_lists, parts, epochs=10), path)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds what is about to be made at `path`; another process that wants to make the same waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
