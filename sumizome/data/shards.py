"""Latent shards: the files that hold what the VAE made of the pictures, written in units and verified.

Owns the format, the fingerprint and the checks. Knows no VAE and no pixels; `latents` reads what this commits. The
invariant: a unit counts once its commit record, written last, is there; and nothing is read that does not match it.

    latents.json                    fingerprint, plan, the command that made it, the tags' categories
    units/unit-00000.safetensors    raw latents before normalisation, float16 [n, c, h, w], one tensor "HxW" a bucket
    units/unit-00000.parquet        one row a picture: `INDEX_SCHEMA`
    units/unit-00000.json           commit record: counts, rejected pictures, SHA-256 of the two files above
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float16
from safetensors.numpy import save

from sumizome.data.manifest import tags_by_category
from sumizome.data.sources import Reject
from sumizome.errors import ShardError
from sumizome.files import sha256_of, write_atomically

__all__ = [
    "INDEX_SCHEMA",
    "CachePlan",
    "Fingerprint",
    "UnitRecord",
    "commit_unit",
    "crc32",
    "differences",
    "latent_fault",
    "load_plan",
    "tensor_name",
    "unit_paths",
    "verify_unit",
    "write_plan",
]

FORMAT_VERSION = 1

INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("bucket_h", pa.int32(), nullable=False),  # px, the canvas
        pa.field("bucket_w", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),  # of the bucket's tensor
        pa.field("original_h", pa.int32(), nullable=False),  # px, the picture after EXIF orientation
        pa.field("original_w", pa.int32(), nullable=False),
        pa.field("crop_top", pa.int32(), nullable=False),  # px of the resized picture
        pa.field("crop_left", pa.int32(), nullable=False),
        pa.field("tags", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("kept_tags", pa.int16(), nullable=False),
        pa.field("repeats", pa.int32(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),  # of the record's float16 bytes, little-endian
    ]
)

MAX_HALF = 65504.0
"""The largest finite float16; SDXL's raw latents stay below about 40."""

# ── What made the latents ──


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides a latent's value. Caches of one fingerprint hold the same numbers."""

    vae_digest: str
    """SHA-256 of the VAE's weights and statistics."""
    vae_factor: int
    """Pixels per latent along one side."""
    latent_mean: tuple[float, ...]
    """normalised = (raw − mean) / std, per channel."""
    latent_std: tuple[float, ...]
    buckets: tuple[tuple[int, int], ...]
    """The bucket table, (height, width) in pixels."""
    max_aspect_error: float
    crop: str
    crop_seed: int
    resize: str
    """`canvas.RESIZE_VERSION`."""
    manifest_digest: str

    @property
    def digest(self) -> str:
        """SHA-256 hex; each unit carries it."""
        return _digest(asdict(self))


_FIELD_NAMES = {
    "vae_digest": "VAE (its weights or statistics)",
    "vae_factor": "VAE (its downscale factor)",
    "latent_mean": "latent mean",
    "latent_std": "latent scale",
    "buckets": "bucket table (area, step, min_side, max_side)",
    "max_aspect_error": "max_aspect_error",
    "crop": "crop",
    "crop_seed": "crop_seed",
    "resize": "code that resizes",
    "manifest_digest": "manifest (pictures or tags)",
}


@dataclass(frozen=True)
class CachePlan:
    """What a latent folder is to hold, written before the first unit."""

    fingerprint: Fingerprint
    images: int
    """Rows of the manifest; every one ends up written or rejected."""
    unit_size: int
    """Rows of the manifest in a unit; the last has the rest."""
    command: str
    """What to run to make the folder again, or to finish it."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """tag → category, the manifest's; `manifest_digest` covers it, so it cannot be another's."""

    @property
    def units(self) -> int:
        return -(-self.images // self.unit_size)

    @property
    def remedy(self) -> str:
        """What mends a unit, as the end of an error's sentence."""
        return f"run `{self.command}` again: whole units are kept, this one is made anew"

    def rows(self, unit: int) -> range:
        """The manifest rows of a unit."""
        return range(unit * self.unit_size, min(self.images, (unit + 1) * self.unit_size))


def write_plan(root: Path, plan: CachePlan) -> None:
    """Begins a latent folder. Raises: DataError if the disk cannot be written."""
    content = {"format": FORMAT_VERSION, **asdict(plan), "categories": tags_by_category(plan.categories)}
    if not plan.categories:
        del content["categories"]
    _write_json(root / "latents.json", content)


def load_plan(root: Path) -> CachePlan:
    """The plan of the latent folder at `root`.

    Raises: ShardError if there is none, it is damaged, or another version wrote it.
    """
    path = root / "latents.json"
    if not path.is_file():
        raise ShardError(f"{root} holds no latents.json; give a folder that `sumizome prepare` wrote")
    content = _read_json(path, "delete the folder and run `sumizome prepare` again")
    if content.get("format") != FORMAT_VERSION:
        raise ShardError(
            f"{path}: format {content.get('format')}, this version reads {FORMAT_VERSION}; "
            "run `sumizome prepare` again into another folder"
        )
    try:
        made_by = content["fingerprint"]
        fingerprint = Fingerprint(**{key: _as_tuple(value) for key, value in made_by.items()})
        images, unit_size = int(content["images"]), int(content["unit_size"])
        if min(images, unit_size) < 1:
            raise ValueError(f"{images} images in units of {unit_size}")
        categories = {tag: name for name, tags in content.get("categories", {}).items() for tag in tags}
        return CachePlan(fingerprint, images, unit_size, str(content["command"]), categories)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(
            f"{path}: not what `sumizome prepare` writes ({error}); run it again into another folder"
        ) from error


