"""Memory of loading and writing, in processes of their own: what lies in memory beside the mapped files."""

import subprocess
import sys
from pathlib import Path

import pytest
from model_files import write_sparse

from sumizome.models.architecture import unet_config
from sumizome.models.expected import expected_original, expected_shapes

WIDE = unet_config(block_out_channels=(320, 640, 640), transformer_layers=(0, 1, 2), cross_attention_dim=512)
"""About 0.2 billion parameters: large beside what Python and torch take to start."""

_MEASURE = """
import gc, sys, threading, time
from pathlib import Path
import torch
from sumizome.models.sdxl import load_model
from sumizome.export import write_unet_file

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
dtype = torch.float32
loading, model = peak_of(lambda: load_model(path, components=("unet",), dtype=dtype))
writing, _ = peak_of(lambda: write_unet_file(model, out, dtype="fp16"))
print(loading, writing)
"""


@pytest.mark.slow
def test_loading_takes_the_network_and_a_tensor_writing_takes_a_tensor(tmp_path: Path) -> None:
    shapes = expected_original("unet", WIDE)
    source = write_sparse(tmp_path / "unet.safetensors", shapes, dtype="F16", marks=("v_pred", "ztsnr"))
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(source), str(tmp_path / "out.safetensors")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loading, writing = map(int, done.stdout.split())
    sizes = [4 * _count(shape) for shape in expected_shapes("unet", WIDE).values()]
    print(f"U-Net {sum(sizes) / 1e6:.0f} MB, loading {loading / 1e6:.0f} MB, writing {writing / 1e6:.0f} MB")
    assert loading < 1.2 * sum(sizes)
    # A few copies of the largest tensor (cast, read back, compared), and the step's own activations.
    assert writing < 6 * max(sizes) + 200_000_000


def _count(shape: tuple[int, ...]) -> int:
    number = 1
    for side in shape:
        number *= side
    return number
