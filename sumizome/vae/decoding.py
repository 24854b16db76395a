"""The task of a decoder's run: crops are encoded by the frozen encoder, decoded, and compared.

A `train.task.Task`: the loop, its checkpoints, its ranks and its records are those of U-Net training. The invariant:
no gradient reaches the encoder, which computes in float32 whatever the decoder does: latents are those of the caches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from sumizome.models.vae import encode_pixels
from sumizome.train.task import Place, StepLoss
from sumizome.vae.crop_loader import CropBatch
from sumizome.vae.discriminator import AdversarialConfig, deceived, told_apart
from sumizome.vae.losses import DecoderLossConfig, terms_of
from sumizome.vae.perceptual import Lpips

__all__ = ["Decoding", "trained_networks"]


@dataclass(frozen=True)
class Decoding:
    """The VAE and what its decoder learns; a `task.Task`."""

    vae: AutoencoderKL
    losses: DecoderLossConfig
    adversarial: AdversarialConfig
    discriminator: nn.Module | None = None
    perceptual: Lpips | None = None
    num_timesteps: int = 0

    @property
    def clipped_apart(self) -> tuple[str, ...]:
        """The adversary's gradients say nothing of the decoder's."""
        return () if self.discriminator is None else ("discriminator",)

    def draw(self, batch: CropBatch, place: Place) -> int:
        """The step, which a warm-up goes by."""
        return place.step

    def loss(self, batch: CropBatch, drawn: int) -> StepLoss:
        """The loss of each sample, that of the adversary added: it moves other weights by other gradients."""
        device = next(self.vae.parameters()).device  # `.device` asks every module first
        pixels = batch.pixels.to(device)
        with torch.autocast(device.type, enabled=False):
            latents = encode_pixels(self.vae, pixels) if batch.latents is None else batch.latents.to(device)
        decoded = self.vae.decode(latents).sample
        with torch.autocast(device.type, enabled=False):
            terms = dict(terms_of(decoded.float(), pixels, batch.region.to(device), self.losses, self.perceptual))
            total = sum(getattr(self.losses, name) * term for name, term in terms.items())
            total = total * batch.weight.to(device)
        if self.discriminator is not None:
            weight, adversary = self._adversary(drawn, pixels, decoded)
            total = total + weight * adversary["adversarial"] + adversary["discriminator"]
            terms |= adversary
        squared = (decoded.detach().float().clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3))
        return StepLoss(weighted=total, unweighted=squared, parts=terms)

    def _adversary(self, step: int, pixels: Any, decoded: Any) -> tuple[float, dict[str, Any]]:
        """The weight of the decoder's term, and both sides' terms, under the precision of the run."""
        assert self.discriminator is not None
        weight, nothing = self.adversarial.weight_at(step), torch.zeros(len(pixels), device=pixels.device)
        if step < self.adversarial.start:
            return 0.0, {"adversarial": nothing, "discriminator": nothing}
        fooled = deceived(self.discriminator, decoded).float() if weight else nothing
        return weight, {"adversarial": fooled, "discriminator": told_apart(self.discriminator, pixels, decoded).float()}

    def log_line(self, batch: CropBatch, drawn: int) -> Mapping[str, Any]:
        """Where the crops lay in their pictures, (top, left) px."""
        return {"corners": batch.corners}


def trained_networks(vae: AutoencoderKL, discriminator: nn.Module | None = None) -> dict[str, nn.Module]:
    """What a run trains, by the beginning of its parameters' names."""
    networks = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    return networks if discriminator is None else {**networks, "discriminator": discriminator}
