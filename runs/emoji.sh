#!/usr/bin/env bash
# The whole path on real pictures that nobody here drew: the Noto colour emoji font, with Unicode's keywords as tags.
# Needs the Debian packages fonts-noto-color-emoji and unicode-cldr-core, and fonttools: pip install 'sumizome[emoji]'.
# About ten minutes on two CPU cores. Everything is written below work/emoji.
set -euo pipefail
cd "$(dirname "$0")/.."
work=work/emoji
mkdir -p "$work"

# 1. The pictures: one PNG with transparency an emoji, its name and keywords in a .txt beside it.
python demo/emoji.py --out "$work/pictures"

# 2. A manifest: every picture decoded once; transparency is composited on white.
sumizome ingest "$work/pictures" --manifest "$work/manifest.parquet" --background white

# 3. A tiny SDXL to train, and the pictures as its latents.
[ -d "$work/tiny" ] || sumizome init --out "$work/tiny"
sumizome prepare "$work/manifest.parquet" --model "$work/tiny" --out "$work/latents" --area 64 --step 16

# 4. Train; run the script again after an interruption from here on, and training goes on where it was.
sumizome train runs/emoji.toml

# 5. Look: prompts are Unicode's own names and keywords.
sumizome sample --model "$work/run" --out "$work/samples" --count 4 --prompt \
  "red heart" "grinning face, smile" "full moon, night" "evergreen tree" "red apple" "soccer ball" "black circle" "flag"

# 6. Files for other programs.
sumizome export "$work/run" --folder "$work/export/diffusers" --file "$work/export/emoji.safetensors" --overwrite
