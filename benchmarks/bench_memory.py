"""The predicted memory of a training step beside the measured: what `sumizome plan` believes, held to a real step.

Both peaks are those of torch's allocator: what a kernel keeps to itself (a convolution's workspace) is in neither.
    python benchmarks/bench_memory.py [--device cuda] [--full-size]
"""

import argparse

import torch
from measurement import record
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sumizome.distributed.parallelize import apply_checkpointing
from sumizome.models.architecture import unet_config
from sumizome.models.conditioning import UNetConditioning, apply_unet
from sumizome.models.networks import build_network, building_blocks
from sumizome.train.footprint import measure_step

MIB = 2**20
SMALL = {"block_out_channels": (64, 128, 256), "transformer_layers": (0, 1, 2), "cross_attention_dim": 256}
CASES = [
    # (precision, checkpointing, canvas side, batch)
    ("fp32", False, 256, 2),
    ("fp32", False, 384, 1),
    ("fp32", True, 384, 1),
    ("bf16", False, 512, 2),
    ("bf16", True, 512, 2),
]


def build(full_size: bool, device: str) -> nn.Module:
    return build_network("unet", unet_config() if full_size else unet_config(**SMALL), device=device)


def measured(case: tuple[str, bool, int, int], device: str, full_size: bool) -> int:
    """Peak bytes of forward and backward beyond what was there before, in this process."""
    precision, checkpointing, side, batch = case
    unet = build(full_size, device).train()
    if checkpointing:
        apply_checkpointing(building_blocks(unet))
    latents = torch.randn(batch, 4, side // 8, side // 8, device=device)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    condition = UNetConditioning(
        torch.randn(batch, 231, config.cross_attention_dim, device=device),
        torch.randn(batch, pooled, device=device),
        torch.zeros(batch, 6, device=device),
    )

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            output = apply_unet(unet, latents, torch.zeros(batch, dtype=torch.int64, device=device), condition)
        output.float().square().mean().backward()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    alive = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full-size", action="store_true")
    arguments = parser.parse_args()
    for case in CASES:
        precision, checkpointing, side, batch = case
        if arguments.device == "cpu" and precision != "fp32":
            continue  # a CPU's autocast keeps other operations in float32 than a GPU's
        predicted = measure_step(
            build(arguments.full_size, "meta"),
            canvas=(side, side),
            batch=batch,
            precision=precision,
            checkpointing=checkpointing,
        ).peak()
        found = measured(case, arguments.device, arguments.full_size)
        what = f"{precision}{', checkpointing' if checkpointing else ''}, {batch} × {side}²"
        record(
            f"step memory predicted ÷ measured ({arguments.device}, {what})",
            predicted / MIB,
            "MiB",
            better="lower",
            peer="measured peak",
            peer_value=found / MIB,
        )


if __name__ == "__main__":
    main()
