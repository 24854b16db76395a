"""Sources of pictures and captions become one verified manifest, and a list of what was left out and why.

Owns the rows that come of the pictures, what rules make of them, and the tables of rejects and of duplicates.
Invariant: each picture is a row or a reject with one reason, and both follow from the files alone, not from the number
of workers. Reads the user's folders and never writes there. What a source holds is in `sources`, what a picture is in
`images`, what a tag is in `tags`, what rules make of them in `rules`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sumizome.data.csv_table import write_csv
from sumizome.data.duplicates import find_copies
from sumizome.data.images import WHITE, Colour, ImageRejected
from sumizome.data.inspection import Facts, Look, Outcome, inspect_all
from sumizome.data.manifest import SCHEMA, Manifest, write_manifest
from sumizome.data.reject_table import write_rejects
from sumizome.data.rules import TagRewriter, check_size, load_tag_rewriter
from sumizome.data.source_config import DuplicateConfig, SourceConfig, TagLists
from sumizome.data.sources import ImageTask, Reject, printable, scan_source
from sumizome.data.tags import GENERAL, load_tag_categories
from sumizome.errors import ConfigError, DataError

__all__ = [
    "COPY_COLUMNS",
    "IngestResult",
    "Progress",
    "available_cores",
    "copies_path",
    "ingest",
    "ingest_to",
    "rejects_path",
]

Progress: TypeAlias = Callable[[int, int], object]
"""called with (pictures done, pictures in all)"""


@dataclass(frozen=True)
class IngestResult:
    """The manifest and what a user should know of how it came about."""

    manifest: Manifest
    rejects: list[Reject]
    """sorted by (source, path)"""
    captions_missing: int
    """pictures kept without tags because nothing names any"""
    captions_empty: int
    """pictures kept without tags because their caption holds none"""
    captions_doubled: int
    """pictures with two captions: `.txt` was read before `.caption`, and both before `metadata.jsonl`"""
    duplicates: int
    """pictures whose bytes another row already has; kept, with ids of their own"""
    profiles_ignored: int
    """pictures whose embedded colour profile could not be used"""
    files_ignored: int
    """files that are neither picture nor caption"""
    repeats: dict[Path, int]
    """kohya folder → its repeats"""
    records_unused: int = 0
    """records of dumps whose pictures are not there"""
    copies: list["CopyLine"] = field(default_factory=list)
    """pictures that are there more than once, and whether they were dropped"""


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ingest_to(
    manifest_path: Path,
    sources: Sequence[Path | SourceConfig],
    *,
    tag_lists: TagLists | None = None,
    duplicates: DuplicateConfig | None = None,
    background: Colour = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """`ingest`, with the manifest and its table of rejects written.

    Raises: ConfigError: also for a manifest inside a source, or in the place of a file that is read. DataError: also
        where no picture was usable.
    """
    checked = _check_sources(sources)
    _check_output(manifest_path, checked, tag_lists or TagLists())
    result = ingest(
        sources,
        tag_lists=tag_lists,
        duplicates=duplicates,
        background=background,
        workers=workers,
        progress=progress,
    )
    write_rejects(rejects_path(manifest_path), result.rejects, result.manifest.sources)
    _write_copies(result, copies_path(manifest_path))
    if not len(result.manifest):
        raise DataError(
            f"expected at least one usable picture, found {len(result.rejects)} rejects and nothing else: "
            f"see {rejects_path(manifest_path)}."
        )
    write_manifest(result.manifest, manifest_path)  # last: where it stands, the rest stands
    return result


def rejects_path(manifest_path: Path) -> Path:
    """Where the rejects of a manifest are written: `a/manifest.parquet` → `a/manifest.rejects.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.rejects.csv")


def copies_path(manifest_path: Path) -> Path:
    """Where its duplicates are listed: `a/manifest.parquet` → `a/manifest.duplicates.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.duplicates.csv")


