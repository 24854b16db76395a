"""What a run makes of its machine: FLOP a second, their share of the peak (MFU), and the memory in use.

FLOP are those of the model's forward and backward pass as the loss needs them, in closed form (`flop`); what
checkpointing computes again counts for nothing.
"""

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sumizome.device import peak_flop
from sumizome.distributed.runtime import Ranks
from sumizome.models.networks import build_network
from sumizome.models.sdxl import SDXLModel
from sumizome.models.vae import vae_factor
from sumizome.train.flop import ImageFlop, image_flop
from sumizome.train.task import StepLoss

__all__ = ["Efficiency", "device_peak", "memory_in_use"]

_Shape = tuple[tuple[int, int], int]
"""(canvas (height, width) px, rows of the text condition)"""


class Efficiency:
    """Counts what this rank's steps compute; `summary` answers for all ranks."""

    def __init__(self, model: SDXLModel, *, text_is_trained: bool, peak: float | None) -> None:
        """`peak`: FLOP/s of one device; None where nobody knows it."""
        self._model, self._text_is_trained = model, text_is_trained
        self._peak = peak
        self.forget()

    @cached_property
    def _flop(self) -> ImageFlop:
        """Found with the first summary: the passes that tell it would hold up a run's first step."""
        return image_flop(
            build_network("unet", dict(self._model.unet.config), device="meta"),
            self._model.text_encoders,
            vae_factor=vae_factor(self._model.vae),
            text_is_trained=self._text_is_trained,
        )

    def forget(self) -> None:
        """Starts a new window."""
        self._samples: Counter[_Shape] = Counter()

    def add_step(self, losses: Sequence[StepLoss]) -> None:
        """The micro-batches that a step computed."""
        for loss in losses:
            self._samples[loss.canvas, loss.tokens] += len(loss.unweighted)

    def summary(self, ranks: Ranks, seconds: float) -> dict[str, float]:
        """The window's part of a record; `seconds` are those that its steps took together. Collective."""
        flop = sum(count * self._flop(*shape) for shape, count in self._samples.items())
        (total,) = ranks.sums([flop])
        rate = total / seconds / ranks.world if seconds else 0.0
        told = {"tflop_per_second": rate / 1e12}
        return told | ({"mfu": rate / self._peak} if self._peak else {})


def device_peak(device: torch.device, precision: str, tflops: float) -> float | None:
    """Peak FLOP/s of a device in the run's precision: what the settings say, else by its name; None if unknown."""
    if tflops:
        return tflops * 1e12
    return peak_flop(torch.cuda.get_device_name(device), tf32=precision == "fp32") if device.type == "cuda" else None


def memory_in_use(device: torch.device, ranks: Ranks) -> dict[str, dict[str, float]]:
    """GB (10⁹ bytes), the most of any rank: the device's peak since the last call, main memory now. Collective."""
    mine = {"resident": _resident() / 1e9}
    if device.type == "cuda":
        mine["device_peak"] = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    gathered = ranks.gather(mine)
    return {"memory_gb": {name: round(max(each[name] for each in gathered), 4) for name in mine}}


def _resident() -> int:
    """Bytes of main memory that this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        usage: Any = resource.getrusage(resource.RUSAGE_SELF)
        return int(usage.ru_maxrss) * 1024  # the most it ever held, where the present is not told
