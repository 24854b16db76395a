"""What one training step of a U-Net keeps in memory, found without a GPU and without allocating anything.

The step runs on torch's meta device (`meta_pass`): every operation of the forward and the backward pass is performed on
shapes alone, by autograd itself, while a dispatch mode notes which storages are alive. So checkpointing, saved
activations and casts are those of the real step, not of a formula.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from sumizome.models.networks import building_blocks
from sumizome.train.meta_pass import GpuKernels, apply_on_meta
from sumizome.train.precision import PrecisionName

__all__ = ["StepFootprint", "measure_step"]


@dataclass(frozen=True, eq=False)
class StepFootprint:
    """Live bytes after each operation of a forward and backward pass, weights apart."""

    working: Int[np.ndarray, " operations"]
    """Activations, casts and temporary results, bytes."""
    gradients: Int[np.ndarray, " operations"]
    """Gradients of weights, bytes."""
    largest_gradient: int
    """Bytes of the largest tensor among them."""

    def peak(self, *, gradient_shards: int = 1, fused_backward: bool = False) -> int:
        """The most bytes alive at once, when gradients are shared out, or live for one update only."""
        if fused_backward:
            return int(self.working.max()) + self.largest_gradient
        return int((self.working + self.gradients // gradient_shards).max())

    @cached_property
    def gradient_bytes(self) -> int:
        """All gradients together."""
        return int(self.gradients.max())


def measure_step(
    unet: UNet2DConditionModel,
    *,
    canvas: tuple[int, int],
    vae_factor: int = 8,
    batch: int,
    tokens: int = 231,
    precision: PrecisionName,
    checkpointing: bool = False,
) -> StepFootprint:
    """The footprint of one forward and backward pass over a micro-batch; `unet` is on the meta device.

    `canvas` is (height, width) px, `tokens` the rows of the text condition.
    """
    unet.train().requires_grad_(True)
    nn.Module.to(unet, torch.bfloat16 if precision == "pure_bf16" else torch.float32)  # diffusers' own warns
    parameters = list(unet.parameters())
    tracker = _LiveStorages(parameters)
    handles = [p.register_post_accumulate_grad_hook(tracker.take_gradient) for p in parameters]
    kernels = GpuKernels(torch.bfloat16 if precision != "fp32" else None)
    if checkpointing:
        # What is computed again runs in the backward pass, which has left the function mode: it enters it itself.
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), kernels))
        for block in building_blocks(unet):
            block.forward = partial(again, block.forward)
    try:
        with tracker, kernels:
            output = apply_on_meta(unet, canvas=canvas, vae_factor=vae_factor, batch=batch, tokens=tokens)
            output.float().square().mean().backward()
    finally:
        for handle in handles:
            handle.remove()
        unet.zero_grad(set_to_none=True)
        for block in building_blocks(unet):
            vars(block).pop("forward", None)
    return StepFootprint(
        working=np.array(tracker.series, np.int64)[:, 0],
        gradients=np.array(tracker.series, np.int64)[:, 1],
        largest_gradient=max(p.numel() * p.element_size() for p in parameters),
    )


class _LiveStorages(TorchDispatchMode):
    """Notes after each operation how many bytes are alive that the operations themselves made."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated in torch
        self.series: list[tuple[int, int]] = [(0, 0)]
        self._alive = {parameter.untyped_storage()._cdata: (0, 0) for parameter in parameters}
        self._working = self._gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        self.series.append((self._working, self._gradients))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = (storage.nbytes(), 0)
            self._working += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def take_gradient(self, parameter: Tensor) -> None:
        """What autograd has just put into `parameter.grad` is a gradient from now on."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, counted = self._alive[key]
        if not counted:
            self._alive[key] = (0, size)
            self._working -= size
            self._gradients += size
            self.series.append((self._working, self._gradients))

    def _forget(self, key: int) -> None:
        working, gradients = self._alive.pop(key)
        self._working -= working
        self._gradients -= gradients
