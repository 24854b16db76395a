"""The closed form against the operations counted one by one, torch's own counter, and the published FLOP of SDXL."""

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sumizome.models.architecture import unet_config
from sumizome.models.conditioning import UNetConditioning, apply_unet
from sumizome.models.networks import build_network
from sumizome.models.text_encoding import encode_prompts, tokenize
from sumizome.models.tiny import tiny_unet_config
from sumizome.train.flop import forward_flop, image_flop, unet_flop

if TYPE_CHECKING:
    from sumizome.models.sdxl import SDXLModel


@pytest.fixture(scope="module")
def sdxl_unet() -> nn.Module:
    return build_network("unet", unet_config(), device="meta")


def test_flop_are_those_that_torch_counts_in_a_real_forward_pass() -> None:
    unet = build_network("unet", tiny_unet_config()).eval()
    condition = UNetConditioning(torch.randn(1, 77, 160), torch.randn(1, 96), torch.zeros(1, 6))
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        apply_unet(unet, torch.randn(1, 4, 16, 16), torch.zeros(1, dtype=torch.int64), condition)
    meta = build_network("unet", tiny_unet_config(), device="meta")
    assert forward_flop(meta, canvas=(64, 64), vae_factor=4, tokens=77) == pytest.approx(counter.get_total_flops())


def test_sdxl_at_1024_takes_the_published_flop(sdxl_unet: nn.Module) -> None:
    assert 3 * forward_flop(sdxl_unet, canvas=(1024, 1024), tokens=77) == pytest.approx(20.23e12, rel=0.01)


def test_five_small_passes_say_what_every_other_shape_takes(sdxl_unet: nn.Module) -> None:
    tiny_unet = build_network("unet", tiny_unet_config(), device="meta")
    for unet, factor, canvases in (
        (tiny_unet, 4, ((64, 64), (48, 80), (16, 112))),
        (sdxl_unet, 8, ((1216, 832),)),
    ):
        closed = unet_flop(unet, factor)
        for canvas, tokens in zip(canvases, (231, 77, 154), strict=False):
            # Exact: whole numbers, and a formula whose terms are whole numbers.
            assert closed(canvas, tokens) == forward_flop(unet, canvas=canvas, vae_factor=factor, tokens=tokens)


def test_an_image_is_three_passes_and_the_text_encoders_linear_layers(tiny: "SDXLModel") -> None:
    unet = build_network("unet", tiny_unet_config(), device="meta")
    frozen, trained = (
        image_flop(unet, tiny.text_encoders, vae_factor=4, text_is_trained=is_trained) for is_trained in (False, True)
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encode_prompts(tiny.text_encoders, tokenize(["a tag"], 1).input_ids)
    assert frozen((64, 64), 77) - 3 * frozen.unet((64, 64), 77) == 77 * frozen.text
    # Norms, biases and positions are in the count of weights, attention's scores are not: a few per cent at most.
    assert 77 * frozen.text == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert trained.text == 3 * frozen.text
