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
from loss_plot import read_validation
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("work/demo")
COLORS = ("black", "white")
SEEDS = 8
FINITE_SIGMA = 1.83
"""SDXL's own last sigma, 14.6 on a canvas of 1024², means this much noise on the demo's 16 × 16 latents:
14.6 · 16/128. Averaged over the canvas, both leave the same trace of the picture's brightness in the noise."""

MARK = WORK / ".made-by-demo"
"""Only a folder that carries this is cleared for a new run."""


def main() -> None:
    os.chdir(ROOT)
    started = time.monotonic()
    start_afresh()
    run(f"python demo/draw.py --out {WORK}/pictures --count 4000")
    run(f"sumizome init --out {WORK}/tiny")
    run(f"sumizome ingest {WORK}/pictures --manifest {WORK}/manifest.parquet")
    run(f"sumizome prepare {WORK}/manifest.parquet --model {WORK}/tiny --out {WORK}/latents --area 64 --step 16")
    train_seconds = run("sumizome train demo/train.toml")

    sample = f"sumizome sample --model {WORK}/run --batch-size 16 --guidance.guidance-scale 4"
    extremes = " ".join(f"'completely {color}'" for color in COLORS) + f" --count {SEEDS}"
    run(f"{sample} --out {WORK}/samples/pure --prompt {extremes}")
    run(f"{sample} --out {WORK}/samples/finite --sigma-max {FINITE_SIGMA} --prompt {extremes}")
    run(f"{sample} --out {WORK}/samples/characters --prompts demo/prompts/characters.txt")
    run(f"sumizome export {WORK}/run --folder {WORK}/export/diffusers --file {WORK}/export/tiny.safetensors")

    summary = summarise(train_seconds, time.monotonic() - started)
    (WORK / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_contact_sheet(sheet_data(summary), WORK / "sheet.png", WORK / "sheet.html")
    print(json.dumps(summary, indent=2))
    print(f"\ncontact sheet: {WORK}/sheet.png and {WORK}/sheet.html\nsummary:       {WORK}/summary.json")


def start_afresh() -> None:
    """Clears what an earlier demo left; stops if the folder is anything else."""
    if WORK.exists() and not MARK.exists():
        sys.exit(f"demo: {ROOT / WORK} exists and was not made by the demo; move it away")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    MARK.touch()


def run(command: str) -> float:
    """Prints the command, runs it as typed, and returns its seconds; stops the demo if it fails."""
    print(f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    python = {"python": [sys.executable], "sumizome": [sys.executable, "-m", "sumizome"]}[program]
    started = time.monotonic()
    done = subprocess.run([*python, *arguments], check=False)
    if done.returncode:
        sys.exit(f"demo: that command ended with status {done.returncode}")
    return time.monotonic() - started


def summarise(train_seconds: float, total_seconds: float) -> dict[str, float | int]:
    """The demo's numbers: mean brightness over the seeds, times in seconds."""
    records = metrics()
    speed = [record["images_per_second"] for record in records if "images_per_second" in record]
    return {
        "black": brightness("pure", "black"),
        "white": brightness("pure", "white"),
        "black_finite_start": brightness("finite", "black"),
        "white_finite_start": brightness("finite", "white"),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(total_seconds, 1),
        "steps": records[-1]["step"],
        "images_per_second": round(float(np.mean(speed)), 1),
    }


def metrics() -> list[dict]:
    return [json.loads(line) for line in (WORK / "run/metrics.jsonl").read_text().splitlines()]


def brightness(start: str, color: str) -> float:
    """Mean over a color's pictures, 0 = black, 1 = white."""
    values = [np.asarray(Image.open(path), dtype=np.float64).mean() / 255 for path in extremes_of(start, color)]
    return round(float(np.mean(values)), 4)


def extremes_of(start: str, color: str) -> list[Path]:
    """A color's pictures from pure noise ("pure") or from a finite sigma ("finite"), in the order of seeds."""
    first = COLORS.index(color) * SEEDS
    return pictures(start)[first : first + SEEDS]


def pictures(name: str) -> list[Path]:
    return sorted((WORK / "samples" / name).glob("0*.png"))


def sheet_data(summary: dict[str, float | int]) -> SheetData:
    """What the contact sheet shows, from the run's own files."""
    lines = Path("demo/prompts/characters.txt").read_text(encoding="utf-8").splitlines()
    prompts = [line.split(" --")[0] for line in lines if line and not line.startswith("#")]
    rows = []
    for color in COLORS:
        for start, note in (("pure", "from pure noise"), ("finite", f"from sigma {FINITE_SIGMA}")):
            rows.append(ImageRow(f"“completely {color}”", extremes_of(start, color), note))
    return SheetData(
        title="Sumizome",
        subtitle=f"A tiny SDXL (U-Net of 2.9 M parameters, a thousandth of SDXL's) after {summary['steps']} steps "
        "on 4 000 drawn pictures",
        pure_noise=rows,
        pictures=[ImageRow("prompts", pictures("characters"), captions=prompts)],
        validation=read_validation(WORK / "run/metrics.jsonl"),
        summary={key: float(value) for key, value in summary.items()},
    )


if __name__ == "__main__":
    main()
