"""SDXL's original layout and the names that diffusers and transformers use, as one table of rules.

Owns the correspondence of names and of tensor layouts, both ways, for any number of levels and layers. It reads no
files. A `KeyRule` joins one original tensor with the native tensors that it holds (three where OpenCLIP fuses q, k
and v). Native names are "network.name" with the folder names of diffusers (unet, vae, text_encoder, text_encoder_2);
`native_name` makes today's names of those that other versions of diffusers and transformers write.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # names are mapped without torch, whose import takes seconds
    from torch import Tensor

__all__ = ["NETWORK_PREFIXES", "KeyRule", "from_original", "key_rules", "native_name", "to_original"]

NETWORK_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
"""Where each network stands in an original file."""


_OLD_VAE_PARTS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What VAE folders of 2023 call the parts of their attention; no other network has such names."""


def native_name(name: str) -> str:
    """A tensor's name as diffusers and transformers 5 have it.

    transformers 4 puts "text_model." before a text encoder's names and 5 does not; VAEs of 2023 call their attention's
    parts otherwise. A text encoder may stand in a list, whose index comes first.
    """
    for old, new in _OLD_VAE_PARTS.items():
        name = name.replace(old, new)
    return re.sub(r"^(\d+\.)?text_model\.", r"\1", name)


@dataclass(frozen=True)
class KeyRule:
    """One tensor of the original layout and the native tensors that it holds.

    layout: same; transposed (OpenCLIP's projection multiplies from the other side); fused (q, k, v stacked along the
    rows); pointwise (a 1×1 convolution where diffusers has a linear layer).
    """

    original: str
    native: tuple[str, ...]
    layout: Literal["same", "transposed", "fused", "pointwise"] = "same"


def to_original(rule: KeyRule, native: "Mapping[str, Tensor]") -> "Tensor":
    """The original file's tensor, contiguous."""
    import torch

    tensors = [native[name] for name in rule.native]
    match rule.layout:
        case "fused":
            return torch.cat(tensors)
        case "transposed":
            return tensors[0].T.contiguous()
        case "pointwise":
            return tensors[0][:, :, None, None].contiguous()
    return tensors[0].contiguous()


def from_original(rule: KeyRule, tensor: "Tensor") -> "dict[str, Tensor]":
    """The native tensors in an original file's tensor; the inverse of `to_original`."""
    match rule.layout:
        case "fused":
            return dict(zip(rule.native, tensor.chunk(3), strict=True))
        case "transposed":
            return {rule.native[0]: tensor.T}
        case "pointwise":
            # Old VAE files hold linear layers here already.
            return {rule.native[0]: tensor.reshape(tensor.shape[:2])}
    return {rule.native[0]: tensor}


def key_rules(network: str, native_keys: Iterable[str]) -> list[KeyRule]:
    """The rules of one network's state: every native key (without "network.") is in exactly one rule."""
    prefix = NETWORK_PREFIXES[network]
    rules = {}
    for original, native, layout in _RULES[network](list(native_keys)):
        rules[original] = KeyRule(prefix + original, tuple(f"{network}.{name}" for name in native), layout)
    return list(rules.values())


_Named = Iterable[tuple[str, tuple[str, ...], Literal["same", "transposed", "fused", "pointwise"]]]


# --- U-Net -----------------------------------------------------------------------------------------------------------

_UNET_STEMS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_rules(keys: list[str]) -> _Named:
    layers = 1 + max(int(key.split(".")[3]) for key in keys if key.startswith("down_blocks.0.resnets."))
    attending = {key.split(".")[1] for key in keys if re.match(r"up_blocks\.\d+\.attentions\.", key)}
    return ((_unet_name(key, layers, attending), (key,), "same") for key in keys)


