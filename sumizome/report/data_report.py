"""A data set on one page: what is in it, what training will make of it, what deserves attention.

Owns the order of the work and the facts that templates/data.html.j2 shows. Figures come of whole columns or of a sample
whose size is stated; pictures that are shown are few and decoded elsewhere, so time and memory do not follow the rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sumizome.data.buckets import BucketConfig, Canvases, bucket_table
from sumizome.data.captions import CaptionConfig
from sumizome.data.ingest import available_cores
from sumizome.data.manifest import ARCHIVE_VERSION, ManifestRows
from sumizome.data.stored_manifest import open_manifest
from sumizome.data.tag_codes import code_parts
from sumizome.data.tag_table import unused_rows, with_tag_table
from sumizome.data.tags import TagWeightConfig, weigh
from sumizome.errors import ConfigError
from sumizome.report.cache import Cache, describe_cache
from sumizome.report.findings import find
from sumizome.report.gallery import Member, Picture, Place, find_members, look_at
from sumizome.report.left_out import describe_copies, describe_rejects
from sumizome.report.page import check_page_path, render_page, write_page
from sumizome.report.pictures import describe_buckets, describe_pictures
from sumizome.report.tagging import describe_tags, describe_tokens, describe_weights

__all__ = ["ReportConfig", "build_data_report", "held_out", "write_data_report"]

_TAGS_SHOWN = 14
"""of a picture"""


@dataclass(frozen=True)
class ReportConfig:
    """What the page assumes of the training to come."""

    buckets: BucketConfig = field(default_factory=BucketConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    weights: TagWeightConfig = field(default_factory=lambda: TagWeightConfig(strength=0.5))
    """As an example where training is not to weigh: so the page shows what weighting would do."""
    max_chunks: int = 3
    validation_count: int = 64
    token_sample: int = 100_000
    """Captions that are tokenised; of a larger set a random sample."""
    workers: int | None = None
    """Processes that decode thumbnails; None = one a core, 0 = no thumbnails."""

    def __post_init__(self) -> None:
        for name in ("max_chunks", "token_sample"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}.")


def write_data_report(
    manifest_path: Path,
    out: Path,
    config: ReportConfig,
    *,
    latents: Path | None = None,
    vae_digest: str | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Writes the page, and returns its facts. `vae_digest` is of the model that the latents should fit.

    Raises: ConfigError: a page in the place of something else, or inside a folder of pictures. DataError: a manifest,
        table or latent folder that cannot be read.
    """
    check_page_path(out)
    progress("manifest")
    manifest = open_manifest(manifest_path, ["height", "width", "repeats", "kept_tags"])
    for source in manifest.sources:
        if out.resolve().is_relative_to(source):
            raise ConfigError(f"--out {out} lies inside the picture folder {source}, which is never written to.")
    facts = build_data_report(
        manifest_path, manifest, config, latents=latents, vae_digest=vae_digest, progress=progress
    )
    write_page(out, render_page("data.html.j2", facts))
    return facts


