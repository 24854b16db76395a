"""Every test runs with shapes and dtypes checked: jaxtyping reads the signatures, beartype enforces them."""

import os

# Before torch is imported: spinning OpenMP barriers make a step many times slower when tests share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("sumizome", "beartype.beartype")