def _unet_name(key: str, layers: int, attending: set[str]) -> str:
    """The original name. Input blocks are numbered through: conv_in, then `layers` and a downsampling a level."""
    match key.split("."):
        case ["down_blocks", level, "downsamplers", "0", "conv", leaf]:
            return f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op.{leaf}"
        case ["down_blocks", level, kind, layer, *inner]:
            block = 1 + int(level) * (layers + 1) + int(layer)
            return f"input_blocks.{block}.{_unet_inner(kind, inner)}"
        case ["mid_block", "resnets", layer, *inner]:
            return f"middle_block.{2 * int(layer)}.{_unet_inner('resnets', inner).removeprefix('0.')}"
        case ["mid_block", "attentions", "0", *inner]:
            return f"middle_block.1.{'.'.join(inner)}"
        case ["up_blocks", level, "upsamplers", "0", "conv", leaf]:
            block = int(level) * (layers + 1) + layers
            return f"output_blocks.{block}.{2 if level in attending else 1}.conv.{leaf}"
        case ["up_blocks", level, kind, layer, *inner]:
            block = int(level) * (layers + 1) + int(layer)
            return f"output_blocks.{block}.{_unet_inner(kind, inner)}"
    stem, leaf = key.rsplit(".", 1)
    return f"{_UNET_STEMS[stem]}.{leaf}"


def _unet_inner(kind: str, inner: list[str]) -> str:
    if kind == "attentions":
        return ".".join(["1", *inner])
    return ".".join(["0", _UNET_RESNET[inner[0]], *inner[1:]])


# --- VAE -------------------------------------------------------------------------------------------------------------

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}


def _vae_rules(keys: list[str]) -> _Named:
    levels = 1 + max(int(key.split(".")[2]) for key in keys if key.startswith("decoder.up_blocks."))
    for key in keys:
        projects = ".attentions." in key and ".group_norm." not in key and key.endswith(".weight")
        yield _vae_name(key, levels), (key,), "pointwise" if projects else "same"


def _vae_name(key: str, levels: int) -> str:
    """The original name. The original decoder numbers its levels from the finest, diffusers from the coarsest."""
    match key.split("."):
        case [half, "down_blocks" | "up_blocks" as blocks, level, kind, layer, *inner]:
            way = blocks.removesuffix("_blocks")
            number = int(level) if way == "down" else levels - 1 - int(level)
            if kind == "resnets":
                return f"{half}.{way}.{number}.block.{layer}.{_vae_inner(inner)}"
            return f"{half}.{way}.{number}.{way}sample.{'.'.join(inner)}"
        case [half, "mid_block", "resnets", layer, *inner]:
            return f"{half}.mid.block_{int(layer) + 1}.{_vae_inner(inner)}"
        case [half, "mid_block", "attentions", "0", part, *inner]:
            return f"{half}.mid.attn_1.{_VAE_ATTENTION[part]}.{inner[-1]}"
    return key.replace(".conv_norm_out.", ".norm_out.")


def _vae_inner(inner: list[str]) -> str:
    return ".".join(inner).replace("conv_shortcut.", "nin_shortcut.")


# --- text encoders ---------------------------------------------------------------------------------------------------

_OPENCLIP_STEMS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _same_rules(keys: list[str]) -> _Named:
    return ((key, (key,), "same") for key in keys)


def _openclip_rules(keys: list[str]) -> _Named:
    for key in keys:
        if key == "text_projection.weight":
            yield "text_projection", (key,), "transposed"
        elif key in _OPENCLIP_STEMS:
            yield _OPENCLIP_STEMS[key], (key,), "same"
        else:
            _, _, layer, inner = key.split(".", 3)
            part, leaf = inner.rsplit(".", 1)
            block = f"transformer.resblocks.{layer}"
            if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                fused = tuple(f"encoder.layers.{layer}.self_attn.{name}_proj.{leaf}" for name in "qkv")
                yield f"{block}.attn.in_proj_{leaf}", fused, "fused"
            else:
                yield f"{block}.{_OPENCLIP_LAYER[part]}.{leaf}", (key,), "same"


_RULES: dict[str, Callable[[list[str]], _Named]] = {
    "unet": _unet_rules,
    "vae": _vae_rules,
    "text_encoder": _same_rules,
    "text_encoder_2": _openclip_rules,
}