def ingest(
    sources: Sequence[Path | SourceConfig],
    *,
    tag_lists: TagLists | None = None,
    duplicates: DuplicateConfig | None = None,
    background: Colour = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """The manifest of all pictures of the sources (a path is a folder with captions), each decoded whole, once; writes
    nothing.

    `workers` processes decode (default: one a core); a picture that kills its process or takes it more than
    `inspection.MAX_CPU_SECONDS` is a reject. With 0 this process decodes, without that protection.
    Raises: ConfigError: no such folder, folders within each other, records that are not there. DataError: no picture in
        any of them, records or tag lists that cannot be read.
    """
    configs, lists = _check_sources(sources), tag_lists or TagLists()
    workers = available_cores() if workers is None else workers
    if workers < 0:
        raise ConfigError(f"workers: expected 0 or more, found {workers}.")
    rewriter = load_tag_rewriter(lists)
    named = load_tag_categories(lists.categories) if lists.categories else {}
    scans = [scan_source(index, config) for index, config in enumerate(configs)]
    tasks = [task for scan in scans for task in scan.tasks]
    rejects = [reject for scan in scans for reject in scan.rejects]
    if not tasks and not rejects:
        folders = ", ".join(str(config.folder) for config in configs)
        raise DataError(f"expected pictures (PNG, JPEG, WebP), found none below {folders}.")
    duplicates = duplicates or DuplicateConfig()
    rows = _Rows()
    look = Look(background, duplicates.near != "off")
    for done, (task, outcome) in enumerate(inspect_all(tasks, look, workers), start=1):
        judged = _judge(outcome, configs[task.source], rewriter)
        if isinstance(judged, Facts):
            rows.add(task, judged)
        else:
            rejects.append(Reject(task.source, task.path, *judged))
        if progress is not None:
            progress(done, len(tasks))
    table, copies = _without_copies(rows.table(), duplicates, rejects)
    told = _categories(table, sum((scan.categories for scan in scans), Counter()), rewriter, named)
    is_untagged = pc.equal(pc.list_value_length(table["tags"]), 0)
    roots = tuple(config.folder for config in configs)
    return IngestResult(
        manifest=Manifest(table.select(SCHEMA.names), roots, background, {"pictures_found": len(tasks)}, told),
        rejects=sorted(rejects),
        captions_missing=pc.sum(pc.invert(table["captioned"])).as_py() or 0,
        captions_empty=pc.sum(pc.and_(table["captioned"], is_untagged)).as_py() or 0,
        captions_doubled=sum(scan.captions_doubled for scan in scans),
        duplicates=len(table) - len(table["sha256"].unique()),
        profiles_ignored=pc.sum(table["profile_ignored"]).as_py() or 0,
        files_ignored=sum(scan.files_ignored for scan in scans),
        repeats={scan.root / folder: count for scan in scans for folder, count in sorted(scan.repeats.items())},
        records_unused=sum(scan.records_unused for scan in scans),
        copies=copies,
    )


def _judge(outcome: Outcome, config: SourceConfig, rewriter: TagRewriter) -> Outcome:
    """What decoding found, after the rules of the source and the lists of tags."""
    if not isinstance(outcome, Facts):
        return outcome
    try:
        check_size(outcome.height, outcome.width, config.rules)
        return outcome._replace(tags=rewriter.rewrite(outcome.tags))
    except ImageRejected as error:
        return error.reason, str(error)


def _categories(
    table: pa.Table, told: Counter[tuple[str, str]], rewriter: TagRewriter, named: Mapping[str, str]
) -> dict[str, str]:
    """tag → category, of the table's tags: what a list names, else what most records say, else none (general).

    What is said of an alias is said of its right spelling, too.
    """
    votes: dict[str, Counter[str]] = {}
    for (tag, category), count in told.items():
        votes.setdefault(rewriter.aliases.get(tag, tag), Counter())[category] += count
    vocabulary = pc.unique(pc.list_flatten(table["tags"])).to_pylist()
    found = {}
    for tag in sorted(vocabulary):
        most = min(votes.get(tag, {}).items(), key=lambda vote: (-vote[1], vote[0]), default=(GENERAL, 0))
        category = named.get(tag, most[0])
        if category != GENERAL:
            found[tag] = category
    return found


def _check_sources(sources: Sequence[Path | SourceConfig]) -> list[SourceConfig]:
    """The sources, with their paths resolved."""
    if not sources:
        raise ConfigError("expected at least one folder of pictures, found none.")
    found: list[SourceConfig] = []
    for source in sources:
        config = source if isinstance(source, SourceConfig) else SourceConfig(source)
        folder = config.folder
        if not folder.exists():
            raise ConfigError(f"expected a folder of pictures, found nothing at {folder}.")
        if not folder.is_dir():
            raise ConfigError(f"expected a folder of pictures, found a file at {folder}: name the folder it is in.")
        root = folder.resolve()
        for other in (each.folder for each in found):
            if root.is_relative_to(other) or other.is_relative_to(root):
                raise ConfigError(f"expected folders apart from each other, found {root} and {other}: name the outer.")
        found.append(replace(config, folder=root, records=config.records.resolve() if config.records else None))
    return found


def _check_output(path: Path, sources: Iterable[SourceConfig], lists: TagLists) -> None:
    if path.suffix != ".parquet" or path.is_dir():
        raise ConfigError(f"manifest: expected the path of a .parquet file to write, found {path}.")
    for root in (source.folder for source in sources):
        if path.resolve().is_relative_to(root):
            raise ConfigError(
                f"manifest: expected a place outside the folders of pictures, which are never written to; "
                f"found {path} in {root}."
            )
    read = [source.records for source in sources if source.records] + lists.files()
    for written in (path, rejects_path(path), copies_path(path)):
        if written.resolve() in [each.resolve() for each in read]:
            raise ConfigError(f"manifest: {written} would take the place of a file that is read: give another name.")


# --- rows -------------------------------------------------------------------------------------------------------------

_BATCH = 65_536


class _Rows:
    """Collects rows in Arrow batches, so that six million pictures are not six million objects."""

    def __init__(self) -> None:
        more = [("captioned", pa.bool_()), ("profile_ignored", pa.bool_()), ("perceptual_hash", pa.uint64())]
        self._schema = pa.schema([*(column for column in SCHEMA if column.name != "id"), *more])
        self._columns: dict[str, list[object]] = {name: [] for name in self._schema.names}
        self._batches: list[pa.Table] = []

    def add(self, task: ImageTask, facts: Facts) -> None:
        tagged = {"tags": facts.tags.tags, "kept_tags": facts.tags.kept}
        captioned = {"captioned": task.sidecar is not None or task.text is not None}
        row = task._asdict() | facts._asdict() | tagged | captioned
        for name, values in self._columns.items():
            values.append(row[name])
        if len(self._columns["path"]) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        self._batches.append(pa.table(self._columns, schema=self._schema))
        for values in self._columns.values():
            values.clear()

    def table(self) -> pa.Table:
        """All rows; their ids are given when it is known which of them stay."""
        self._flush()
        return pa.concat_tables(self._batches)


class CopyLine(NamedTuple):
    """A picture that is there more than once, as .duplicates.csv has it."""

    source: int
    path: str
    kind: str
    """exact or near"""
    distance: int
    """bits in which the perceptual hashes differ"""
    kept_source: int
    kept_path: str
    dropped: bool


def _without_copies(table: pa.Table, config: DuplicateConfig, rejects: list[Reject]) -> tuple[pa.Table, list[CopyLine]]:
    """(the rows that stay, with their ids; the copies found). Copies that are dropped are added to `rejects`."""
    pixels = table["height"].to_numpy().astype(np.int64) * table["width"].to_numpy()
    copies = find_copies(table["sha256"].to_pylist(), table["perceptual_hash"].to_numpy(), pixels, config)
    sources, paths = table["source"], table["path"]
    stays = np.ones(len(table), bool)
    lines = []
    for row, kept, kind, distance in copies:
        dropped = "drop" in (config.exact if kind == "exact" else config.near)
        line = CopyLine(
            sources[row].as_py(),
            paths[row].as_py(),
            kind,
            distance,
            sources[kept].as_py(),
            paths[kept].as_py(),
            dropped,
        )
        lines.append(line)
        if dropped:
            stays[row] = False
            where = f"{line.kept_path} of source {line.kept_source}"
            sentence = (
                f"it has the bytes of {where}." if kind == "exact" else f"it looks like {where} ({distance} bits)."
            )
            rejects.append(
                Reject(line.source, line.path, "duplicate" if kind == "exact" else "near_duplicate", sentence)
            )
    kept_rows = table.filter(pa.array(stays))
    return kept_rows.add_column(0, SCHEMA.field("id"), _ids(kept_rows["sha256"])), lines


def _ids(digests: pa.ChunkedArray) -> pa.Array:
    """The digests' first 16 digits, made unique by "-2", "-3", … in row order."""
    short = np.array(digests.to_pylist(), dtype="U16")  # numpy cuts at 16
    order = np.argsort(short, kind="stable")
    is_first = np.r_[True, short[order][1:] != short[order][:-1]][: len(short)]
    starts = np.flatnonzero(is_first)
    place = np.arange(len(short)) - starts[np.cumsum(is_first) - 1] + 1
    ids = short.astype(object)
    for row, number in zip(order[place > 1], place[place > 1], strict=True):
        ids[row] += f"-{number}"
    return pa.array(ids, pa.string())


# --- copies -----------------------------------------------------------------------------------------------------------


COPY_COLUMNS = ("source", "path", "kind", "distance", "kept_source", "kept_path", "dropped")
"""of .duplicates.csv"""


def _write_copies(result: IngestResult, path: Path) -> None:
    roots = [printable(str(root)) for root in result.manifest.sources]
    lines = (
        (roots[source], *middle, roots[kept], path, dropped) for source, *middle, kept, path, dropped in result.copies
    )
    write_csv(path, COPY_COLUMNS, lines)
