"""A network on disk as a stream of tensors: its rules, and how to read the native tensors of each, one at a time.

Owns opening a network wherever it may stand: in an original file, whole or alone, in a diffusers folder, or a VAE in
either naming. Nothing is held but headers; `mending` and `merging` write what they read here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sumizome.errors import ExportError, ModelError
from sumizome.models.architecture import Config
from sumizome.models.expected import expected_original, expected_shapes
from sumizome.models.folder_files import read_json, weight_files, weights_path
from sumizome.models.infer_config import file_config
from sumizome.models.key_map import NETWORK_PREFIXES, KeyRule, from_original, key_rules, native_name
from sumizome.models.stored_names import layout_names
from sumizome.models.tensor_file import TensorFile, open_tensor_file
from sumizome.models.tensor_header import read_header
from sumizome.models.tensor_writer import FORMAT_DTYPES
from sumizome.models.unseen_settings import stated_settings

__all__ = ["Network", "network_from_file", "network_from_folder", "open_vae"]


@dataclass(frozen=True)
class Network:
    """One network of the source: its rules, and how to read the native tensors of a rule."""

    name: str
    config: Config
    rules: list[KeyRule]
    shapes: Mapping[str, tuple[int, ...]]
    """By native name, without the network's."""
    dtype: Callable[[KeyRule], torch.dtype]
    read: Callable[[KeyRule], dict[str, Tensor]]


def network_from_file(name: str, path: Path, strip: str = "") -> Network:
    """From the original layout. `strip`: the part of the layout's names that this file leaves out."""
    prefix = NETWORK_PREFIXES[name]
    header, file = read_header(path), open_tensor_file(path)
    names = {key: stored for key, stored in layout_names(header.tensors, strip).items() if key.startswith(prefix)}
    shapes = {key: header.tensors[stored].shape for key, stored in names.items()}
    config = file_config(name, shapes)
    try:
        config |= stated_settings(header.metadata).get(name, {})
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    lost = set(expected_original(name, config)) - set(shapes)
    if lost:
        raise ModelError(f"{path}: {name} lacks {len(lost)} tensors, {min(lost)} for one. Use another copy.")
    native = expected_shapes(name, config)

    def dtype(rule: KeyRule) -> torch.dtype:
        return _float_dtype(path, header.tensors[names[rule.original]].dtype)

    def read(rule: KeyRule) -> dict[str, Tensor]:
        return from_original(rule, _read(file, names[rule.original]))

    return Network(name, config, key_rules(name, native), native, dtype, read)


def network_from_folder(name: str, folder: Path) -> Network:
    config = read_json(folder / "config.json", f"SDXL's {name} belongs there")
    return _from_native(name, weight_files(weights_path(folder.parent, folder.name)), config)


def _from_native(name: str, paths: list[Path], config: Config) -> Network:
    places = {}
    for path in paths:
        header, file = read_header(path), open_tensor_file(path)
        for key, entry in header.tensors.items():
            places[native_name(key)] = (file, key, entry.dtype)
    native = expected_shapes(name, config)
    lost = set(native) - set(places)
    if lost:
        raise ModelError(f"{paths[0].parent}: {name} lacks {len(lost)} tensors, {min(lost)} for one. Use another copy.")

    def parts(rule: KeyRule) -> list[tuple[str, tuple[TensorFile, str, str]]]:
        return [(key, places[key.split(".", 1)[1]]) for key in rule.native]

    def dtype(rule: KeyRule) -> torch.dtype:
        found = [_float_dtype(file.path, stored) for _, (file, _, stored) in parts(rule)]
        return found[0] if len(set(found)) == 1 else torch.float32

    def read(rule: KeyRule) -> dict[str, Tensor]:
        together = dtype(rule)
        return {
            native: _read(file, key).reshape(expected_shapes_of[native.split(".", 1)[1]]).to(together)
            for native, (file, key, _) in parts(rule)
        }

    expected_shapes_of = native
    return Network(name, config, key_rules(name, native), native, dtype, read)


def open_vae(path: Path) -> Network:
    """The VAE of a model (file or folder), of a diffusers VAE folder, or of a file that holds a VAE alone.

    Raises: ModelError if there is none, or its latents are scaled otherwise than SDXL's.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} holds no diffusers VAE: there is no config.json. Give a VAE or a whole model.")
        return network_from_folder("vae", folder)
    names = read_header(path).tensors
    if any(name.startswith(NETWORK_PREFIXES["vae"]) for name in names):
        return network_from_file("vae", path)
    if any(name.startswith("encoder.down_blocks.") for name in names):
        return _from_native("vae", [path], _config_of_native_vae(path))
    if "encoder.conv_in.weight" in names:
        return network_from_file("vae", path, strip=NETWORK_PREFIXES["vae"])
    raise ModelError(f"{path} holds no VAE. Give a file with first_stage_model.* or encoder.* and decoder.* tensors.")


def _config_of_native_vae(path: Path) -> Config:
    shapes = {native_name(key): entry.shape for key, entry in read_header(path).tensors.items()}
    try:
        rules = key_rules("vae", shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{path}: its VAE has tensors that SDXL's does not ({error}).") from error
    return file_config("vae", {rule.original: shapes[rule.native[0].split(".", 1)[1]] for rule in rules})


def _read(file: TensorFile, name: str) -> Tensor:
    try:
        return file.read(name)
    except ModelError as error:
        raise ExportError(f"{error}") from error


def _float_dtype(path: Path, stored: str) -> torch.dtype:
    if stored not in FORMAT_DTYPES:
        raise ModelError(f"{path}: weights of dtype {stored} are quantised in a way that is not known here.")
    return FORMAT_DTYPES[stored]
