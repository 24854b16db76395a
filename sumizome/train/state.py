"""The training state of a run as named tensors, and back: weights, average and moments, whole or cut over ranks.

State that has a parameter's shape is cut as the parameter is; any other is held whole by every rank.
"""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sumizome.errors import CheckpointError
from sumizome.train.checkpoint import SavedCheckpoint
from sumizome.train.ema import Ema
from sumizome.train.fused_backward import FusedBackward

__all__ = ["optimizer_tensors", "restore"]

Optimizer: TypeAlias = torch.optim.Optimizer | FusedBackward


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state by `{parameter}/{moment}`; parameters that have none yet are left out."""
    return dict(_moments(optimizer, parameters))


def _moments(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{moment}", value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)


def restore(
    saved: SavedCheckpoint,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    ema: Ema,
) -> None:
    """Puts a checkpoint's tensors in the place of the present ones, on whatever number of ranks it was written.

    Raises: CheckpointError if it holds other parameters than are trained now.
    """
    if set(saved.shapes("weights")) != set(parameters):
        raise CheckpointError(f"{saved.path}: it holds other parameters than are trained now")
    saved.read_into("weights", {name: parameter.detach() for name, parameter in parameters.items()})
    saved.read_into("ema", ema.average)
    moments = _empty_moments(saved, parameters, optimizer)
    if moments:
        saved.read_into("optimizer", moments)
    for key, value in moments.items():
        name, moment = key.rsplit("/", 1)
        # Some optimizers count steps in a Python number, which a file holds as one of int64.
        counts = value.dtype == torch.int64 and value.ndim == 0
        optimizer.state[parameters[name]][moment] = int(value) if counts else value


def _empty_moments(
    saved: SavedCheckpoint, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, Tensor]:
    """Memory for the optimizer's state, beside its parameters; counts of steps where it looks for them."""
    # A fused optimizer counts on the parameters' device; others read their counts, each a wait for a GPU were it there.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    moments = {}
    for key, (shape, dtype) in saved.shapes("optimizer").items():
        parameter = parameters.get(key.rsplit("/", 1)[0])
        if parameter is None:
            raise CheckpointError(f"{saved.path / 'optimizer'}: {key} belongs to no parameter that is trained now")
        if shape == parameter.shape:
            moments[key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            device = parameter.device if fused or shape else torch.device("cpu")
            moments[key] = torch.empty(shape, dtype=dtype, device=device)
    return moments
