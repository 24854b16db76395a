"""What one training step of a U-Net takes, in bytes and FLOP, found without a GPU and without allocating anything.

The step runs on torch's meta device: every operation of the forward and the backward pass is performed on shapes alone,
by autograd itself, while a dispatch mode notes which storages are alive. So checkpointing, saved activations and casts
are those of the real step, not of a formula. The kernels of a GPU are told apart where they hold other memory than the
meta device's: attention keeps no N × N matrix, and autocast computes norms in float32.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from jaxtyping import Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sumizome.models.networks import building_blocks
from sumizome.train.precision import PrecisionName

__all__ = ["StepFootprint", "forward_flop", "measure_step"]


@dataclass(frozen=True, eq=False)
class StepFootprint:
    """Live bytes after each operation of a forward and backward pass, weights apart; and the FLOP."""

    working: Int[np.ndarray, " operations"]
    """Activations, casts and temporary results, bytes."""
    gradients: Int[np.ndarray, " operations"]
    """Gradients of weights, bytes."""
    largest_gradient: int
    """Bytes of the largest tensor among them."""
    flop: float
    """Forward and backward, without what checkpointing computes again: what MFU counts."""

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
    kernels = _GpuKernels(torch.bfloat16 if precision != "fp32" else None)
    if checkpointing:
        # What is computed again runs in the backward pass, which has left the function mode: it enters it itself.
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), kernels))
        for block in building_blocks(unet):
            block.forward = partial(again, block.forward)
    try:
        with tracker, kernels:
            _apply(unet, canvas, vae_factor, batch, tokens).float().square().mean().backward()
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
        flop=3 * forward_flop(unet, canvas=canvas, vae_factor=vae_factor, tokens=tokens) * batch,
    )


@torch.no_grad()
def forward_flop(unet: nn.Module, *, canvas: tuple[int, int], vae_factor: int = 8, tokens: int = 231) -> float:
    """FLOP of one image's forward pass, an addition counted apart; the backward pass has twice as many."""
    kernels = _GpuKernels(None)
    with FlopCounterMode(display=False) as counter, kernels:
        _apply(unet, canvas, vae_factor, 1, tokens)
    return float(counter.get_total_flops()) + kernels.attention_flop


def _apply(unet: nn.Module, canvas: tuple[int, int], vae_factor: int, batch: int, tokens: int) -> Tensor:
    config: Any = unet.config
    dtype = next(unet.parameters()).dtype
    height, width = canvas[0] // vae_factor, canvas[1] // vae_factor
    features = config.addition_time_embed_dim
    pooled = config.projection_class_embeddings_input_dim - 6 * features
    shapes = {
        "latents": (batch, config.in_channels, height, width),
        "text": (batch, tokens, config.cross_attention_dim),
        "pooled": (batch, pooled),
        "time_ids": (batch, 6),
    }
    made = {name: torch.empty(shape, device="meta", dtype=dtype) for name, shape in shapes.items()}
    condition = {"text_embeds": made["pooled"], "time_ids": made["time_ids"]}
    timesteps = torch.empty(batch, device="meta", dtype=torch.int64)
    output: Tensor = unet(made["latents"], timesteps, made["text"], added_cond_kwargs=condition).sample
    return output


class _LiveStorages(TorchDispatchMode):
    """Notes after each operation how many bytes are alive that the operations themselves made."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
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


class _GpuKernels(TorchFunctionMode):
    """The operations whose memory or precision on a GPU is not what the meta device would show."""

    def __init__(self, compute: torch.dtype | None) -> None:
        super().__init__()
        self.attention_flop = 0.0
        self._compute = compute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._cast(tensor) for tensor in args[:3])
            *_, queries, width = query.shape
            self.attention_flop += 4.0 * query.numel() // (queries * width) * queries * key.shape[-2] * width
            return _FusedAttention.apply(query, key, value)
        if self._compute is None or func not in _AUTOCAST:
            return func(*args, **kwargs)
        to = self._compute if _AUTOCAST[func] else torch.float32
        args = [self._cast(value, to) if isinstance(value, Tensor) else value for value in args]
        kwargs = {name: self._cast(v, to) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor, to: torch.dtype | None = None) -> Tensor:
        to = to or self._compute
        return tensor if to is None or not tensor.is_floating_point() else tensor.to(to)


_AUTOCAST: dict[Callable[..., Any], bool] = {
    F.linear: True,
    F.conv2d: True,
    F.layer_norm: False,
    F.group_norm: False,
}
"""What CUDA's autocast casts down (True) and up (False), of what a U-Net calls."""


class _FusedAttention(torch.autograd.Function):
    """A fused kernel's memory: it saves q, k, v, the output and one number a row; never a matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
