"""Randomness as a function: a seed is derived from what it is for, never drawn from a shared stream.

Because every random number follows from (run seed, purpose, epoch, sample id, …), a checkpoint holds no generator
state, and the same step gives the same batch, caption and noise on any number of processes and after any resume.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["derive_seed", "generator"]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from the given parts: `derive_seed(1, "noise", 2)` is not `derive_seed(1, "noise2")`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> "torch.Generator":
    """A CPU generator for the given parts; on the CPU always, so that the numbers do not depend on the device."""
    import torch  # here, because captions need seeds and no tensors

    return torch.Generator("cpu").manual_seed(derive_seed(*parts))
