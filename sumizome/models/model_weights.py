"""A model's weights without the model: their digest, and filling networks that are cut over processes.

One tensor at a time goes through main memory, out of the mapped file, so that no process ever holds a network whole.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sumizome.models.diffusers_folder import DiffusersFolder, open_folder
from sumizome.models.key_map import native_name
from sumizome.models.networks import build_network, fill_network
from sumizome.models.single_file import SingleFile, open_single_file
from sumizome.models.vae import tensors_digest

__all__ = ["fill_shards", "stored_digest"]


def fill_shards(
    path: Path,
    networks: Mapping[str, nn.Module],
    device: torch.device,
    put: Callable[[Tensor, Tensor], None],
) -> None:
    """Gives networks on the meta device, by their diffusers names, memory on `device` and the weights of `path`.

    `put(parameter, tensor)` copies what belongs there of a whole tensor.
    Raises: ModelError as `sdxl.load_model` does.
    """

    def put_named(network: nn.Module, name: str, tensor: Tensor) -> None:
        put(network.get_parameter(name).detach(), tensor)

    source = _open(path)
    for name, network in networks.items():
        network.to_empty(device=device)
        # Names and shapes are asked of a network that nobody has cut up.
        tensors = source.tensors(name, build_network(name, source.config(name), device="meta"))
        fill_network(network, tensors, f"{path}: {name}", torch.float32, device, put_named)


def stored_digest(path: Path, *names: str) -> str:
    """What `vae.model_digest` says of the model's network at `path`, in float32; of several, as a list of them."""
    source = _open(path)
    keys = {
        native_name(f"{number}.{key}" if len(names) > 1 else key): (name, native_name(key))
        for number, name in enumerate(names)
        for key in build_network(name, source.config(name), device="meta").state_dict()
    }
    readers = {name: _reader(source, name, [native for of, native in keys.values() if of == name]) for name in names}

    def stored() -> Iterator[tuple[str, Tensor]]:
        for key, (name, native) in sorted(keys.items()):
            yield key, readers[name](native).float()

    return tensors_digest(stored())


def _open(path: Path) -> DiffusersFolder | SingleFile:
    return open_folder(path) if path.is_dir() else open_single_file(path)


def _reader(source: DiffusersFolder | SingleFile, name: str, natives: list[str]) -> Callable[[str], Tensor]:
    return source.reader(name) if isinstance(source, DiffusersFolder) else source.reader(name, natives)
