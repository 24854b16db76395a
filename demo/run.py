"""The whole path on pictures that the demo draws itself: the commands a user would type, printed and run one by one.

Everything is written below `work/demo`. The end is a contact sheet (PNG and HTML) and `summary.json`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from contact_sheet import ImageRow, SheetData, write_contact_sheet
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("work/demo")
SEEDS = 8
FINITE_SIGMA = 1.83
"""SDXL's own last sigma, 14.6 on a canvas of 1024², means this much noise on the demo's 16 × 16 latents:
14.6 · 16/128. Averaged over the canvas, both leave the same trace of the picture's brightness in the noise."""

sumizome = [sys.executable, "-m", "sumizome"]


def main() -> None:
    os.chdir(ROOT)
    started = time.monotonic()
    if WORK.exists():
        shutil.rmtree(WORK)
    WORK.mkdir(parents=True)

    run([sys.executable, "demo/draw.py", "--out", f"{WORK}/pictures", "--count", "4000"])
    run([*sumizome, "init", "--out", f"{WORK}/tiny"])
    run([*sumizome, "ingest", f"{WORK}/pictures", "--manifest", f"{WORK}/manifest.parquet"])
    run([*sumizome, "prepare", f"{WORK}/manifest.parquet", "--model", f"{WORK}/tiny", "--out", f"{WORK}/latents",
         "--area", "64", "--step", "16"])  # fmt: skip
    train_started = time.monotonic()
    run([*sumizome, "train", "demo/train.toml"])
    train_seconds = time.monotonic() - train_started

    for color in ("black", "white"):
        sample(f"{color}-pure", "--prompt", f"completely {color}", "--count", str(SEEDS))
        sample(
            f"{color}-finite",
            "--prompt",
            f"completely {color}",
            "--count",
            str(SEEDS),
            "--sigma-max",
            str(FINITE_SIGMA),
        )
    sample("characters", "--prompts", "demo/prompts/characters.txt")
    run(
        [
            *sumizome,
            "export",
            f"{WORK}/run",
            "--folder",
            f"{WORK}/export/diffusers",
            "--file",
            f"{WORK}/export/tiny.safetensors",
        ]
    )

    summary = summarise(train_seconds, time.monotonic() - started)
    (WORK / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_contact_sheet(sheet_data(summary), WORK / "sheet.png", WORK / "sheet.html")
    print(json.dumps(summary, indent=2))
    print(f"\ncontact sheet: {WORK}/sheet.png and {WORK}/sheet.html\nsummary:       {WORK}/summary.json")


def run(command: list[str]) -> None:
    """Prints the command as a user would type it, runs it, and stops the demo if it fails."""
    shown = command[1:] if command[0] == sys.executable else command
    shown = shown[1:] if shown[:1] == ["-m"] else ["python", *shown]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"demo: that command ended with status {done.returncode}")


def sample(name: str, *options: str) -> None:
    run(
        [
            *sumizome,
            "sample",
            "--model",
            f"{WORK}/run",
            "--out",
            f"{WORK}/samples/{name}",
            "--batch-size",
            "16",
            *options,
        ]
    )


def summarise(train_seconds: float, total_seconds: float) -> dict[str, float | int]:
    """The demo's numbers: mean brightness over the seeds, times in seconds."""
    records = metrics()
    speed = [record["images_per_second"] for record in records if "images_per_second" in record]
    return {
        "black": round(brightness("black-pure"), 4),
        "white": round(brightness("white-pure"), 4),
        "black_finite_start": round(brightness("black-finite"), 4),
        "white_finite_start": round(brightness("white-finite"), 4),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(total_seconds, 1),
        "steps": records[-1]["step"],
        "images_per_second": round(float(np.mean(speed)), 1),
    }


def metrics() -> list[dict]:
    return [json.loads(line) for line in (WORK / "run/metrics.jsonl").read_text().splitlines()]


def brightness(name: str) -> float:
    """Mean over the pictures of a folder, 0 = black, 1 = white."""
    values = [np.asarray(Image.open(path), dtype=np.float64).mean() / 255 for path in pictures(name)]
    assert len(values) == SEEDS, f"{name}: {len(values)} pictures, expected {SEEDS}"
    return float(np.mean(values))


def pictures(name: str) -> list[Path]:
    return sorted((WORK / "samples" / name).glob("0*.png"))
