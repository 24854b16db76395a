#!/usr/bin/env bash
# A VAE decoder finetuned on two CPU cores within five minutes: the tiny model's, on pictures that the demo draws.
# Everything is written below work/vae; the end is one page with the decoders side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
work=work/vae
mkdir -p "$work"

# 1. Pictures, their manifest, and a tiny SDXL: its VAE has been trained, on these and on emoji, by
#    demo/train_tiny_vae.py.
[ -d "$work/pictures" ] || python demo/draw.py --out "$work/pictures" --count 1000 --seed 1
sumizome ingest "$work/pictures" --manifest "$work/manifest.parquet"
[ -d "$work/tiny" ] || sumizome init --out "$work/tiny"

# 2. The decoder alone is trained, on crops at full resolution. Run the script again after an interruption: it goes on.
sumizome vae train runs/vae_tiny.toml

# 3. Before and after on the pictures that were held out, and beside them as JPEG.
sumizome vae evaluate --model "$work/run" --out "$work/evaluation.html"

# 4. Into a model, with the verdicts on float16 and tiles.
sumizome vae bake "$work/run" --out "$work/finetuned.safetensors" --overwrite
