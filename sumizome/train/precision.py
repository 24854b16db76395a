"""In which number format a run computes: the one policy object that the loop, validation and sharding are given."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["Precision", "PrecisionName", "build_precision"]

PrecisionName = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Precision:
    """Weights, moments and average are float32; `compute` is the format of the networks' matrix products."""

    device_type: str
    compute: torch.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward pass of a trained network."""
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.compute == torch.bfloat16)


def build_precision(name: PrecisionName, device: torch.device) -> Precision:
    """The policy of a name. "fp32" computes with tf32 matrix products on a GPU, as the report does."""
    # Without effect on a CPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return Precision(device.type, torch.bfloat16 if name == "bf16" else torch.float32)
