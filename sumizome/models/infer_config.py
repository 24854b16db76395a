"""A network's configuration, read from the shapes of its tensors in the original layout. No torch.

Owns the inference and its limits: what a hostile file may not ask for, and what is assumed where shapes say nothing.
Numbers that shapes do not show follow `architecture`'s rules.
"""

import re
from collections.abc import Callable, Mapping

from sumizome.errors import ModelError
from sumizome.models.architecture import Config, clip_config, time_id_dim, unet_config, vae_config
from sumizome.models.expected import expected_original
from sumizome.models.key_map import NETWORK_PREFIXES

__all__ = ["LATENT_CHANNELS", "Shapes", "file_config", "infer_configs"]

Shapes = Mapping[str, tuple[int, ...]]


def infer_configs(shapes: Shapes) -> dict[str, Config]:
    """The configuration of each network that the file has, read from its tensors' shapes.

    Numbers that shapes do not show follow `architecture`'s rules. That every tensor fits is checked when they
    are loaded.

    Raises: ModelError if the tensors of a network are not those of its architecture.
    """
    configs = {}
    for network, prefix in NETWORK_PREFIXES.items():
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        if not own:
            continue
        try:
            configs[network] = _INFER[network](own)
        except KeyError as error:
            raise ModelError(f"the tensors under {prefix}* are not SDXL's {network}: {error} is missing.") from error
        except (IndexError, ValueError) as error:
            raise ModelError(f"the tensors under {prefix}* are not SDXL's {network}: {error}.") from error
    return configs


def _infer_unet(shapes: Shapes) -> Config:
    blocks = range(_count(shapes, r"input_blocks\.(\d+)\."))
    downsamplings = [block for block in blocks if f"input_blocks.{block}.0.op.weight" in shapes]
    if not downsamplings:
        raise ValueError("its blocks have no downsampling between them")
    layers = min(downsamplings) - 1
    starts = [1 + level * (layers + 1) for level in range(len(downsamplings) + 1)]
    channels = tuple(shapes[f"input_blocks.{start}.0.out_layers.3.weight"][0] for start in starts)
    depths = tuple(_count(shapes, rf"input_blocks\.{start}\.1\.transformer_blocks\.(\d+)\.") for start in starts)
    features = time_id_dim(max(channels))
    seen = shapes["input_blocks.0.0.weight"][1]
    config = unet_config(
        block_out_channels=channels,
        transformer_layers=depths,
        layers_per_block=layers,
        cross_attention_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        pooled_dim=shapes["label_emb.0.0.weight"][1] - 6 * features,
    )
    return config | {"in_channels": seen if seen in _INPUT_CHANNELS else LATENT_CHANNELS}


LATENT_CHANNELS = 4
_INPUT_CHANNELS = (LATENT_CHANNELS, 9)
"""What SDXL's U-Nets take: the noised latents; those, a mask and the latents of what is kept, for inpainting."""


def _infer_vae(shapes: Shapes) -> Config:
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    return vae_config(
        block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)),
        layers_per_block=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=shapes["post_quant_conv.weight"][0],
    )


def _infer_clip(shapes: Shapes) -> Config:
    return clip_config(
        width=shapes["final_layer_norm.weight"][0],
        layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
        intermediate=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=shapes["final_layer_norm.weight"][0],
    )


def _infer_openclip(shapes: Shapes) -> Config:
    return clip_config(
        width=shapes["ln_final.weight"][0],
        layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        intermediate=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation="gelu",
        projection_dim=shapes["text_projection"][1],
    )


_INFER: dict[str, Callable[[Shapes], Config]] = {
    "unet": _infer_unet,
    "vae": _infer_vae,
    "text_encoder": _infer_clip,
    "text_encoder_2": _infer_openclip,
}


def _count(shapes: Shapes, pattern: str) -> int:
    """How many blocks there are; numbers with gaps would let a small file ask for a network of any size."""
    numbers = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"blocks {sorted(numbers)[:9]} are not numbered from 0 on")
    return len(numbers)


_FULL_SIZE = {
    "unet": unet_config(),
    "vae": vae_config(),
    "text_encoder": clip_config(),
    "text_encoder_2": clip_config(width=1280, layers=32, intermediate=5120, activation="gelu", projection_dim=1280),
}


def file_config(name: str, shapes: Shapes) -> Config:
    """One network's configuration: as its shapes in the original layout show it, or SDXL's where they show none.

    For checking a file that may be damaged: what SDXL has is then what it is held against.
    """
    try:
        config = infer_configs(shapes)[name]
        expected_original(name, config)
    except (ModelError, KeyError, StopIteration, TypeError, ValueError, IndexError):
        return _FULL_SIZE[name]
    return config
