"""The bundle, the time ids' order, and the U-Net call against diffusers' own micro-conditioning."""

import torch

from sumizome.models.conditioning import UNetConditioning, apply_unet, canvas_time_ids, time_ids
from sumizome.models.sdxl import SDXLModel


def _conditioning(batch: int) -> UNetConditioning:
    draw = torch.Generator().manual_seed(1)
    embeds = torch.randn(batch, 77, 160, generator=draw)
    return UNetConditioning(embeds, torch.randn(batch, 96, generator=draw), canvas_time_ids((64, 48), batch))


def test_time_ids_are_height_first() -> None:
    assert time_ids([(1200, 800)], [(10, 20)], [(1024, 640)]).tolist() == [[1200, 800, 10, 20, 1024, 640]]
    assert canvas_time_ids((1216, 832), 2).tolist() == [[1216, 832, 0, 0, 1216, 832]] * 2


def test_time_ids_survive_a_cast_to_half_precision() -> None:
    moved = _conditioning(1).to("cpu", torch.bfloat16)
    assert moved.prompt_embeds.dtype == torch.bfloat16 and moved.time_ids.dtype == torch.float32


def test_batches_are_joined_cut_and_repeated() -> None:
    three = _conditioning(3)
    joined = UNetConditioning.cat([three.rows(slice(0, 1)), three.rows([1, 2])])
    assert len(joined) == 3
    for name in ("prompt_embeds", "pooled_prompt_embeds", "time_ids"):
        assert torch.equal(getattr(joined, name), getattr(three, name))
    assert torch.equal(three.rows([0]).expand(4).prompt_embeds[3], three.prompt_embeds[0])


@torch.no_grad()
def test_every_part_of_the_conditioning_reaches_the_output(tiny: SDXLModel) -> None:
    draw = torch.Generator().manual_seed(2)
    noised, timesteps = torch.randn(1, 4, 16, 12, generator=draw), torch.tensor([999])
    base = _conditioning(1)
    changed = [
        UNetConditioning(base.prompt_embeds + 1, base.pooled_prompt_embeds, base.time_ids),
        UNetConditioning(base.prompt_embeds, base.pooled_prompt_embeds + 1, base.time_ids),
        UNetConditioning(base.prompt_embeds, base.pooled_prompt_embeds, base.time_ids + 16),
    ]
    output = apply_unet(tiny.unet, noised, timesteps, base)
    assert output.shape == noised.shape
    for other in changed:
        assert (apply_unet(tiny.unet, noised, timesteps, other) - output).abs().max() > 1e-5
