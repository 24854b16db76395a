"""Sampling beside its floor and its peer, in one run: bare U-Net calls, and diffusers' pipeline.

    python benchmarks/bench_sample.py [--steps 28] [--rounds 7]

The tiny model at its own 64×64 pixels, one picture with guidance: prompt and negative prompt in one batch of two rows,
on one thread. Times are of the processor, so that other processes do not count; each figure is the best round, and the
rounds of all take turns. `overhead` is what sampling adds to its U-Net calls, measured within the same rounds.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from measurement import record

from sumizome.diffusion.guidance import GuidanceConfig
from sumizome.diffusion.samplers import SAMPLERS
from sumizome.diffusion.schedule import build_noise_schedule
from sumizome.diffusion.sigmas import build_sigmas
from sumizome.inference import (
    PictureRequest,
    SamplingConfig,
    draw_pictures,
    guided_denoiser,
    initial_noise,
    without_autograd,
)
from sumizome.models.sdxl import SDXLModel
from sumizome.models.tiny import build_tiny_model

CANVAS = (64, 64)


@contextmanager
def timed_calls(unet: torch.nn.Module) -> Iterator[list[float]]:
    """Seconds of each call of the U-Net while the block runs."""
    seconds: list[float] = []
    forward = unet.forward

    def timed(*inputs: object, **options: object) -> object:
        start = time.process_time()
        result = forward(*inputs, **options)
        seconds.append(time.process_time() - start)
        return result

    unet.forward = timed
    try:
        yield seconds
    finally:
        unet.forward = forward


def seconds_of(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def overhead(model: SDXLModel, request: PictureRequest) -> float:
    """Seconds of one sampling loop beyond its U-Net calls, over those of the calls."""
    schedule = build_noise_schedule(model.schedule_config)
    sigmas = build_sigmas("native", request.sampling.steps, schedule)
    denoise = guided_denoiser(model, [request])
    x = initial_noise(0, (4, 16, 16))[None] * sigmas[0].float()
    with without_autograd(), timed_calls(model.unet) as calls:
        total = seconds_of(lambda: list(SAMPLERS["euler"](denoise, x, sigmas, lambda key: x)))
    assert len(calls) == request.sampling.steps
    return total / sum(calls) - 1


def peer_pipeline(model: SDXLModel) -> Callable[[int], object]:
    """diffusers' pipeline around the same modules, with the schedule of exported models, as `draw(steps)`."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    tokenizers = (None, None)
    first, second = model.text_encoders
    pipeline = StableDiffusionXLPipeline(
        model.vae, first, second, *tokenizers, model.unet, scheduler, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    width = sum(encoder.config.hidden_size for encoder in (first, second))
    embeds, pooled = torch.zeros(1, 77, width), torch.zeros(1, second.config.projection_dim)
    return lambda steps: pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=pooled,
        num_inference_steps=steps,
        guidance_scale=5.0,
        height=CANVAS[0],
        width=CANVAS[1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build_tiny_model()
    sampling = SamplingConfig(steps=options.steps, guidance=GuidanceConfig(5.0))
    request = PictureRequest("1girl, red hair", canvas=CANVAS, sampling=sampling)
    draw_peer = peer_pipeline(model)
    extra, ours, theirs = [], [], []
    for _ in range(options.rounds + 1):  # the first warms up
        extra.append(overhead(model, request))
        # Prompt to picture; the peer is spared its text encoders.
        ours.append(seconds_of(lambda: list(draw_pictures(model, [request]))))
        theirs.append(seconds_of(lambda: draw_peer(options.steps)))
    record(
        "sampling loop over its U-Net calls, share added", min(extra[1:]), "1", target=0.01, better="lower",
        peer="bare U-Net calls, two rows", peer_value=0.0,
    )  # fmt: skip
    record(
        f"one picture in {options.steps} steps with guidance, prompt to pixels", min(ours[1:]), "s", better="lower",
        peer="diffusers StableDiffusionXLPipeline from embeddings", peer_value=min(theirs[1:]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
