"""`sumizome inspect` on a file of SDXL's size, from the command's start to its end, beside a bare look at the header.

    python benchmarks/bench_inspect.py [rounds]          # 5

The file has SDXL's 2 515 tensors in float16, both marks and ModelSpec metadata, 6.9 GB over a hole in the disk: the
header alone is read, so it does not matter what the data is. Both sides are new Python processes, taken in turn, each
with its files in the system's cache and its modules compiled, as after any installation. The peer opens the file with
safetensors' own `safe_open` and prints the metadata and each tensor's name and shape. The clock counts what a user
waits; the processor's seconds, which other work on the machine changes less, are beside it.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measurement import record

from sumizome.models.architecture import clip_config, unet_config, vae_config
from sumizome.models.expected import expected_original

FILE = Path("build/bench/inspect.safetensors")
CONFIGS = {
    "unet": unet_config(),
    "vae": vae_config(),
    "text_encoder": clip_config(),
    "text_encoder_2": clip_config(width=1280, layers=32, intermediate=5120, activation="gelu", projection_dim=1280),
}
METADATA = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.prediction_type": "v-zsnr"}
PEER = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "np") as file:
    print(file.metadata())
    for name in file.keys():
        print(name, file.get_slice(name).get_shape())
"""


def make_file(path: Path) -> int:
    """Writes the header and leaves the data a hole; returns the file's size in bytes."""
    header: dict[str, object] = {"__metadata__": METADATA}
    reached = 0
    for name, config in CONFIGS.items():
        for key, shape in expected_original(name, config).items():
            stop = reached + 2 * math.prod(shape)
            header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [reached, stop]}
            reached = stop
    for mark in ("v_pred", "ztsnr"):
        header[mark] = {"dtype": "F32", "shape": [0], "data_offsets": [reached, reached]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + reached)
    return 8 + len(raw) + reached


def seconds_of(command: list[str]) -> tuple[float, float]:
    """(on the clock, of the processor) from the start of a process to its end."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(FILE.parent.resolve() / "compiled")
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, used


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    size = make_file(FILE)
    ours = [sys.executable, "-m", "sumizome", "inspect", str(FILE)]
    peer = [sys.executable, "-c", PEER, str(FILE)]
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for number in range(rounds + 1):
        for name, command in (("ours", ours), ("peer", peer)):
            seconds = seconds_of(command)
            if number:  # the first brings the files into memory
                taken[name].append(seconds)
    for index, clock, target in ((0, "on the clock", 1.0), (1, "of the processor", None)):
        mine, theirs = (statistics.median(pair[index] for pair in taken[side]) for side in ("ours", "peer"))
        name = f"inspect a file of {size / 1e9:.1f} GB, the whole command, {clock}"
        record(name, mine, "s", target=target, better="lower", peer="safe_open: names and shapes", peer_value=theirs)
    FILE.unlink()


if __name__ == "__main__":
    main()
