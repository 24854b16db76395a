"""What a file is that is no whole SDXL model, told by the names of its tensors. No torch.

Owns those words, for the loader, which refuses such files, and for `inspect`, which describes them.
"""

import re
from collections.abc import Iterable

__all__ = ["other_kind"]

_KINDS: tuple[tuple[str, str], ...] = (
    (r"lora_(unet|te\d?)_|.*\.(lora_(A|B|up|down)|hada_w|lokr_w)", "LoRA, not a whole model"),
    (r"clip_[gl]$|emb_params$", "textual inversion (an embedding), not a model"),
    (r"control_model\.|controlnet_|input_hint_block\.", "ControlNet, not a model by itself"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3 model, not SDXL"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "Flux model, not SDXL"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2 checkpoint, not SDXL"),
    (r"cond_stage_model\.", "Stable Diffusion 1 checkpoint, not SDXL"),
    (r"conditioner\.embedders\.0\.model\.", "SDXL refiner, not the base model"),
    (r"(text_model\.)?encoder\.layers\.", "text encoder alone"),
    (r"down_blocks\.", "U-Net alone in diffusers' layout: one network of the diffusers folder with model_index.json"),
)


def other_kind(names: Iterable[str]) -> str | None:
    """In words, what a file with such tensors is; None for what may be an SDXL model, or is not known here."""
    names = tuple(names)
    for pattern, kind in _KINDS:
        if any(re.match(pattern, name) for name in names):
            return kind
    return None
