"""Pictures that finished latents lack: which were rejected, and how many of them can be read by now.

Owns the reasons that may pass. Reads commit records and pictures, writes nothing. The invariant: a picture counts as
readable only while its bytes are those that were ingested, which `ingest` has decoded.
"""

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.latent_plan import CachePlan
from sumizome.data.manifest import ManifestRows, picture_place
from sumizome.data.picture_bytes import read_bytes
from sumizome.data.shards import verify_unit
from sumizome.data.tasks import Reject
from sumizome.errors import ShardError

__all__ = ["MAY_PASS", "Readable", "count_readable", "rejects_of"]

MAY_PASS = frozenset(
    {
        "missing",
        "no_permission",
        "read_error",
        "unreadable",
        "not_a_file",
        "file_too_large",
        "unstable",
        "changed",
        "link_outside",
        "out_of_memory",
    }
)
"""Reasons that speak of the file or the machine, not of the picture: a drive that was away, memory that was full."""


class Readable(NamedTuple):
    """Pictures."""

    rejected: int
    """for a reason that may pass"""
    now: int
    """of these, those whose bytes can be read now, and are the ones that were ingested"""
    changed: int
    """of these, those that can be read, and are others than were ingested"""


def rejects_of(root: Path, plan: CachePlan) -> list[Reject]:
    """The pictures that the units of a plan rejected. A damaged unit tells none: all of its pictures are made anew."""
    found: list[Reject] = []
    for unit in plan.new_units:  # those that it took over hold latents only
        with contextlib.suppress(ShardError):
            found.extend(verify_unit(root, plan, unit, "index").rejects)
    return found


def count_readable(manifest: ManifestRows, rows: Int[np.ndarray, " n"], rejects: Iterable[Reject]) -> Readable:
    """How many of the rejected pictures can be read now, of some rows of the manifest."""
    passing = {(reject.source, reject.path) for reject in rejects if reject.reason in MAY_PASS}
    pictures = manifest.take(rows)
    places = zip(pictures["source"].to_pylist(), pictures["path"].to_pylist(), strict=True)
    entries = [entry for entry, place in enumerate(places) if place in passing]
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(lambda entry: _fault(manifest, pictures, entry), entries))
    return Readable(len(entries), faults.count(""), faults.count("changed"))


def _fault(manifest: ManifestRows, pictures: pa.Table, entry: int) -> str:
    """The reason why a picture cannot be read as it was ingested; empty if it can."""
    try:
        read_bytes(picture_place(pictures, entry, manifest.sources), sha256=pictures["sha256"][entry].as_py())
    except ImageRejected as rejected:
        return rejected.reason
    return ""
