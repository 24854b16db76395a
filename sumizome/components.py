"""A model's networks as their headers show them, held against SDXL's names, shapes and dtypes. No torch.

Owns what counts as missing, foreign or misshapen, and a sentence for each. `inspection` finds the networks.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sumizome.models.infer_config import Shapes
from sumizome.models.tensor_header import TensorEntry

__all__ = ["SCALES", "Component", "component_of", "component_problems", "dtypes_of", "names_problem"]

SCALES = re.compile(
    r"(.*\.)?(scale_weight|weight_scale(_\d|_inv)?|scale_input|input_scale|comfy_quant|absmax|quant_map|nested_\w+)"
    r"|.*\.quant_state\..*|scaled_fp8"
)
"""Tensors by which quantised weights have to be multiplied: a copy without them is another model."""


@dataclass(frozen=True)
class Component:
    """One network as it stands in the file."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    """Parameters by dtype, the most first."""
    missing: tuple[str, ...]
    foreign: tuple[str, ...]
    misshapen: tuple[str, ...]
    """Tensors whose shape is not the architecture's, with both shapes."""


def component_of(name: str, own: Mapping[str, TensorEntry], expected: Shapes) -> Component:
    """The network `name` with the tensors `own`, held against the `expected` ones."""
    misshapen = [
        f"{key} {_shape(own[key].shape)}, expected {_shape(shape)}"
        for key, shape in expected.items()
        if key in own and _squeezed(own[key].shape) != _squeezed(shape)
    ]
    return Component(
        name=name,
        tensors=len(own),
        parameters=sum(entry.elements for entry in own.values()),
        bytes=sum(entry.stop - entry.start for entry in own.values()),
        dtypes=dtypes_of(own.values()),
        missing=tuple(sorted(set(expected) - set(own))),
        foreign=tuple(sorted(set(own) - set(expected))),
        misshapen=tuple(misshapen),
    )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Old VAE files hold linear layers where others hold 1×1 convolutions."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def component_problems(component: Component) -> list[str]:
    """What is wrong with a network, a sentence each; some may be empty."""
    scales = [name for name in component.foreign if SCALES.fullmatch(name)]
    strange = {dtype: count for dtype, count in component.dtypes.items() if dtype not in _FLOATS}
    return [
        *(
            f"{component.name} has {count:,} weights of dtype {dtype}, where floating-point numbers belong: quantised "
            "in a way that is not known here, or damaged."
            for dtype, count in strange.items()
        ),
        names_problem(f"{component.name} has quantised weights, which are not read here, and their scales:", scales),
        names_problem(f"{component.name} lacks", component.missing),
        names_problem(f"{component.name} has tensors that SDXL does not:", sorted({*component.foreign} - {*scales})),
        names_problem(f"{component.name} has other shapes than SDXL:", component.misshapen),
    ]


def names_problem(what: str, names: Iterable[str]) -> str:
    """`what`, the first two names and how many more there are; empty if there are none."""
    names = list(names)
    more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
    return f"{what} {', '.join(names[:2])}{more}." if names else ""


def dtypes_of(entries: Iterable[TensorEntry]) -> dict[str, int]:
    """Parameters by dtype, the most first."""
    counted: Counter[str] = Counter()
    for entry in entries:
        if entry.elements:
            counted[entry.dtype] += entry.elements
    return dict(counted.most_common())
