"""A U-Net's pass on torch's meta device, as a GPU would make it: shapes alone, nothing is allocated.

Owns what stands between the meta device and a GPU: attention by a fused kernel keeps no N × N matrix, and autocast
computes products in bfloat16 and norms in float32. Bytes are counted by `footprint`, FLOP by `flop`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["GpuKernels", "apply_on_meta"]


def apply_on_meta(
    unet: nn.Module, *, canvas: tuple[int, int], vae_factor: int = 8, batch: int = 1, tokens: int
) -> Tensor:
    """The output of a U-Net on the meta device for a batch of one canvas, (height, width) px, and caption length."""
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


class GpuKernels(TorchFunctionMode):
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
            return _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]  # not annotated in torch
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
