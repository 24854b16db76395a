"""The tensors that each of SDXL's networks has, from its configuration alone: names and shapes, no modules, no torch.

Owns the tables against which a file's header is checked. Names are native (diffusers' and transformers', without
"text_model."); `expected_original` gives the same tensors as the original layout stores them, by `key_map`'s rules.
"""

from collections.abc import Iterator
from typing import Any

from sumizome.errors import ModelError
from sumizome.models.architecture import Config
from sumizome.models.key_map import KeyRule, key_rules

__all__ = ["check_counts", "check_time_features", "expected_original", "expected_shapes"]

Shape = tuple[int, ...]
_Named = Iterator[tuple[str, Shape]]


def expected_shapes(network: str, config: Config) -> dict[str, Shape]:
    """Every tensor of `network` (unet, vae, text_encoder, text_encoder_2) by its native name.

    Raises: ModelError for a configuration of another architecture, or of a network that nobody could build.
    """
    check_counts(network, config)
    try:
        shapes = dict(_named(network, config))
        for name, shape in shapes.items():
            if not all(type(side) is int and 0 < side <= _WIDEST for side in shape):
                raise ValueError(f"{name} would have no shape")
        return shapes
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"the configuration of {network} is not one of SDXL's architecture: {error!r}.") from error


_COUNTS = {"layers_per_block": 16, "transformer_layers_per_block": 64, "num_hidden_layers": 128}
"""At most; SDXL's largest are 2, 10 and 32."""
_LEVELS = 8
_WIDEST = 2**20


def check_counts(network: str, config: Config) -> None:
    """Raises: ModelError where a configuration asks for so many blocks that listing or building them does not end."""
    levels = config.get("block_out_channels")
    counts = [(key, number, most) for key, most in _COUNTS.items() for number in _numbers(config.get(key))]
    counts += [("block_out_channels", len(levels), _LEVELS)] if isinstance(levels, list | tuple) else []
    for key, number, most in counts:
        if not number <= most:
            raise ModelError(
                f"the configuration of {network} is not one of SDXL's architecture: {key} asks for "
                f"{str(number)[:20]}, at most {most} are known. Copy the model again."
            )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float):
        yield value


def check_time_features(unet: Config, pooled: int) -> None:
    """`pooled`: width of what the second text encoder projects to, which the U-Net sees beside six time ids.

    Raises: ModelError if the U-Net takes another number of features than these are.
    """
    features, taken = unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
    if taken != pooled + 6 * features:
        raise ModelError(
            f"the U-Net takes {taken} features beside the prompt, but the text encoder gives {pooled} and six time "
            f"ids of {features} (unet addition_time_embed_dim) {6 * features}: they do not belong together. Use "
            "another copy of the model."
        )


def expected_original(network: str, config: Config) -> dict[str, Shape]:
    """Every tensor of `network` in the original single-file layout, with its prefix."""
    native = expected_shapes(network, config)
    return {rule.original: _stored(rule, native[_own(rule)]) for rule in key_rules(network, native)}


def _named(network: str, config: Config) -> _Named:
    match network:
        case "unet":
            return _unet(config)
        case "vae":
            return _vae(config)
    return _clip(config, projects=network == "text_encoder_2")


def _own(rule: KeyRule) -> str:
    return rule.native[0].split(".", 1)[1]


def _stored(rule: KeyRule, shape: Shape) -> Shape:
    match rule.layout:
        case "fused":
            return (3 * shape[0], *shape[1:])
        case "transposed":
            return shape[::-1]
        case "pointwise":
            return (*shape, 1, 1)
    return shape


# --- layers ----------------------------------------------------------------------------------------------------------


def _linear(name: str, into: int, out: int, bias: bool = True) -> _Named:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _conv(name: str, into: int, out: int, side: int = 3) -> _Named:
    yield f"{name}.weight", (out, into, side, side)
    yield f"{name}.bias", (out,)


def _norm(name: str, channels: int) -> _Named:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _resnet(name: str, into: int, out: int, time: int | None = None) -> _Named:
    yield from _norm(f"{name}.norm1", into)
    yield from _conv(f"{name}.conv1", into, out)
    if time is not None:
        yield from _linear(f"{name}.time_emb_proj", time, out)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if into != out:
        yield from _conv(f"{name}.conv_shortcut", into, out, side=1)


# --- U-Net -----------------------------------------------------------------------------------------------------------


