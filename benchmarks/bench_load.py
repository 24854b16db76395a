"""Main memory that a rank needs to load a network that FSDP2 cuts up: filled shard by shard, and loaded whole.

    python benchmarks/bench_load.py [--width 96]

Anonymous memory of each rank at its peak, beyond what it held before, in multiples of the network's own size in
float32; pages of the mapped file, which all ranks of a machine share and the kernel takes back, are not counted.
"""

import argparse
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from measurement import progress, record

from sumizome.distributed.parallelize import ParallelConfig, parallelize, put_shard
from sumizome.distributed.runtime import Ranks, join_ranks
from sumizome.export import write_diffusers_folder
from sumizome.models.architecture import unet_config
from sumizome.models.model_weights import fill_shards
from sumizome.models.networks import build_network, building_blocks
from sumizome.models.sdxl import load_model
from sumizome.models.tiny import build_tiny_model

WORLD, PORT = 2, 29611
FSDP = ParallelConfig(strategy="fsdp")
TARGET = 0.75
"""half of the network for each of two ranks, and the largest tensor"""


def shard_by_shard(folder: Path, ranks: Ranks) -> object:
    model = load_model(folder, components=("unet",), without_weights=("unet",))
    parallelize({"unet": model.unet}, building_blocks, ranks, FSDP)
    fill_shards(folder, {"unet": model.unet}, ranks.device, put_shard)
    return model


def whole_then_cut(folder: Path, ranks: Ranks) -> object:
    model = load_model(folder, components=("unet",))
    parallelize({"unet": model.unet}, building_blocks, ranks, FSDP)
    return model


def rank(number: int, folder: Path, load: Callable[[Path, Ranks], object], found: "multiprocessing.Queue") -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "lo"}
    with join_ranks("cpu") as ranks, watched() as peak:
        loaded = load(folder, ranks)
        ranks.gather(None)
        del loaded
    found.put(max(peak) - peak[0])


@contextmanager
def watched() -> Iterator[list[int]]:
    """Bytes of anonymous memory, at the start and then every few milliseconds."""
    seen, ended = [anonymous()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.003):
            seen.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def anonymous() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def in_a_fork(function: Callable[..., int], *arguments: object) -> int:
    """What the function returns; the memory that it used does not stay with this process."""
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()
    process = fork.Process(target=lambda: found.put(function(*arguments)))
    process.start()
    answer = int(found.get())
    process.join()
    return answer


def peak_of(load: Callable[[Path, Ranks], object], folder: Path) -> int:
    """The most that any rank needed."""
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()
    ranks = [fork.Process(target=rank, args=(number, folder, load, found)) for number in range(WORLD)]
    for process in ranks:
        process.start()
    peaks = [found.get() for _ in ranks]
    for process in ranks:
        process.join()
    return max(peaks)


def write_model(folder: Path, width: int) -> int:
    """A U-Net of SDXL's kind with other tiny networks; returns its bytes in float32."""
    tiny = build_tiny_model(seed=0)
    pooled = tiny.unet.config.projection_class_embeddings_input_dim - 6 * tiny.unet.config.addition_time_embed_dim
    config = unet_config(
        block_out_channels=(width, 2 * width, 4 * width),
        cross_attention_dim=tiny.unet.config.cross_attention_dim,
        pooled_dim=pooled,
    )
    unet = build_network("unet", config)
    write_diffusers_folder(replace(tiny, networks={**tiny.networks, "unet": unet}), folder)
    return 4 * sum(parameter.numel() for parameter in unet.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=96, help="channels of the first level; SDXL has 320")
    width = parser.parse_args().width
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        progress("a model is being made")
        size = in_a_fork(write_model, folder, width)
        progress(f"{size / 1e6:.0f} MB of weights, {WORLD} ranks")
        ours = peak_of(shard_by_shard, folder)
        record(
            f"loading a network of {size / 1e6:.0f} MB cut over {WORLD} ranks: peak of a rank ÷ the network",
            ours / size,
            "1",
            target=TARGET,
            better="lower",
            peer="loaded whole, then cut",
            peer_value=peak_of(whole_then_cut, folder) / size,
        )


if __name__ == "__main__":
    main()
