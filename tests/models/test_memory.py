"""Memory of loading and writing, in processes of their own: what lies in memory beside the mapped files."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from model_files import write_sparse

from sumizome.models.architecture import clip_config, unet_config
from sumizome.models.expected import expected_original, expected_shapes
from sumizome.models.tiny import tiny_vae_config

WIDE = unet_config(block_out_channels=(320, 640, 640), transformer_layers=(0, 1, 2), cross_attention_dim=512)
"""About 0.3 billion parameters: large beside what Python and torch take to start."""

_MEASURE = """
import gc, sys, threading, time
from pathlib import Path
import torch
from sumizome.models.sdxl import load_model
from sumizome.export import write_single_file

def anonymous():
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))

def peak_of(action):
    most, running = 0, True
    def watch():
        nonlocal most
        while running:
            most = max(most, anonymous())
            time.sleep(0.005)
    gc.collect()
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = action()
    finally:
        running = False
        thread.join()
    return most - before, result

path, out = map(Path, sys.argv[1:3])
load_model(path, components=())
loading, model = peak_of(lambda: load_model(path))
held = [sum(t.nbytes for t in network.state_dict().values()) for network in model.networks.values()]
writing, _ = peak_of(lambda: write_single_file(model, out, dtype="fp16"))
print(loading, sum(held), max(held), writing)
"""


@pytest.mark.slow
def test_no_second_copy_is_ever_in_memory(tmp_path: Path) -> None:
    """A whole model in, and out again: what is in memory beside it stays below a fifth of its largest network."""
    configs = {
        "unet": WIDE,
        "vae": tiny_vae_config(),
        "text_encoder": clip_config(width=64, layers=2, intermediate=256, projection_dim=64),
        "text_encoder_2": clip_config(width=448, layers=2, intermediate=896, activation="gelu", projection_dim=448),
    }
    shapes = {key: shape for name, config in configs.items() for key, shape in expected_original(name, config).items()}
    source = write_sparse(tmp_path / "model.safetensors", shapes, dtype="F16", marks=("v_pred", "ztsnr"))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(source), str(tmp_path / "out.safetensors")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loading, held, largest, writing = map(int, done.stdout.split())
    beside = loading - held
    print(f"held {held / 1e6:.0f} MB, largest {largest / 1e6:.0f} MB, loading {beside / 1e6:+.0f} MB beside it, "
          f"writing {writing / 1e6:.0f} MB")  # fmt: skip
    assert held > 0.8e9 and loading > 0.9 * held
    assert beside < 0.2 * largest
    # A few copies of the largest tensor (cast, read back, compared), and the step's own activations.
    tensors = [
        4 * math.prod(shape) for name, config in configs.items() for shape in expected_shapes(name, config).values()
    ]
    assert writing < 6 * max(tensors) + 200_000_000
