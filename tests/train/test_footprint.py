"""The predicted step against a real one: what torch's own allocator saw."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sumizome.distributed.parallelize import apply_checkpointing
from sumizome.models.conditioning import UNetConditioning, apply_unet
from sumizome.models.networks import build_network, building_blocks
from sumizome.models.tiny import tiny_unet_config
from sumizome.train.footprint import measure_step


def _real_step(checkpointing: bool) -> int:
    """The peak that torch's allocator saw in a forward and backward pass of the tiny U-Net, bytes."""
    unet = build_network("unet", tiny_unet_config()).train()
    if checkpointing:
        apply_checkpointing(building_blocks(unet))
    condition = UNetConditioning(torch.randn(4, 231, 160), torch.randn(4, 96), torch.zeros(4, 6))
    latents, timesteps = torch.randn(4, 4, 16, 24), torch.zeros(4, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        apply_unet(unet, latents, timesteps, condition).square().mean().backward()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    alive = peak = 0
    for event in events:
        alive += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_predicted_peak_is_the_allocators(checkpointing: bool) -> None:
    unet = build_network("unet", tiny_unet_config(), device="meta")
    predicted = measure_step(
        unet, canvas=(64, 96), vae_factor=4, batch=4, precision="fp32", checkpointing=checkpointing
    )
    assert predicted.peak() == pytest.approx(_real_step(checkpointing), rel=0.05)


def test_every_gradient_is_counted_once_and_only_one_when_updates_are_fused() -> None:
    unet = build_network("unet", tiny_unet_config(), device="meta")
    footprint = measure_step(unet, canvas=(64, 64), vae_factor=4, batch=1, precision="fp32")
    weights = 4 * sum(parameter.numel() for parameter in unet.parameters())
    assert footprint.gradient_bytes == weights
    assert footprint.peak() - footprint.peak(gradient_shards=4) <= weights * 3 / 4
    assert footprint.peak(fused_backward=True) < footprint.peak()
    halves = measure_step(unet, canvas=(64, 64), vae_factor=4, batch=1, precision="pure_bf16")
    assert halves.gradient_bytes == weights // 2


def test_activations_grow_with_the_batch_and_weights_do_not() -> None:
    unet = build_network("unet", tiny_unet_config(), device="meta")
    one, two, three = (
        int(measure_step(unet, canvas=(64, 64), vae_factor=4, batch=n, precision="bf16").working.max())
        for n in (1, 2, 3)
    )
    assert three - two == pytest.approx(two - one, rel=0.02)
