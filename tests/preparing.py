"""What the tests of preparation share: a small VAE, pictures, digests, and ends that come as a surprise."""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from sumizome.data.buckets import BucketConfig
from sumizome.data.ingest import ingest_to
from sumizome.data.manifest import Manifest, load_manifest
from sumizome.prepare import PrepareConfig, PrepareProgress, prepare_latents

CONFIG = PrepareConfig(BucketConfig(area=64, step=16), unit_size=8, batch_size=3, decode_threads=2)
SHAPES = [(64, 64), (96, 60), (60, 99), (70, 90), (200, 130), (40, 41)]
COUNT = 20


def small_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.13025,
    )


def draw_picture(folder: Path, number: int, *, caption: str | None = None) -> None:
    """A picture of one of six shapes; the 13th is a strip that no bucket is near to."""
    rng = np.random.default_rng(number)
    height, width = (16, 300) if number == 13 else SHAPES[number % len(SHAPES)]
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"p{number:02d}.png")
    (folder / f"p{number:02d}.txt").write_text(caption or f"1girl, tag {number}")


def draw_pictures(folder: Path, count: int = COUNT) -> Path:
    for number in range(count):
        draw_picture(folder, number)
    return folder


def manifest_of(folder: Path, path: Path) -> Manifest:
    ingest_to(path, [folder], workers=0)
    return load_manifest(path)


def drawn_set(root: Path, name: str) -> tuple[Path, Manifest]:
    """(folder of the drawn pictures, their manifest), both new below `root`."""
    (root / "pictures").mkdir()
    folder = draw_pictures(root / "pictures")
    return folder, manifest_of(folder, root / name)


def finish(
    manifest: Manifest, vae: AutoencoderKL, out: Path, config: PrepareConfig = CONFIG, *, retry_rejects: bool = False
) -> PrepareProgress:
    *_, last = prepare_latents(manifest, vae, out, config, retry_rejects=retry_rejects)
    assert last.written + last.rejected == last.total == len(manifest)
    return last


def tree_digest(root: Path) -> dict[str, str]:
    """Every file, hidden ones and all."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


_CLEAN = multiprocessing.get_context("forkserver")
"""Processes forked from one that has done nothing yet: libvips' threads do not live on in a fork of this one."""
_CLEAN.set_forkserver_preload(["sumizome.prepare", "sumizome.data.ingest"])


def start_preparer(
    manifest: Manifest,
    vae: AutoencoderKL,
    out: Path,
    config: PrepareConfig = CONFIG,
    arrange: Callable[[], None] | None = None,
    *,
    retry_rejects: bool = False,
) -> BaseProcess:
    """A process that prepares, after a call of `arrange`. Its exit code is 0, or minus the signal that ended it."""
    process = _CLEAN.Process(target=_prepare, args=(manifest, vae, out, config, arrange, retry_rejects))
    process.start()
    return process


def _prepare(
    manifest: Manifest,
    vae: AutoencoderKL,
    out: Path,
    config: PrepareConfig,
    arrange: Callable[[], None] | None,
    retry_rejects: bool,
) -> None:
    if arrange is not None:
        arrange()
    finish(manifest, vae, out, config, retry_rejects=retry_rejects)


def exit_code(process: BaseProcess) -> int:
    """Waits for its end."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def seconds_undisturbed(manifest: Manifest, vae: AutoencoderKL, folder: Path, config: PrepareConfig = CONFIG) -> float:
    """How long a preparer's process lives: moments to kill it at are shares of that, on machines fast and slow."""
    for timed in ("first", "second"):  # the first waits for what all processes are forked from
        began = time.monotonic()
        assert exit_code(start_preparer(manifest, vae, folder / timed, config)) == 0
        seconds = time.monotonic() - began
    return seconds


def killed_at_replace(number: int, *, after: bool) -> Callable[[], None]:
    """SIGKILL just before, or just after, the process's n-th rename: where every commit is made."""
    return partial(_die_at_replace, number, after)


def _die_at_replace(number: int, after: bool) -> None:
    rename, count = Path.replace, iter(range(1000))

    def replace_or_die(self: Path, target: Path) -> Path:
        dies = next(count) == number
        if dies and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = rename(self, target)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace_or_die  # type: ignore[method-assign]


def killed_at_unlink(number: int) -> Callable[[], None]:
    """SIGKILL just after the process's n-th removal of a file."""
    return partial(_die_at_unlink, number)


def _die_at_unlink(number: int) -> None:
    unlink, count = Path.unlink, iter(range(1000))

    def unlink_and_die(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=missing_ok)
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.unlink = unlink_and_die  # type: ignore[method-assign]
