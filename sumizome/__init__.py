"""Sumizome trains SDXL-family models to pure noise and back, samples them and exports them.

The system of "Improvements to SDXL in NovelAI Diffusion V3" (arXiv 2409.15997). Nothing is imported here, so that
`import sumizome` costs nothing; `README.md` says which five files to read first.
"""

__version__ = "0.1.0"
