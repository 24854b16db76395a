"""The VAE at work: batches of canvases in, raw latents out, with its own time counted.

Owns the precision and, on CUDA, the copies: up from pinned memory as bytes, down without waiting, so that the device
goes from one batch to the next while the host is busy. The invariant: a batch's latents are those that `encode_pixels`
gives, whatever is in flight beside it.
"""

import time
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor

from sumizome.errors import ConfigError
from sumizome.models.vae import encode_pixels

__all__ = ["Encoder", "InFlight", "Precision"]

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""Of the VAE's arithmetic, by autocast; weights stay as they are. SDXL's own VAE overflows in float16."""


@dataclass(frozen=True, eq=False)
class InFlight:
    """A batch that was given to the VAE."""

    latents: Tensor
    """[b, c, h, w] float32 on the CPU, once `done` has passed."""
    kept: tuple[Tensor, ...] = ()
    """Memory that the device still reads from."""
    begun: "torch.cuda.Event | None" = None
    done: "torch.cuda.Event | None" = None


class Encoder:
    """One VAE on its device."""

    def __init__(self, vae: AutoencoderKL, precision: Precision = "float32") -> None:
        self.vae = vae
        self.busy_seconds = 0.0
        """The VAE's own time; on CUDA the device's, by its clock."""
        self.depth = 2 if vae.device.type == "cuda" else 1
        """Batches that may be in flight before one is waited for."""
        dtype = getattr(torch, precision)
        self._autocast = torch.autocast(vae.device.type, dtype=dtype, enabled=precision != "float32")

    def begin(self, canvases: UInt8[np.ndarray, "b H W 3"]) -> InFlight:
        """Gives a batch to the VAE.

        Raises: ConfigError if it is too large for the device's memory.
        """
        try:
            return self._begin_cuda(canvases) if self.vae.device.type == "cuda" else self._begin_here(canvases)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"out of memory encoding {len(canvases)} pictures at once; lower --batch-size") from error

    def finish(self, batch: InFlight) -> Float[np.ndarray, "b c h w"]:
        """The raw latents of a batch, float32."""
        if batch.begun is not None and batch.done is not None:
            batch.done.synchronize()
            self.busy_seconds += batch.begun.elapsed_time(batch.done) / 1000
        return np.asarray(batch.latents)

    def _begin_here(self, canvases: UInt8[np.ndarray, "b H W 3"]) -> InFlight:
        started = time.perf_counter()
        latents = self._encode(torch.from_numpy(canvases)).cpu()
        self.busy_seconds += time.perf_counter() - started
        return InFlight(latents)

    def _begin_cuda(self, canvases: UInt8[np.ndarray, "b H W 3"]) -> InFlight:
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self.vae.device):
            pinned = torch.from_numpy(canvases).pin_memory()
            begun.record()
            latents = self._encode(pinned.to(self.vae.device, non_blocking=True))
            landed = torch.empty(latents.shape, dtype=latents.dtype, pin_memory=True)
            landed.copy_(latents, non_blocking=True)
            done.record()
        return InFlight(landed, (pinned, latents), begun, done)

    def _encode(self, canvases: Tensor) -> Tensor:
        pixels = canvases.permute(0, 3, 1, 2).float() / 127.5 - 1
        with self._autocast:
            return encode_pixels(self.vae, pixels)
