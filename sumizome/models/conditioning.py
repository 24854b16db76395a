"""What the U-Net is told beside the noised latents: the prompt's embeddings and SDXL's six size numbers.

Owns the bundle, the time ids and the one call into diffusers' U-Net. It encodes no text. Sizes are (height,
width) in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from sumizome.shapes import Latents, PooledPromptEmbeds, PromptEmbeds, TimeIds, Timesteps

__all__ = ["UNetConditioning", "apply_unet", "canvas_time_ids", "time_ids"]

Size = tuple[int, int]
"""(height, width) in pixels, or (top, left) of a crop."""


@dataclass(frozen=True)
class UNetConditioning:
    """A batch of conditions. Source: report §4.2; SDXL 2307.01952 §2.2."""

    prompt_embeds: PromptEmbeds
    """Both text encoders' penultimate states side by side, 77 rows a chunk."""
    pooled_prompt_embeds: PooledPromptEmbeds
    """The second text encoder's projected pooled state of the first chunk."""
    time_ids: TimeIds
    """original (h, w), crop (top, left), target (h, w)."""

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "UNetConditioning":
        """The same conditions on `device`; embeddings in `dtype`. Time ids stay float32: 4096 + 1 is no bfloat16."""
        return UNetConditioning(
            self.prompt_embeds.to(device, dtype),
            self.pooled_prompt_embeds.to(device, dtype),
            self.time_ids.to(device),
        )

    def expand(self, batch: int) -> "UNetConditioning":
        """One condition repeated to a batch; a batch of that size is returned as it is."""
        return UNetConditioning(*(t.expand(batch, *t.shape[1:]) for t in self._tensors()))

    def rows(self, selection: slice | Sequence[int]) -> "UNetConditioning":
        """The selected samples of the batch."""
        return UNetConditioning(*(tensor[selection] for tensor in self._tensors()))

    @staticmethod
    def cat(parts: Sequence["UNetConditioning"]) -> "UNetConditioning":
        """Batches one after the other; all must have the same number of prompt rows."""
        return UNetConditioning(*map(torch.cat, zip(*(part._tensors() for part in parts), strict=True)))

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.prompt_embeds, self.pooled_prompt_embeds, self.time_ids


def time_ids(original: Sequence[Size], crop: Sequence[Size], target: Sequence[Size]) -> TimeIds:
    """Float32 [b, 6]: original size, crop's top left corner and target size of each sample, each (height, width)."""
    rows = [(*o, *c, *t) for o, c, t in zip(original, crop, target, strict=True)]
    return torch.tensor(rows, dtype=torch.float32)


def canvas_time_ids(canvas: Size, batch: int = 1) -> TimeIds:
    """Time ids of `batch` pictures that were neither resized nor cropped: what sampling asks for."""
    return time_ids([canvas] * batch, [(0, 0)] * batch, [canvas] * batch)


def apply_unet(
    unet: UNet2DConditionModel, noised_latents: Latents, timesteps: Timesteps, conditioning: UNetConditioning
) -> Latents:
    """The U-Net's raw output for VP-scaled latents, in its own dtype (autocast decides that in training)."""
    added = {"text_embeds": conditioning.pooled_prompt_embeds, "time_ids": conditioning.time_ids}
    model_output: Latents
    (model_output,) = unet(
        noised_latents,
        timesteps,
        encoder_hidden_states=conditioning.prompt_embeds,
        added_cond_kwargs=added,
        return_dict=False,
    )
    return model_output
