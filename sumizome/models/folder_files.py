"""The files of a diffusers folder: where a network's weights stand, in one piece, in shards or as a variant. No torch.

Owns the folder's layout for all that read or write one. Names that a folder's own files give are checked before they
are followed: none leads out of its folder.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from sumizome.errors import ModelError
from sumizome.models.tensor_header import refuse_pickle

__all__ = ["read_index", "read_json", "weight_files", "weights_path"]


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's model_index.json. Raises: ModelError if it is no folder of an SDXL pipeline."""
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder.resolve()} holds no model: model_index.json is missing, which a diffusers folder has. Give that "
            "folder, or a .safetensors file."
        )
    index = read_json(folder / "model_index.json", "a diffusers model folder has one")
    kind = str(index.get("_class_name"))
    if not kind.startswith("StableDiffusionXL"):
        raise ModelError(f"{folder} holds a {kind[:60]!r}, expected a StableDiffusionXLPipeline.")
    return index


def weights_path(folder: Path, name: str) -> Path:
    """Where a network's full-precision weights stand in a folder."""
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    return folder / name / f"{stem}.safetensors"


def weight_files(whole: Path) -> list[Path]:
    """The safetensors files of a network: the full-precision one, else its shards, else a variant such as fp16.

    Raises: ModelError if there are none, or shards are missing.
    """
    if whole.exists():
        return [whole]
    folder, stem = whole.parent, whole.stem
    for index in [folder / f"{stem}.safetensors.index.json", *sorted(folder.glob(f"{stem}.*index*.json"))]:
        if index.exists():
            return _shards(index)
    for variant in [folder / f"{stem}.fp16.safetensors", *sorted(folder.glob(f"{stem}.*.safetensors"))]:
        if variant.exists():
            return [variant]
    for pickled in folder.glob("*pytorch_model*.bin"):
        refuse_pickle(pickled)
    raise ModelError(f"{whole} is missing, and there are no shards or fp16 variant of it. Copy the folder again.")


def _shards(index: Path) -> list[Path]:
    names = read_json(index, "the weights are in shards").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files. Copy the folder again.")
    files = []
    for name in sorted(set(names.values())):
        if name != PurePosixPath(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}, which is no safetensors file in its own folder.")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name} is missing, a shard that {index.name} names. Copy it again.")
        files.append(index.parent / name)
    return files


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object of a folder; `why` says what it is needed for. Raises: ModelError if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {why}. Check the path, or copy the folder again.") from None
    except RecursionError:
        raise ModelError(f"{path} is nested deeper than any configuration. Copy it again.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}). Copy it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object. Copy it again.")
    return found
