"""Training at SDXL's size on one GPU: images/s, MFU and peak memory per bucket beside the plan's, DDP against FSDP2.

    python benchmarks/bench_gpu.py               one card, minutes; weights are random, made by code; no network
    python benchmarks/bench_gpu.py --dry-run     the same path on a CPU with a small network: does the script work?

The step is the trainer's: autocast to bfloat16, checkpointing, clipping, fused AdamW, EMA. Text embeddings are made up:
what is measured is the U-Net, whose FLOP are those of `forward_flop`, three times (what checkpointing computes again
not counted). MFU is against a card's dense bfloat16 peak, `--peak-tflops`, 989 for an H100 SXM. Parity: the same steps
under DDP and FSDP2, each with one rank, on a smaller network.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from measurement import progress, record
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sumizome.distributed.parallelize import apply_checkpointing
from sumizome.models.architecture import unet_config
from sumizome.models.conditioning import UNetConditioning, apply_unet, canvas_time_ids
from sumizome.models.networks import build_network, building_blocks
from sumizome.train.ema import Ema, EmaConfig
from sumizome.train.flop import forward_flop
from sumizome.train.footprint import measure_step
from sumizome.train.optim import OptimConfig, build_optimizer

SMALL = {"block_out_channels": (64, 128, 256), "transformer_layers": (0, 1, 2), "cross_attention_dim": 256}
SMALLEST = {"block_out_channels": (32, 64), "transformer_layers": (0, 1), "cross_attention_dim": 64}
CANVASES = ((1024, 1024), (832, 1216), (1280, 768))
TOKENS = 231
H100_TFLOPS, MFU, PARITY = 989.0, 0.40, 1e-4
GIB = 2**30


@dataclass(frozen=True)
class Bench:
    """What is measured on which device."""

    device: torch.device
    shape: dict[str, object]
    """`unet_config`'s arguments."""
    canvases: tuple[tuple[int, int], ...]
    batch: int
    steps: int
    peak_tflops: float
    parity_shape: dict[str, object]
    parity_canvas: tuple[int, int]
    parity_steps: int


