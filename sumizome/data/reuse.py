"""What a latent folder already holds of a manifest: which latents stay, and where they lie.

Owns the comparison of pictures and the indexes of a new generation; encodes nothing and deletes nothing that a finished
generation needs. The invariant: a latent is kept only if its picture's file, settings and VAE are the same, so that a
cache that was updated holds, picture by picture, what a fresh one would.
"""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from sumizome.data.latent_plan import CachePlan, Fingerprint
from sumizome.data.manifest import ManifestRows
from sumizome.data.shards import INDEX_SCHEMA, UnitRecord, commit_index, unit_paths, verify_own, verify_unit
from sumizome.errors import ShardError

__all__ = ["Stock", "Waste", "commit_kept", "find_stock", "own_units", "remove_unused"]


@dataclass(frozen=True, eq=False)
class Stock:
    """The pictures of a manifest whose latents are there, in units of earlier generations."""

    records: dict[int, UnitRecord]
    """The own records of the units that are whole and of the same latents."""
    place: Int[np.ndarray, " m"]
    """Row of the manifest; each once."""
    unit: Int[np.ndarray, " m"]
    entry: Int[np.ndarray, " m"]
    """Which picture of the unit."""
    damaged: tuple[str, ...] = ()
    """Units that are not, in words."""

    def missing(self, rows: int) -> Int[np.ndarray, " n"]:
        """The rows of the manifest, in their order, that have no latent."""
        wanted = np.ones(rows, bool)
        wanted[self.place] = False
        return np.flatnonzero(wanted)

    @property
    def end(self) -> int:
        """One more than the last unit in use."""
        return int(self.unit.max()) + 1 if len(self.unit) else 0

    def below(self, end: int) -> "Stock":
        """What the units below `end` hold of it."""
        here = self.unit < end
        return replace(self, place=self.place[here], unit=self.unit[here], entry=self.entry[here])


def own_units(root: Path) -> list[int]:
    """The units that have a record of their own, rising."""
    names = (re.fullmatch(r"unit-(\d{5,9})\.json", path.name) for path in (root / "units").glob("unit-*.json"))
    return sorted(int(name[1]) for name in names if name)


def find_stock(
    root: Path, fingerprint: Fingerprint, manifest: ManifestRows, units: Iterable[int], verify: Literal["full", "size"]
) -> Stock:
    """What these units hold of the manifest's pictures. A picture that several hold counts in the first."""

    def look(unit: int) -> tuple[UnitRecord, pa.Table] | str | None:
        try:
            record = verify_own(root, unit, "its pictures are encoded anew", verify)
            if record.latents != fingerprint.latents_digest:
                return None
            _, path, _ = unit_paths(root, unit)
            return record, pq.read_table(path, columns=["id", "sha256", "variant"])
        except (ShardError, pa.ArrowException) as error:
            return str(error).split(";")[0]

    units = list(units)
    with ThreadPoolExecutor() as pool:
        found = list(zip(units, pool.map(look, units), strict=True))
    whole = {unit: each for unit, each in found if isinstance(each, tuple)}
    tables = [table.filter(pc.equal(table["variant"], 0)) for _, table in whole.values()]
    damaged = tuple(each for _, each in found if isinstance(each, str))
    records = {unit: record for unit, (record, _) in whole.items()}
    if not tables:
        nothing = np.zeros(0, np.int64)
        return Stock(records, nothing, nothing, nothing, damaged)
    held = pa.concat_tables(tables)
    place, same = _match(held, pa.concat_tables(manifest.parts(["id", "sha256"])))
    counts = [len(table) for table in tables]
    unit = np.repeat(np.fromiter(whole, np.int64), counts)
    entry = np.concatenate([np.arange(count) for count in counts])
    place, unit, entry = place[same], unit[same], entry[same]
    _, first = np.unique(place, return_index=True)  # the units rise, so the first is in the lowest
    first.sort()
    return Stock(records, place[first], unit[first], entry[first], damaged)


