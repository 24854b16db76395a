"""Sumizome trains SDXL-family models to pure noise and back, samples them and exports them.

The system of "Improvements to SDXL in NovelAI Diffusion V3" (arXiv 2409.15997). Nothing of its own is imported here, so
that `import sumizome` costs nothing; `README.md` says which five files to read first.
"""

import logging

__all__ = ["__version__"]

__version__ = "0.1.0"

# diffusers imports bitsandbytes wherever that is installed, and it then warns that 4-bit kernels for the CPU, which
# nothing here uses, are missing. Here, because a worker process imports this package and never the command line.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)
