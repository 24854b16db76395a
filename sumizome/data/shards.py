"""Latent shards: the files that hold what the VAE made of the pictures, written in units and verified.

Owns the units' format and the checks; the plan is `latent_plan`'s. Knows no VAE and no pixels; `latents` reads what
this commits. The invariant: a unit counts once its commit record, written last, is there; and nothing is read that does
not match it.

    latents.json                    fingerprint, plan, the command that made it, the tags' categories; written last
    latents.next.json               the same of a preparation that is not finished
    units/unit-00000.safetensors    raw latents before normalisation, float16 [n, c, h, w], one tensor "HxW" a bucket
    units/unit-00000.parquet        one row a latent: `INDEX_SCHEMA`
    units/unit-00000.json           commit record: counts, rejected pictures, SHA-256 of the two files above
    units/unit-00000.g2.parquet     the index of generation 2: what an update left of the unit, with the tags of then
    units/unit-00000.g2.json        its record

A changed manifest makes a new generation. The three files of a unit never change after their record is there; a
generation's own indexes say which of the latents it uses, and what it calls them.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float16
from safetensors.numpy import save

from sumizome.data.latent_plan import CachePlan
from sumizome.data.sealed_json import read_sealed_json, write_file, write_sealed_json
from sumizome.data.tasks import Reject
from sumizome.errors import ShardError
from sumizome.files import sha256_of

__all__ = [
    "INDEX_SCHEMA",
    "UnitRecord",
    "commit_index",
    "commit_unit",
    "crc32",
    "latent_fault",
    "tensor_name",
    "unit_paths",
    "verify_own",
    "verify_unit",
]

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
        pa.field("variant", pa.int16(), nullable=False),  # a picture's variants follow each other, 0, 1, …
        pa.field("sha256", pa.string(), nullable=False),  # of the picture's file; "" = unknown, and never kept
    ]
)

MAX_HALF = 65504.0
"""The largest finite float16; SDXL's raw latents stay below about 40."""

# ── Writing ──


@dataclass(frozen=True)
class UnitRecord:
    """A unit's commit record, in pictures: written + rejected = planned."""

    unit: int
    fingerprint: str
    generation: int
    """That made the unit; of an overlay, the one whose index this is."""
    latents: str
    """`Fingerprint.latents_digest`: another manifest may go on using them."""
    planned: int
    written: int
    rejects: tuple[Reject, ...]
    """Pictures of the manifest that have no latent, and why."""
    files: Mapping[str, Mapping[str, Any]]
    """name → bytes, sha256."""
    overlay: int = 0
    """0 = the index beside the latents, else the generation whose index it is. Named apart because of `unit_paths`."""


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

    `columns` are lists or Arrow columns, those of `INDEX_SCHEMA` but `row` and `crc32`, one entry a latent; a picture's
    variants stand together. `variant` may be left out where there is one, `sha256` where it is unknown.
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
    count = len(latents)
    columns = {"variant": [0] * count, "sha256": [""] * count, **columns, "row": row, "crc32": checks}
    shard_path, index_path, record_path = unit_paths(root, unit)
    # As bytes: `save_file` makes a file that only its owner may read.
    shard = write_file(shard_path, save(tensors))
    index = write_file(index_path, _parquet(pa.table(columns, schema=INDEX_SCHEMA)))
    record = UnitRecord(
        unit=unit,
        fingerprint=plan.fingerprint.digest,
        generation=plan.generation,
        latents=plan.fingerprint.latents_digest,
        planned=len(plan.rows(unit)),
        written=count // plan.fingerprint.variants,
        rejects=tuple(rejects),
        files={shard_path.name: shard, index_path.name: index},
    )
    write_sealed_json(record_path, asdict(record))
    return record