def differences(found: Fingerprint, expected: Mapping[str, Any]) -> list[str]:
    """The parts of a fingerprint that are not as expected, in words."""
    return list(dict.fromkeys(_FIELD_NAMES[name] for name, value in expected.items() if getattr(found, name) != value))


# ── Writing ──


@dataclass(frozen=True)
class UnitRecord:
    """A unit's commit record: written + rejected = planned."""

    unit: int
    fingerprint: str
    planned: int
    written: int
    rejects: tuple[Reject, ...]
    """Pictures of the manifest that have no latent, and why."""
    files: Mapping[str, Mapping[str, Any]]
    """name → bytes, sha256."""


def latent_fault(latent: Float[np.ndarray, "c h w"]) -> tuple[str, str] | None:
    """(reason, sentence) if a raw latent cannot be stored as float16, else None. Never mended, never zeros."""
    if not np.isfinite(latent).all():
        return "not_finite", "its latent holds NaN or infinity."
    if (largest := float(np.abs(latent).max())) > MAX_HALF:
        return "overflow", f"its latent reaches {largest:.4g}, more than float16 holds ({MAX_HALF:g})."
    return None


def commit_unit(
    root: Path,
    plan: CachePlan,
    unit: int,
    latents: Sequence[Float16[np.ndarray, "c _ _"]],
    columns: Mapping[str, Any],
    rejects: Sequence[Reject],
) -> UnitRecord:
    """Writes a unit: latents, index, then the record that makes them count. Killed before that, nothing has happened.

    `columns` are lists or Arrow columns, those of `INDEX_SCHEMA` but `row` and `crc32`, one entry a latent.
    Raises: DataError if the disk cannot be written.
    """
    by_bucket: dict[str, list[np.ndarray]] = {}
    row = []
    for latent, height, width in zip(latents, columns["bucket_h"], columns["bucket_w"], strict=True):
        members = by_bucket.setdefault(tensor_name(height, width), [])
        row.append(len(members))
        members.append(latent)
    checks = [crc32(latent) for latent in latents]
    # safetensors writes the memory as it lies, whatever the strides say; a VAE's output may be channels-last.
    tensors = {name: np.ascontiguousarray(np.stack(members)) for name, members in by_bucket.items()}
    index = pa.table({**columns, "row": row, "crc32": checks}, schema=INDEX_SCHEMA)
    shard_path, index_path, record_path = unit_paths(root, unit)
    # As bytes: `save_file` makes a file that only its owner may read.
    write_atomically(shard_path, lambda temporary: temporary.write_bytes(save(tensors)))
    write_atomically(index_path, lambda temporary: pq.write_table(index, temporary, compression="zstd"))
    record = UnitRecord(
        unit=unit,
        fingerprint=plan.fingerprint.digest,
        planned=len(plan.rows(unit)),
        written=len(latents),
        rejects=tuple(rejects),
        files={
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in (shard_path, index_path)
        },
    )
    _write_json(record_path, asdict(record))
    return record


def unit_paths(root: Path, unit: int) -> tuple[Path, Path, Path]:
    """(latents, index, commit record) of a unit."""
    stem = root / "units" / f"unit-{unit:05d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".parquet"), stem.with_suffix(".json")


def tensor_name(height: int, width: int) -> str:
    """The name in a shard of a bucket's tensor; the bucket in pixels."""
    return f"{height}x{width}"


def crc32(record: Float16[np.ndarray, "..."]) -> int:
    """The check of one latent: CRC-32 of its bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(record).data)


# ── Verifying ──


def verify_unit(root: Path, plan: CachePlan, unit: int, verify: Literal["full", "size"] = "full") -> UnitRecord:
    """The unit's record, once its files are found to be what the record says.

    Raises: ShardError naming the file that is missing, damaged or foreign.
    """
    *data_paths, record_path = unit_paths(root, unit)
    if not record_path.is_file():
        raise ShardError(f"{record_path} is missing: unit {unit} of {plan.units} is not finished; {plan.remedy}")
    record = _read_record(record_path, plan)
    planned = len(plan.rows(unit))
    if (record.fingerprint, record.unit) != (plan.fingerprint.digest, unit):
        raise ShardError(f"{record_path} belongs to other latents or to another unit; {plan.remedy}")
    if not record.planned == planned == record.written + len(record.rejects):
        raise ShardError(
            f"{record_path}: {record.written} written and {len(record.rejects)} rejected do not make the "
            f"{planned} planned; {plan.remedy}"
        )
    for path in data_paths:
        if not path.is_file():
            raise ShardError(f"{path} is missing; {plan.remedy}")
        if (found := path.stat().st_size) != record.files[path.name]["bytes"]:
            raise ShardError(
                f"{path} has {found} bytes, its record says {record.files[path.name]['bytes']}; {plan.remedy}"
            )
        # An index is small and steers everything: it is always verified whole.
        if (verify == "full" or path.suffix == ".parquet") and sha256_of(path) != record.files[path.name]["sha256"]:
            raise ShardError(f"{path} is damaged: its SHA-256 is not the one in its record; {plan.remedy}")
    return record


def _read_record(path: Path, plan: CachePlan) -> UnitRecord:
    content = _read_json(path, plan.remedy)
    try:
        return UnitRecord(**{**content, "rejects": tuple(Reject(*reject) for reject in content["rejects"])})
    except (KeyError, TypeError) as error:
        raise ShardError(f"{path} is no commit record ({error}); {plan.remedy}") from error


# ── Files ──


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that carries its own SHA-256, so that a flipped bit in it is seen."""
    text = json.dumps({**content, "digest": _digest(content)}, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ShardError(f"{path} cannot be read ({error}); {remedy}") from error
    if digest != _digest(content):
        raise ShardError(f"{path} is damaged: it does not match the digest that it carries; {remedy}")
    return dict(content)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _as_tuple(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
