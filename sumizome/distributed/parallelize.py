"""Parallelism applied to networks from outside, in one order: activation checkpointing → compile → FSDP2 | DDP.

The networks know nothing of it: their classes, attributes and parameter names stay as they are, so what samples,
validates and saves a model takes no notice. The invariant: after a backward pass over all micro-batches of a step,
gradients are the mean over the ranks, and each rank's loss is the mean over its own share.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sumizome.distributed.runtime import Ranks
from sumizome.errors import ConfigError

__all__ = [
    "Parallel",
    "ParallelConfig",
    "Strategy",
    "apply_checkpointing",
    "local",
    "parallelize",
    "put_shard",
    "resolve_strategy",
    "whole",
]

T = TypeVar("T")
Strategy = Literal["none", "ddp", "fsdp", "hybrid"]


_GRAPHS = 64
"""Of one forward function. SDXL's residual blocks alone come in nine shapes of weights, and each is compiled for fixed
and for varying sizes, with gradients and without: beyond torch's limit of 8 the rest would run uncompiled."""


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes train one model; how many there are is torchrun's."""

    strategy: Literal["auto", "none", "ddp", "fsdp", "hybrid"] = "auto"
    """"ddp": each rank holds everything. "fsdp": weights, gradients, moments and average are cut over all ranks.
    "hybrid": cut within groups of `shard_size`, repeated across them. "auto": none for one process, else ddp."""
    shard_size: int = 0
    """Ranks that hold one copy between them under "hybrid"; 0 = those of one machine."""
    compile: bool = False
    """Compile the networks' blocks (torch.compile): minutes at the start, faster steps on a GPU."""
    hang_timeout: float = 600.0
    """Seconds without a sign of life after which a rank is named and the job ends."""

    def __post_init__(self) -> None:
        if self.shard_size < 0 or self.hang_timeout <= 0:
            raise ConfigError("parallel.shard_size cannot be negative, and parallel.hang_timeout must be above 0")


@dataclass
class Parallel:
    """How a forward and backward pass run over the ranks."""

    strategy: Strategy = "none"
    ddp: DistributedDataParallel | None = None
    sharded: Sequence[FSDPModule] = field(default_factory=tuple)

    @property
    def lockstep(self) -> bool:
        """Whether every forward pass is a collective, which all ranks must join equally often."""
        return bool(self.sharded)

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)`, which runs the networks; DDP watches what it returns for the backward pass."""
        return function(*arguments) if self.ddp is None else self.ddp(function, *arguments)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch: gradients cross ranks after the `last` one only.

        Under "hybrid" they are cut up within the group at once, which saves memory, and cross groups at the last.
        """
        for network in self.sharded:
            if self.strategy == "hybrid":
                network.set_requires_all_reduce(last)
            else:
                network.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync():
            yield


class _Together(nn.Module):
    """Networks as one module whose forward pass is whatever function it is called with: what DDP wraps."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(dict(networks))

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)


def resolve_strategy(config: ParallelConfig, ranks: Ranks) -> Strategy:
    """The strategy that a run uses.

    Raises: ConfigError for one that does not fit the number of ranks.
    """
    if config.strategy == "auto":
        return "none" if ranks.world == 1 else "ddp"
    if ranks.world > 1 and config.strategy == "none":
        raise ConfigError(
            f"parallel.strategy is none, but {ranks.world} processes were started; leave it at auto, "
            "or start one process without torchrun"
        )
    if config.strategy == "hybrid":
        size = config.shard_size or ranks.local_world
        if ranks.world % size:
            raise ConfigError(
                f"parallel.shard_size is {size}, which does not divide the {ranks.world} ranks; give one that does"
            )
    return "none" if ranks.world == 1 else config.strategy


def parallelize(
    trained: Mapping[str, nn.Module],
    blocks: Callable[[nn.Module], list[nn.Module]],
    ranks: Ranks,
    config: ParallelConfig,
    *,
    activation_checkpointing: bool = False,
) -> Parallel:
    """Changes the trained networks in place and returns how to run them. Parameters made before are stale after FSDP.

    Networks that are cut up may be on the meta device, to be filled by `put_shard`.

    `blocks(network)` lists its repeated parts: what is recomputed, compiled and cut up one by one.
    Raises: ConfigError if the strategy does not fit the ranks.
    """
    strategy = resolve_strategy(config, ranks)
    parts = [block for network in trained.values() for block in blocks(network)]
    if activation_checkpointing:
        apply_checkpointing(parts)
    if config.compile:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        _apply_to_forward(parts, torch.compile)
    if strategy in ("fsdp", "hybrid"):
        mesh = _mesh(strategy, config, ranks)
        return Parallel(strategy, sharded=[_shard(network, blocks(network), mesh) for network in trained.values()])
    if strategy == "ddp":
        # The first text encoder's last layer has no part in the loss: without a search DDP would wait for its gradient.
        ddp = DistributedDataParallel(
            _Together(trained), find_unused_parameters=len(trained) > 1, gradient_as_bucket_view=True
        )
        return Parallel(strategy, ddp=ddp)
    return Parallel()


def apply_checkpointing(parts: Sequence[nn.Module]) -> None:
    """Lets each part compute its activations again in the backward pass instead of keeping them."""
    _apply_to_forward(parts, lambda forward: partial(checkpoint, forward, use_reentrant=False))


def _apply_to_forward(parts: Sequence[nn.Module], wrap: Callable[..., Any]) -> None:
    """Wraps the forward function and not the module, so that no parameter changes its name."""
    for part in parts:
        part.forward = wrap(part.forward)


def _mesh(strategy: Strategy, config: ParallelConfig, ranks: Ranks) -> DeviceMesh:
    if strategy == "fsdp":
        return init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("shard",))
    size = config.shard_size or ranks.local_world
    return init_device_mesh(ranks.device.type, (ranks.world // size, size), mesh_dim_names=("replicate", "shard"))


def _shard(network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> FSDPModule:
    original = type(network)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # By default what is in no block stays gathered until a backward pass. Validation and previews have none, and the
    # next step would compute with the averaged weights that they saw.
    sharded = fully_shard(network, mesh=mesh, reshard_after_forward=True)
    # FSDP2 makes a class that extends the network's. transformers looks up by a class's name what it can record, such
    # as hidden states, so the new class keeps that name.
    type(network).__module__, type(network).__qualname__ = original.__module__, original.__qualname__
    return sharded


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that is cut up, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put_shard(parameter: Tensor, tensor: Tensor) -> None:
    """Copies this rank's part of a whole tensor, which every rank has, into its shard. Says nothing to other ranks."""
    if isinstance(parameter, DTensor):
        cut = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        tensor = cut.to_local()
    local(parameter).copy_(tensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is cut up, put together (collective); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