def _unet(config: Config) -> _Named:
    channels, layers, context = config["block_out_channels"], config["layers_per_block"], config["cross_attention_dim"]
    depths = config["transformer_layers_per_block"]
    depths = (depths,) * len(channels) if isinstance(depths, int) else depths
    down_types, up_types = config["down_block_types"], config["up_block_types"]
    if not all(type(number) is int for number in (layers, context, *channels, *depths)):
        raise ValueError("blocks with depths of their own, as in distilled models")
    projected = config["projection_class_embeddings_input_dim"]
    # Settings of a single file are nobody's: with no features left for the prompt, nothing could be drawn.
    if projected <= 6 * (config.get("addition_time_embed_dim") or 0):
        raise ValueError("six time ids of addition_time_embed_dim take more features than there are")
    levels = len(channels)
    first, last = channels[0], channels[-1]
    time = 4 * first

    yield from _conv("conv_in", config.get("in_channels", 4), first)
    for name, into in (("time_embedding", first), ("add_embedding", projected)):
        yield from _linear(f"{name}.linear_1", into, time)
        yield from _linear(f"{name}.linear_2", time, time)

    for level, out in enumerate(channels):
        block = f"down_blocks.{level}"
        attends = down_types[level].startswith("CrossAttn")
        for layer in range(layers):
            into = channels[max(level - 1, 0)] if layer == 0 else out
            yield from _resnet(f"{block}.resnets.{layer}", into, out, time)
            if attends:
                yield from _transformer(f"{block}.attentions.{layer}", out, context, depths[level])
        if level < levels - 1:
            yield from _conv(f"{block}.downsamplers.0.conv", out, out)

    for layer in (0, 1):
        yield from _resnet(f"mid_block.resnets.{layer}", last, last, time)
    yield from _transformer("mid_block.attentions.0", last, context, depths[-1])

    below = last
    for level, out in enumerate(reversed(channels)):
        block = f"up_blocks.{level}"
        attends = up_types[level].startswith("CrossAttn")
        finer = channels[max(levels - 2 - level, 0)]
        for layer in range(layers + 1):
            skip = finer if layer == layers else out
            yield from _resnet(f"{block}.resnets.{layer}", (below if layer == 0 else out) + skip, out, time)
            if attends:
                yield from _transformer(f"{block}.attentions.{layer}", out, context, depths[levels - 1 - level])
        if level < levels - 1:
            yield from _conv(f"{block}.upsamplers.0.conv", out, out)
        below = out

    yield from _norm("conv_norm_out", first)
    yield from _conv("conv_out", first, config.get("out_channels", 4))


def _transformer(name: str, channels: int, context: int, depth: int) -> _Named:
    yield from _norm(f"{name}.norm", channels)
    yield from _linear(f"{name}.proj_in", channels, channels)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", channels)
        for attention, source in (("attn1", channels), ("attn2", context)):
            yield from _linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
            yield from _linear(f"{block}.{attention}.to_k", source, channels, bias=False)
            yield from _linear(f"{block}.{attention}.to_v", source, channels, bias=False)
            yield from _linear(f"{block}.{attention}.to_out.0", channels, channels)
        yield from _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)  # twice the width: GEGLU's gate
        yield from _linear(f"{block}.ff.net.2", 4 * channels, channels)
    yield from _linear(f"{name}.proj_out", channels, channels)


# --- VAE -------------------------------------------------------------------------------------------------------------


def _vae(config: Config) -> _Named:
    channels, layers, latents = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    first, last, levels = channels[0], channels[-1], len(channels)

    yield from _conv("encoder.conv_in", config.get("in_channels", 3), first)
    for level, out in enumerate(channels):
        for layer in range(layers):
            into = channels[max(level - 1, 0)] if layer == 0 else out
            yield from _resnet(f"encoder.down_blocks.{level}.resnets.{layer}", into, out)
        if level < levels - 1:
            yield from _conv(f"encoder.down_blocks.{level}.downsamplers.0.conv", out, out)
    yield from _vae_middle("encoder.mid_block", last)
    yield from _norm("encoder.conv_norm_out", last)
    yield from _conv("encoder.conv_out", last, 2 * latents)

    yield from _conv("decoder.conv_in", latents, last)
    yield from _vae_middle("decoder.mid_block", last)
    below = last
    for level, out in enumerate(reversed(channels)):
        for layer in range(layers + 1):
            yield from _resnet(f"decoder.up_blocks.{level}.resnets.{layer}", below if layer == 0 else out, out)
        if level < levels - 1:
            yield from _conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", out, out)
        below = out
    yield from _norm("decoder.conv_norm_out", first)
    yield from _conv("decoder.conv_out", first, config.get("out_channels", 3))

    yield from _conv("quant_conv", 2 * latents, 2 * latents, side=1)
    yield from _conv("post_quant_conv", latents, latents, side=1)


def _vae_middle(name: str, channels: int) -> _Named:
    for layer in (0, 1):
        yield from _resnet(f"{name}.resnets.{layer}", channels, channels)
    yield from _norm(f"{name}.attentions.0.group_norm", channels)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{name}.attentions.0.{part}", channels, channels)


# --- text encoders ---------------------------------------------------------------------------------------------------


def _clip(config: Config, projects: bool) -> _Named:
    width, inner = config["hidden_size"], config["intermediate_size"]
    yield "embeddings.token_embedding.weight", (config["vocab_size"], width)
    yield "embeddings.position_embedding.weight", (config["max_position_embeddings"], width)
    for layer in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{block}.self_attn.{part}", width, width)
        yield from _norm(f"{block}.layer_norm1", width)
        yield from _norm(f"{block}.layer_norm2", width)
        yield from _linear(f"{block}.mlp.fc1", width, inner)
        yield from _linear(f"{block}.mlp.fc2", inner, width)
    yield from _norm("final_layer_norm", width)
    if projects:
        yield "text_projection.weight", (config["projection_dim"], width)