def _match(held: pa.Table, wanted: pa.Table) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """(row of `wanted`, whether there is one) of each picture held: the same id and the same bytes."""
    at = pc.index_in(held["id"], value_set=pc.cast(wanted["id"], pa.string()).combine_chunks())
    same = pc.equal(wanted["sha256"].take(at), held["sha256"])
    place = pc.fill_null(at, -1).to_numpy().astype(np.int64)
    return place, np.asarray(pc.fill_null(same, False).to_numpy(zero_copy_only=False), bool)


def commit_kept(root: Path, plan: CachePlan, stock: Stock, manifest: ManifestRows) -> None:
    """Writes the generation's own index of each unit that it goes on with: its pictures, as the manifest has them now.

    Those that are there and whole stay. Raises: DataError if the disk cannot be written.
    """

    def commit(unit: int) -> None:
        try:
            verify_unit(root, plan, unit, "size")
        except ShardError:
            here = np.flatnonzero(stock.unit == unit) if unit in stock.records else np.zeros(0, np.int64)
            index = _index(root, plan, unit, stock.entry[here], stock.place[here], manifest)
            commit_index(root, plan, unit, index, stock.records.get(unit))

    with ThreadPoolExecutor() as pool:
        list(pool.map(commit, range(plan.kept_units)))


def _index(
    root: Path,
    plan: CachePlan,
    unit: int,
    entry: Int[np.ndarray, " n"],
    place: Int[np.ndarray, " n"],
    manifest: ManifestRows,
) -> pa.Table:
    if len(entry) == 0:
        return INDEX_SCHEMA.empty_table()
    variants = plan.fingerprint.variants
    order = np.argsort(entry)
    rows = (entry[order, None] * variants + np.arange(variants)).reshape(-1)
    _, path, _ = unit_paths(root, unit)
    index = pq.read_table(path, schema=INDEX_SCHEMA).take(pa.array(rows))
    now = manifest.take(np.repeat(place[order], variants), ["tags", "kept_tags", "repeats"])
    for name in ("tags", "kept_tags", "repeats"):
        index = index.set_column(INDEX_SCHEMA.get_field_index(name), INDEX_SCHEMA.field(name), now[name])
    return index


# ── After the generation is finished ──


@dataclass(frozen=True)
class Waste:
    """What lies in the folder and is not used."""

    latents: int = 0
    bytes: int = 0


def remove_unused(root: Path, plan: CachePlan) -> Waste:
    """Removes what no picture of the finished plan needs, and says what is left of latents in units that it needs."""
    for path in _leftovers(root, plan):
        path.unlink(missing_ok=True)
    unused = size = 0
    for unit in range(plan.kept_units):
        shard, *_ = unit_paths(root, unit)
        if shard.exists():
            own = verify_own(root, unit, plan.remedy, "size")
            live = verify_unit(root, plan, unit, "size").written
            unused += (own.written - live) * plan.fingerprint.variants
            size += int(shard.stat().st_size * (1 - live / max(1, own.written)))
    return Waste(unused, size)


def _leftovers(root: Path, plan: CachePlan) -> Iterator[Path]:
    """Records before what they tell of, so that a kill leaves no record of what is gone."""
    units = root / "units"
    yield from (*root.glob(".*.tmp"), *units.glob(".*.tmp"))
    used = {unit for unit in range(plan.kept_units) if verify_unit(root, plan, unit, "size").written}
    for path in sorted(units.glob("unit-*")):
        name = re.fullmatch(r"unit-(\d{5,9})(?:\.g(\d{1,9}))?\.(?:safetensors|parquet|json)", path.name)
        if name is not None:
            unit, overlay = int(name[1]), int(name[2] or 0)
            is_own = not overlay and (unit in used or unit in plan.new_units)
            if not (is_own or (overlay and unit < plan.units and overlay == plan.overlay(unit))):
                yield path
