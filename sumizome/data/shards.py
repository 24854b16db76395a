"""Latent shards: the files that hold what the VAE made of the pictures, written in units and verified.

Owns the format, the fingerprint and the checks. Knows no VAE and no pixels; `latents` reads what this commits. The
invariant: a unit counts once its commit record, written last, is there; and nothing is read that does not match it.

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

import hashlib
import io
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
    "commit_index",
    "commit_unit",
    "crc32",
    "differences",
    "latent_fault",
    "load_plan",
    "plan_path",
    "tensor_name",
    "unit_paths",
    "verify_own",
    "verify_unit",
    "write_plan",
]

FORMAT_VERSION = 2

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

# ── What made the latents ──


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides a cache's content: caches of one fingerprint hold the same numbers and tags."""

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
    """Which pictures and tags there are. It decides no latent: those of a picture that stays are kept."""
    background: tuple[int, int, int] = (255, 255, 255)
    """What transparent pictures were composited on."""
    precision: str = "float32"
    """Of the VAE's arithmetic."""
    crops: int = 1
    """Random crops stored of each picture."""
    flip: bool = False
    """Each crop is stored mirrored, too."""

    @property
    def digest(self) -> str:
        """SHA-256 hex; each unit carries it. A run goes on only with the same."""
        return _digest(asdict(self))

    @property
    def latents_digest(self) -> str:
        """SHA-256 hex of what decides the latent of a given picture: all but the manifest."""
        return _digest({name: value for name, value in asdict(self).items() if name != "manifest_digest"})

    @property
    def variants(self) -> int:
        """Latents of each picture."""
        return self.crops * (2 if self.flip else 1)


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
    "background": "background",
    "precision": "precision",
    "crops": "crops",
    "flip": "flip",
}


@dataclass(frozen=True)
class CachePlan:
    """What a latent folder is to hold, written before the first unit."""

    fingerprint: Fingerprint
    images: int
    """Rows of the manifest; every one ends up written or rejected."""
    unit_size: int
    """Pictures in a unit; the last has the rest."""
    command: str
    """What to run to make the folder again, or to finish it."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """tag → category, the manifest's; `manifest_digest` covers it, so it cannot be another's."""
    generation: int = 0
    """Counts the manifests that the folder has been prepared for."""
    kept_units: int = 0
    """The units below this are of earlier generations; this one has its own indexes of them."""
    kept_images: int = 0
    """Pictures whose latents those units hold."""

    @property
    def units(self) -> int:
        return self.kept_units - (self.kept_images - self.images) // self.unit_size

    @property
    def new_units(self) -> range:
        """Those that this generation makes."""
        return range(self.kept_units, self.units)

    @property
    def remedy(self) -> str:
        """What mends a unit, as the end of an error's sentence."""
        return f"run `{self.command}` again: whole units are kept, this one is made anew"

    def rows(self, unit: int) -> range:
        """Which of the pictures that no kept unit holds, in the manifest's order, are those of a new unit."""
        first = (unit - self.kept_units) * self.unit_size
        return range(first, min(self.images - self.kept_images, first + self.unit_size))

    def overlay(self, unit: int) -> int:
        """The generation whose index of the unit counts; 0 = the unit's own."""
        return self.generation if unit < self.kept_units else 0


def plan_path(root: Path, *, finished: bool = True) -> Path:
    """Where the plan of the finished latents lies, or of those that are being prepared."""
    return root / ("latents.json" if finished else "latents.next.json")


def write_plan(root: Path, plan: CachePlan, *, finished: bool = True) -> None:
    """Says what the folder holds, or, not `finished`, what is being prepared in it.

    Raises: DataError if the disk cannot be written.
    """
    content = {"format": FORMAT_VERSION, **asdict(plan), "categories": tags_by_category(plan.categories)}
    if not plan.categories:
        del content["categories"]
    _write_json(plan_path(root, finished=finished), content)


def load_plan(root: Path, *, finished: bool = True) -> CachePlan:
    """The plan of the latents at `root`; not `finished`, of those that are being prepared there.

    Raises: ShardError if there is none, it is damaged, or another version wrote it.
    """
    path = plan_path(root, finished=finished)
    if not path.is_file():
        if finished and plan_path(root, finished=False).is_file():
            plan = load_plan(root, finished=False)
            raise ShardError(f"{path} is missing: the latents are not finished; run `{plan.command}` again")
        raise ShardError(f"{root} holds no {path.name}; give a folder that `sumizome prepare` wrote")
    content = _read_json(path, "delete the folder and run `sumizome prepare` again")
    if content.pop("format", None) != FORMAT_VERSION:
        raise ShardError(
            f"{path}: not of format {FORMAT_VERSION}, which this version reads; "
            "run `sumizome prepare` again into another folder"
        )
    try:
        made_by = {key: _as_tuple(value) for key, value in content.pop("fingerprint").items()}
        categories = {tag: name for name, tags in content.pop("categories", {}).items() for tag in tags}
        command = str(content.pop("command"))
        plan = CachePlan(Fingerprint(**made_by), command=command, categories=categories, **content)
        counts = (plan.generation, plan.kept_units, plan.kept_images, plan.images - plan.kept_images)
        if min(plan.images, plan.unit_size) < 1 or min(counts) < 0:
            raise ValueError(f"{plan.images} images in units of {plan.unit_size}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(
            f"{path}: not what `sumizome prepare` writes ({error}); run it again into another folder"
        ) from error
    return plan


def differences(found: Fingerprint, expected: Mapping[str, Any]) -> list[str]:
    """The parts of a fingerprint that are not as expected, in words."""
    return list(dict.fromkeys(_FIELD_NAMES[name] for name, value in expected.items() if getattr(found, name) != value))


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
    shard = _write(shard_path, save(tensors))
    index = _write(index_path, _parquet(pa.table(columns, schema=INDEX_SCHEMA)))
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
    _write_json(record_path, asdict(record))
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
        files={**files, index_path.name: _write(index_path, _parquet(index.cast(INDEX_SCHEMA)))},
        overlay=plan.generation,
    )
    _write_json(record_path, asdict(record))
    return record


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
    content = _read_json(path, remedy)
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


# ── Files ──


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Every file of a latent folder comes through here. Returns what its record says of it."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that carries its own SHA-256, so that a flipped bit in it is seen."""
    text = json.dumps({**content, "digest": _digest(content)}, indent=1, ensure_ascii=False) + "\n"
    _write(path, text.encode())


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
