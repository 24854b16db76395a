"""A model as one safetensors file in SDXL's original layout: what is read from one.

Owns opening one, whole or the U-Net alone, and handing out its tensors by native names. Names and tensor layouts are
`key_map`'s, configurations `infer_config`'s, what the file says of itself `prediction_marks`', the commit `export`'s.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sumizome.errors import ModelError
from sumizome.models.architecture import Config
from sumizome.models.file_kinds import other_kind
from sumizome.models.infer_config import infer_configs
from sumizome.models.key_map import NETWORK_PREFIXES, KeyRule, from_original, key_rules, to_original
from sumizome.models.prediction_marks import prediction_of, sidecar_of
from sumizome.models.stored_names import layout_names, unet_prefix_left_out
from sumizome.models.unseen_settings import stated_settings

if TYPE_CHECKING:  # names and shapes are read without torch, whose import takes seconds
    from torch import Tensor, nn

    from sumizome.diffusion.prediction import PredictionType
    from sumizome.diffusion.schedule import ScheduleConfig
    from sumizome.models.tensor_file import TensorFile

__all__ = ["SingleFile", "open_single_file"]


@dataclass(frozen=True)
class SingleFile:
    """An opened file: a source of configurations and tensors for `sdxl.load_model`."""

    path: Path
    file: "TensorFile"
    configs: Mapping[str, Config]
    names: Mapping[str, str]
    """The layout's name of each of the networks' tensors → the file's own."""

    def config(self, name: str) -> Config:
        """The network's configuration. Raises: ModelError if the file does not hold that network."""
        if name not in self.configs:
            held = ", ".join(self.configs) or "none of SDXL's networks"
            raise ModelError(
                f"{self.path} has no {name} (no {NETWORK_PREFIXES[name]}* tensors), only {held}. Use the full "
                "checkpoint, or a diffusers folder that holds every network."
            )
        return self.configs[name]

    def tensors(self, name: str, network: "nn.Module") -> "Iterator[tuple[str, Tensor]]":
        """The network's tensors by native names, one at a time; foreign ones come last, under their own names."""
        from sumizome.models.networks import native_state

        prefix = NETWORK_PREFIXES[name]
        state = {f"{name}.{key}": tensor for key, tensor in native_state(network).items()}
        remaining = {key for key in self.names if key.startswith(prefix)}
        for rule in key_rules(name, native_state(network)):
            if rule.original in remaining:
                remaining.remove(rule.original)
                self._check_shape(rule, tuple(to_original(rule, state).shape))
                for native, tensor in from_original(rule, self._stored(rule.original)).items():
                    yield native.removeprefix(f"{name}."), tensor
        for key in sorted(remaining):
            yield key.removeprefix(prefix), self._stored(key)

    def reader(self, name: str, native_names: Iterable[str]) -> "Callable[[str], Tensor]":
        """A function from a native name to the network's tensor, read when asked for."""
        rules = {native: rule for rule in key_rules(name, native_names) for native in rule.native}

        def read(native: str) -> "Tensor":
            rule = rules[f"{name}.{native}"]
            return from_original(rule, self._stored(rule.original))[f"{name}.{native}"]

        return read

    def _stored(self, original: str) -> "Tensor":
        return self.file.read(self.names[original])

    def _check_shape(self, rule: KeyRule, expected: tuple[int, ...]) -> None:
        found = self.file.shapes[self.names[rule.original]]
        # Old VAE files hold linear layers where the layout has 1×1 convolutions.
        if found != expected and not (rule.layout == "pointwise" and found == expected[:2]):
            raise ModelError(
                f"{self.path}: {rule.original} has shape {found}, expected {expected}. "
                "It is no SDXL model, or one whose architecture was changed."
            )

    def prediction(self) -> "tuple[PredictionType, ScheduleConfig]":
        """What the file's marks and metadata say, or the .yaml beside it."""
        from sumizome.diffusion.schedule import ScheduleConfig

        stated, zero_terminal_snr = prediction_of(self.file.shapes, self.file.metadata, sidecar_of(self.path)[1])
        return stated, ScheduleConfig(zero_terminal_snr=zero_terminal_snr)


def open_single_file(path: Path) -> SingleFile:
    """The file at `path`. Raises: ModelError if it is damaged or pickled, or a model of another kind."""
    from sumizome.models.tensor_file import open_tensor_file

    file = open_tensor_file(path)
    kind = other_kind(file.shapes)
    if kind is not None:
        raise ModelError(f"{path} holds no SDXL that can be loaded: {kind}.")
    try:
        prediction_of(file.shapes, file.metadata)
        names = layout_names(file.shapes, unet_prefix_left_out(file.shapes))
        configs = infer_configs({layout: file.shapes[stored] for layout, stored in names.items()})
        stated = stated_settings(file.metadata)
        configs = {name: config | stated.get(name, {}) for name, config in configs.items()}
        return SingleFile(path, file, configs, names)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