class Step:
    """A training step of a U-Net on made-up latents and conditions."""

    def __init__(self, unet: nn.Module, device: torch.device, canvas: tuple[int, int], batch: int) -> None:
        config = unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        random = torch.Generator().manual_seed(0)
        shape = (batch, 4, canvas[0] // 8, canvas[1] // 8)
        self.device, self.unet = device, unet
        self.noised, self.target = (torch.randn(shape, generator=random).to(device) for _ in range(2))
        self.timesteps = torch.randint(1000, (batch,), generator=random).to(device)
        self.condition = UNetConditioning(
            torch.randn(batch, TOKENS, config.cross_attention_dim, generator=random),
            torch.randn(batch, pooled, generator=random),
            canvas_time_ids(canvas, batch),
        ).to(device)

    def loss(self) -> torch.Tensor:
        # A CPU without bfloat16 units takes minutes for what takes seconds in float32.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = apply_unet(self.unet, self.noised, self.timesteps, self.condition)
        return (output.float() - self.target).square().mean()


def measure_speed(bench: Bench) -> None:
    """Prints speed, MFU and memory for each canvas."""
    unet = random_unet(bench.shape, bench.device)
    apply_checkpointing(building_blocks(unet))
    parameters = dict(unet.named_parameters(prefix="unet"))
    optimizer = build_optimizer(OptimConfig(warmup_steps=0), parameters)
    ema = Ema(EmaConfig(), parameters)
    for canvas in bench.canvases:
        progress(f"{bench.steps} steps at {canvas[0]}×{canvas[1]}")
        step = Step(unet, bench.device, canvas, bench.batch)
        seconds: list[float] = []
        reset_peak(bench.device)
        for number in range(bench.steps + 2):
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            step.loss().backward()
            norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
            nn.utils.clip_grads_with_norm_(parameters.values(), 1.0, norm)
            assert bool(norm.isfinite())
            optimizer.step()
            ema.update(number + 1)
            wait(bench.device)
            seconds.append(time.perf_counter() - started)
        optimizer.zero_grad(set_to_none=True)
        tell_speed(bench, canvas, median(seconds[2:]))
        tell_memory(bench, canvas, parameters)


def tell_speed(bench: Bench, canvas: tuple[int, int], seconds: float) -> None:
    what = f"{bench.batch} × {canvas[0]}×{canvas[1]} px, bf16, checkpointing"
    flop = 3 * forward_flop(build_network("unet", unet_config(**bench.shape), device="meta"), canvas=canvas)
    record(f"training step, {what}", bench.batch / seconds, "images/s", better="higher")
    mfu = flop * bench.batch / seconds / (bench.peak_tflops * 1e12)
    record(f"MFU, {what}, of {bench.peak_tflops:g} TFLOP/s", mfu, "1", target=MFU, better="higher")


def tell_memory(bench: Bench, canvas: tuple[int, int], parameters: dict[str, nn.Parameter]) -> None:
    if bench.device.type != "cuda":
        return
    state = sum(p.numel() for p in parameters.values()) * 4 * 4  # weights, average, two moments
    unet = build_network("unet", unet_config(**bench.shape), device="meta")
    working = measure_step(unet, canvas=canvas, batch=bench.batch, precision="bf16", checkpointing=True).peak()
    record(
        f"peak memory predicted ÷ measured, {bench.batch} × {canvas[0]}×{canvas[1]} px",
        (state + working) / GIB,
        "GiB",
        better="lower",
        peer="measured peak",
        peer_value=torch.cuda.max_memory_allocated() / GIB,
    )


def measure_parity(bench: Bench) -> None:
    """Prints how far the losses of DDP and FSDP2 are apart, relative, at the worst of some steps."""
    losses, steps = {}, bench.parity_steps
    for strategy in ("ddp", "fsdp"):
        progress(f"{steps} steps under {strategy}")
        losses[strategy] = trained_losses(bench, strategy, steps)
    pairs = zip(losses["ddp"], losses["fsdp"], strict=True)
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    record(f"DDP and FSDP2, loss apart (relative, worst of {steps} steps)", worst, "1", target=PARITY, better="lower")
    fall = losses["ddp"][-1] / losses["ddp"][0]
    record("the loss at the last of these steps ÷ the first", fall, "1", better="lower")


def trained_losses(bench: Bench, strategy: str, steps: int) -> list[float]:
    """The loss of each step, on one rank: `parallelize` leaves a single one alone, so its calls to torch stand here."""
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    unet: nn.Module = random_unet(bench.parity_shape, bench.device)
    config = unet.config
    if strategy == "ddp":
        unet = DistributedDataParallel(unet)
        unet.config = config
    else:
        mesh = init_device_mesh(bench.device.type, (1,), mesh_dim_names=("shard",))
        for block in building_blocks(unet):
            fully_shard(block, mesh=mesh)
        fully_shard(unet, mesh=mesh)
    optimizer = build_optimizer(
        OptimConfig(lr=1e-3, warmup_steps=0), {f"unet.{name}": p for name, p in unet.named_parameters()}
    )
    step = Step(unet, bench.device, bench.parity_canvas, 4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = step.loss()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    dist.destroy_process_group()
    return losses


def random_unet(shape: dict, device: torch.device) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return build_network("unet", unet_config(**shape), device=device).train()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="a small network on the CPU; its figures mean nothing")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps timed a canvas")
    parser.add_argument("--peak-tflops", type=float, default=H100_TFLOPS, help="dense bfloat16 peak of the card")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("bench_gpu: no CUDA device here; --dry-run shows that the script works")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if arguments.dry_run:
        peak = arguments.peak_tflops
        small = ((64, 64), (64, 96))
        bench = Bench(torch.device("cpu"), SMALLEST, small, 1, 1, peak, SMALLEST, (64, 64), 3)
    else:
        device, batch, steps, peak = torch.device("cuda"), arguments.batch, arguments.steps, arguments.peak_tflops
        bench = Bench(device, {}, CANVASES, batch, steps, peak, SMALL, (256, 256), 50)
    measure_speed(bench)
    measure_parity(bench)


if __name__ == "__main__":
    main()
