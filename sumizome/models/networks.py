"""One network at a time: built from its configuration, and filled tensor by tensor.

Owns the names under which the rest of the package knows a network's tensors, whatever the version of transformers. A
network that is loaded is built on the meta device, without memory, so that loading takes its own size and one tensor.
"""

import re
from collections.abc import Callable, Iterable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sumizome.errors import ModelError
from sumizome.models.architecture import Config
from sumizome.models.key_map import native_name

__all__ = ["build_network", "building_blocks", "fill_network", "native_state"]


def build_network(name: str, config: Config, device: torch.device | str = "cpu") -> nn.Module:
    """One network by its diffusers name, randomly initialised (or without memory on the meta device).

    Raises: ModelError if diffusers or transformers do not accept the configuration.
    """
    try:
        with torch.device(device):
            network: nn.Module
            match name:
                case "unet":
                    network = UNet2DConditionModel.from_config(config)
                case "vae":
                    network = AutoencoderKL.from_config(config)
                case "text_encoder":
                    network = CLIPTextModel(CLIPTextConfig.from_dict(config))
                case _:
                    network = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
            return network
    except Exception as error:  # the libraries raise what they like, transformers 5 classes of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the configuration of {name} is not one of SDXL's architecture: {reason}.") from error


_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")


def building_blocks(network: nn.Module) -> list[nn.Module]:
    """The network's repeated parts, in the order of its modules: nearly all of its parameters and activations."""
    return [module for module in network.modules() if type(module).__name__ in _BLOCKS]


def native_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's tensors by their native names."""
    return {native_name(name): tensor for name, tensor in network.state_dict().items()}


_IGNORED = re.compile(r"(.*\.)?(position_ids|logit_scale|attn_mask)|text_projection(\.weight)?")
"""Tensors that some programs write and the networks do not have: they carry no trained weight that SDXL uses."""


def fill_network(
    network: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    source: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    put: Callable[[nn.Module, str, Tensor], None] | None = None,
) -> None:
    """Gives a network on the meta device its tensors by native names, in `dtype`. `source` says where they are from.

    `put(network, name, tensor)` takes each whole tensor, as it is stored, in place of that: for networks cut up.

    Raises: ModelError naming tensors that are missing, foreign or of another shape.
    """
    places = {native_name(key): key for key in network.state_dict()}
    shapes = {key: tuple(tensor.shape) for key, tensor in native_state(network).items()}
    foreign = []
    for key, tensor in tensors:
        place = places.pop(key, None)
        if place is None:
            foreign += [] if _IGNORED.fullmatch(key) else [key]
        elif tuple(tensor.shape) != shapes[key]:
            raise ModelError(
                f"{source}: {key} has shape {tuple(tensor.shape)}, expected {shapes[key]}. "
                "It is no SDXL model, or one whose architecture was changed."
            )
        elif not tensor.is_floating_point():
            raise ModelError(
                f"{source}: {key} holds whole numbers ({tensor.dtype}), expected weights. Use another copy."
            )
        elif put is not None:
            put(network, place, tensor)
        else:
            # A copy always: the tensor may map the file, which somebody may write to while the model trains.
            _assign(network, place, tensor.to(device, dtype, copy=True).contiguous())
    if places or foreign:
        problem = f"lacks {_some(places)}" if places else f"has tensors that SDXL does not: {_some(foreign)}"
        raise ModelError(f"{source} {problem}. Use a complete SDXL model.")
    _fill_positions(network, device)


def _assign(network: nn.Module, place: str, tensor: Tensor) -> None:
    owner, _, leaf = place.rpartition(".")
    module = network.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor)
    else:
        module._buffers[leaf] = tensor


def _fill_positions(network: nn.Module, device: torch.device | str) -> None:
    """CLIP counts its positions in a buffer that no file needs to hold."""
    for module in network.modules():
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, Tensor):
            module.position_ids = torch.arange(positions.shape[-1], device=device)[None]


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
