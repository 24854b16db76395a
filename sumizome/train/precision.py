"""In which number format a run computes: the one policy object that the loop, validation and sharding are given."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["Precision", "PrecisionName", "build_precision"]

PrecisionName = Literal["fp32", "bf16", "pure_bf16"]


@dataclass(frozen=True)
class Precision:
    """`compute` is the format of the networks' matrix products, `weights` that of the weights and their moments.

    The average is always float32.
    """

    device_type: str
    compute: torch.dtype
    weights: torch.dtype = torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward pass of a trained network."""
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.compute == torch.bfloat16)


def build_precision(name: PrecisionName, device: torch.device) -> Precision:
    """The policy of a name. "fp32" computes with tf32 matrix products on a GPU, as the report does."""
    # Without effect on a CPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    half, full = torch.bfloat16, torch.float32
    return Precision(device.type, full if name == "fp32" else half, half if name == "pure_bf16" else full)