def commit_index(root: Path, plan: CachePlan, unit: int, index: pa.Table, own: UnitRecord | None) -> UnitRecord:
    """Writes what a generation uses of a unit of an earlier one, whose own record is `own`; nothing, if it has none.

    Raises: DataError if the disk cannot be written.
    """
    shard_path, index_path, record_path = unit_paths(root, unit, plan.generation)
    pictures = index.num_rows // plan.fingerprint.variants
    files = {shard_path.name: own.files[shard_path.name]} if own is not None and pictures else {}
    record = UnitRecord(
        unit=unit,
        fingerprint=plan.fingerprint.digest,
        generation=plan.generation,
        latents=plan.fingerprint.latents_digest,
        planned=pictures,
        written=pictures,
        rejects=(),
        files={**files, index_path.name: write_file(index_path, _parquet(index.cast(INDEX_SCHEMA)))},
        overlay=plan.generation,
    )
    write_sealed_json(record_path, asdict(record))
    return record


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def unit_paths(root: Path, unit: int, overlay: int = 0) -> tuple[Path, Path, Path]:
    """(latents, index, commit record) of a unit; `overlay` is a generation that has its own index of it."""
    stem = f"unit-{unit:05d}"
    own = f"{stem}.g{overlay}" if overlay else stem
    units = root / "units"
    return units / f"{stem}.safetensors", units / f"{own}.parquet", units / f"{own}.json"


def tensor_name(height: int, width: int) -> str:
    """The name in a shard of a bucket's tensor; the bucket in pixels."""
    return f"{height}x{width}"


def crc32(record: Float16[np.ndarray, "..."]) -> int:
    """The check of one latent: CRC-32 of its bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(record).data)


# ── Verifying ──


def verify_unit(
    root: Path, plan: CachePlan, unit: int, verify: Literal["full", "size", "index"] = "full"
) -> UnitRecord:
    """The unit's record in this plan, once its files are what the record says; "index" leaves its latents out.

    Raises: ShardError naming the file that is missing, damaged or foreign.
    """
    overlay = plan.overlay(unit)
    *_, path = unit_paths(root, unit, overlay)
    if not path.is_file():
        raise ShardError(f"{path} is missing: unit {unit} of {plan.units} is not finished; {plan.remedy}")
    record = _read_record(path, plan.remedy)
    belongs = (record.fingerprint, record.generation, record.unit, record.overlay)
    if belongs != (plan.fingerprint.digest, plan.generation, unit, overlay):
        raise ShardError(f"{path} belongs to other latents or to another unit; {plan.remedy}")
    planned = record.planned if overlay else len(plan.rows(unit))
    if not record.planned == planned == record.written + len(record.rejects):
        raise ShardError(
            f"{path}: {record.written} written and {len(record.rejects)} rejected do not make the "
            f"{planned} planned; {plan.remedy}"
        )
    _verify_files(root, record, verify, plan.remedy)
    return record


def verify_own(root: Path, unit: int, remedy: str, verify: Literal["full", "size"] = "full") -> UnitRecord:
    """The unit's own record, of whatever generation made it, once its files are found to be what the record says.

    Raises: ShardError naming the file that is missing or damaged.
    """
    *_, path = unit_paths(root, unit)
    record = _read_record(path, remedy)
    if (record.unit, record.overlay) != (unit, 0):
        raise ShardError(f"{path} belongs to another unit; {remedy}")
    _verify_files(root, record, verify, remedy)
    return record


def _verify_files(root: Path, record: UnitRecord, verify: Literal["full", "size", "index"], remedy: str) -> None:
    """The names are made here: one in a record is only ever compared."""
    shard, index, _ = unit_paths(root, record.unit, record.overlay)
    # An overlay that uses none of the unit's latents does not need them.
    for path in (index,) if verify == "index" or (record.overlay and not record.written) else (shard, index):
        expected = record.files.get(path.name)
        if expected is None or not path.is_file():
            raise ShardError(f"{path} is missing{'' if expected else ' from its record'}; {remedy}")
        if (found := path.stat().st_size) != expected["bytes"]:
            raise ShardError(f"{path} has {found} bytes, its record says {expected['bytes']}; {remedy}")
        # An index is small and steers everything: it is always verified whole.
        if (verify == "full" or path is index) and sha256_of(path) != expected["sha256"]:
            raise ShardError(f"{path} is damaged: its SHA-256 is not the one in its record; {remedy}")


def _read_record(path: Path, remedy: str) -> UnitRecord:
    content = read_sealed_json(path, remedy)
    try:
        rejects = tuple(Reject(*reject) for reject in content.pop("rejects"))
        record = UnitRecord(**content, rejects=rejects)
        numbers = (record.unit, record.generation, record.planned, record.written, record.overlay)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a count is none")
        for file in record.files.values():
            int(file["bytes"]), str(file["sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{path} is no commit record ({error}); {remedy}") from error
    return record