def build_data_report(
    manifest_path: Path,
    manifest: ManifestRows,
    config: ReportConfig,
    *,
    latents: Path | None = None,
    vae_digest: str | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Everything that the page shows, by the names that its template uses."""
    categories, given = with_tag_table(manifest.categories, config.weights.table)
    progress("tags and weights")
    coded = code_parts(part["tags"] for part in manifest.parts(["tags"]))
    weighed = weigh(coded, manifest.column("repeats"), config.weights, categories, given)
    del coded  # four bytes a tag, and nothing else is as large
    progress("pictures and buckets")
    pictures = describe_pictures(manifest)
    cache = describe_cache(latents, manifest.sources, manifest.digest, vae_digest) if latents else None
    table, max_error = _canvases(config, cache)
    buckets = describe_buckets(manifest, table, max_error)
    unused = unused_rows(config.weights.table, given, weighed.tags["tag"].to_pylist())
    weights = describe_weights(weighed.images, config.weights, unused)
    tags = describe_tags(weighed.tags, pictures.showings, config.weights.min_count, config.captions)
    progress("tokens")
    tokens = describe_tokens(manifest, config.captions, categories, config.max_chunks, config.token_sample)
    progress("rejects and duplicates")
    rejects, copies = describe_rejects(manifest_path), describe_copies(manifest_path)
    rows = [*weights.lightest, *weights.heaviest, *(row for row, _ in buckets.most_cropped)]
    places = [_place(manifest, row) for row in rows]
    for reason in rejects or []:
        places += [(line.source, line.path) for line in reason.examples]
    for group in copies.examples if copies else []:
        places += [group.kept, *(place for place, *_ in group.members)]
    progress("thumbnails")
    return {
        "title": f"Data report: {manifest_path.name}",
        "manifest_path": str(manifest_path),
        "digest": manifest.digest,
        "pictures": pictures,
        "buckets": buckets,
        "canvases": len(table),
        "area": config.buckets.area if cache is None else None,
        "tags": tags,
        "weights": weights,
        "tokens": tokens,
        "rejects": rejects,
        "copies": copies,
        "cache": cache,
        "held_out": held_out(config.validation_count, pictures.count),
        "findings": find(pictures, buckets, tags, weights, tokens, rejects, copies, cache),
        "thumbnails": _thumbnails(places, manifest, config.workers),
        "row": _row_of(manifest, weighed.images),
    }


def held_out(count: int, pictures: int) -> int:
    """Pictures that validation takes: `count`, one in twenty at most."""
    return min(count, pictures // 20)


def _canvases(config: ReportConfig, cache: Cache | None) -> tuple[Canvases, float]:
    """The bucket table and the largest aspect error: those of the latents, where there are some."""
    if cache is None:
        return bucket_table(config.buckets), config.buckets.max_aspect_error
    made_by = cache.plan.fingerprint
    return np.array(made_by.buckets, np.int64).reshape(-1, 2), made_by.max_aspect_error


def _place(manifest: ManifestRows, row: int) -> Place:
    (found,) = manifest.take(np.array([row]), ["source", "path"]).to_pylist()
    return str(manifest.sources[found["source"]]), found["path"]


def _thumbnails(places: list[Place], manifest: ManifestRows, workers: int | None) -> dict[Place, Picture]:
    if workers == 0:
        return {place: Picture(place[1], None, None) for place in places}
    members = _members(places, manifest)
    return look_at(places, manifest.sources, manifest.background, workers or available_cores(), members)


def _members(places: list[Place], manifest: ManifestRows) -> dict[Place, Member]:
    """Where those of the places lie that are in a tar: as the manifest has it, of rejects as the tar itself tells."""
    found = find_members(places, manifest.sources)
    if manifest.version < ARCHIVE_VERSION:
        return found
    wanted = pa.array(sorted({path for _, path in places}), pa.string())
    for part in manifest.parts(["source", "path", "archive", "offset", "file_bytes"]):
        for row in part.filter(pc.and_(pc.is_valid(part["archive"]), pc.is_in(part["path"], wanted))).to_pylist():
            place = str(manifest.sources[row["source"]]), row["path"]
            found[place] = row["archive"], row["offset"], row["file_bytes"]
    return found


def _row_of(manifest: ManifestRows, weights: np.ndarray) -> Callable[[int], Mapping[str, Any]]:
    """What a figure shows of a row of the manifest."""

    def row_of(row: int) -> Mapping[str, Any]:
        (found,) = manifest.take(np.array([row]), ["tags", "repeats"]).to_pylist()
        tags = found["tags"]
        return {
            "place": _place(manifest, row),
            "weight": float(weights[row]),
            "tags": tags[:_TAGS_SHOWN],
            "more": max(0, len(tags) - _TAGS_SHOWN),
            "repeats": found["repeats"],
        }

    return row_of
