"""What single files call the original layout's tensors, and which of theirs belong to no network. No torch.

Owns the ways in which names differ from the layout's, and what programs leave beside the networks. The loader,
`inspect`, `mend` and `merge` all look here, so that none takes for a weight what another leaves out.
"""

import re
from collections.abc import Collection, Iterable

from sumizome.models.key_map import NETWORK_PREFIXES

__all__ = ["HARMLESS", "layout_names", "short_clip_names", "unet_prefix_left_out"]

HARMLESS = re.compile(
    r"v_pred|ztsnr|edm_mean|edm_std|edm_vpred\.sigma_max|alphas_cumprod\w*|betas|log_one_minus_\w+|posterior_\w+|sqrt_\w+|model_ema\..*|denoiser\.sigmas"
    r"|(.*\.)?(position_ids|logit_scale|attn_mask)|conditioner\.embedders\.0\..*text_projection(\.weight)?"
)
"""Tensors beside the networks that programs write and none of them needs, and the marks."""


def layout_names(names: Iterable[str], strip: str = "") -> dict[str, str]:
    """The layout's name of each of a file's `names` → that name, without what is `HARMLESS`.

    `strip`: the part of the layout's names that this file leaves out, in front.
    """
    own = {strip + name: name for name in names if not HARMLESS.fullmatch(name)}
    short = short_clip_names(own)
    return {_CLIP + name.removeprefix(_SHORT_CLIP) if name in short else name: own[name] for name in own}


_CLIP = NETWORK_PREFIXES["text_encoder"]
_SHORT_CLIP = _CLIP.removesuffix("text_model.")


def short_clip_names(names: Collection[str]) -> set[str]:
    """Those of the first text encoder that lack "text_model.", as transformers 5 names them; the layout has it."""
    parts = tuple(_SHORT_CLIP + part for part in ("embeddings.", "encoder.", "final_layer_norm."))
    own = {name for name in names if not HARMLESS.fullmatch(name)}
    whole = any(name.startswith(_CLIP) for name in own)
    return set() if whole else {name for name in own if name.startswith(parts)}


def unet_prefix_left_out(names: Collection[str]) -> str:
    """The U-Net's prefix if the file's names lack it, as those of a U-Net alone often do; else nothing."""
    prefix = NETWORK_PREFIXES["unet"]
    whole = any(name.startswith(prefix) for name in names)
    return prefix if "input_blocks.0.0.weight" in names and not whole else ""
