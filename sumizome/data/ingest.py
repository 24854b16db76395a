"""Sources of pictures and captions become one verified manifest, and a list of what was left out and why.

Owns the rows that come of the pictures, what rules make of them, and the tables of rejects and of duplicates.
Invariant: each picture is a row or a reject with one reason, and both follow from the files alone, not from the number
of workers. Reads the user's folders and never writes there. What a source holds is in `sources`, what a picture is in
`images`, what a tag is in `tags`, what rules make of them in `rules`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sumizome.data.csv_table import write_csv
from sumizome.data.duplicates import find_copies
from sumizome.data.images import WHITE, Colour, ImageRejected
from sumizome.data.journal import Journal
from sumizome.data.manifest import ARCHIVE_SCHEMA, SCHEMA, Manifest, write_manifest
from sumizome.data.reject_table import write_rejects
from sumizome.data.rules import TagRewriter, check_size, load_tag_rewriter
from sumizome.data.source_config import DuplicateConfig, SourceConfig, TagLists
from sumizome.data.sources import Entry, ImageTask, Reject, printable, scan_source
from sumizome.data.tags import GENERAL, load_tag_categories
from sumizome.data.verification import Facts, Look, Outcome, inspect_all, read_tags
from sumizome.errors import ConfigError, DataError

__all__ = [
    "COPY_COLUMNS",
    "IngestResult",
    "Progress",
    "available_cores",
    "copies_path",
    "ingest",
    "ingest_to",
    "journal_path",
    "mismatches_path",
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
    mismatches: list["MismatchLine"] = field(default_factory=list)
    """pictures that are not what their records say"""
    decoded: int = 0
    """pictures that were decoded now"""
    found_earlier: int = 0
    """pictures that an earlier run had decoded"""


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
    decode_again: bool = False,
) -> IngestResult:
    """`ingest`, with the manifest and its table of rejects written.

    What decoding finds is kept in a journal beside the manifest, unless `decode_again`: a run that was interrupted goes
    on where it was, and a later one decodes only what is new or changed.
    Raises: ConfigError: also for a manifest inside a source, or in the place of a file that is read. DataError: also
        where no picture was usable, and while another ingest writes the same manifest.
    """
    checked = _check_sources(sources)
    _check_output(manifest_path, checked, tag_lists or TagLists())
    if decode_again:
        journal_path(manifest_path).unlink(missing_ok=True)
    result = ingest(
        sources,
        tag_lists=tag_lists,
        duplicates=duplicates,
        background=background,
        workers=workers,
        progress=progress,
        journal=journal_path(manifest_path),
    )
    _write_result(result, manifest_path)
    return result


def _write_result(result: IngestResult, manifest_path: Path) -> None:
    write_rejects(rejects_path(manifest_path), result.rejects, result.manifest.sources)
    _write_copies(result, copies_path(manifest_path))
    _write_mismatches(result, mismatches_path(manifest_path))
    if not len(result.manifest):
        common = Counter(reject.reason for reject in result.rejects).most_common(1)[0][0]
        first = next(reject for reject in result.rejects if reject.reason == common)
        raise DataError(
            f"expected at least one usable picture, found {len(result.rejects)} rejects and nothing else, most often "
            f"{common} ({first.path}: {first.sentence}): see {rejects_path(manifest_path)}."
        )
    write_manifest(result.manifest, manifest_path)  # last: where it stands, the rest stands


def rejects_path(manifest_path: Path) -> Path:
    """Where the rejects of a manifest are written: `a/manifest.parquet` → `a/manifest.rejects.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.rejects.csv")


def copies_path(manifest_path: Path) -> Path:
    """Where its duplicates are listed: `a/manifest.parquet` → `a/manifest.duplicates.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.duplicates.csv")


def mismatches_path(manifest_path: Path) -> Path:
    """Where pictures are listed that are not what their records say: `a/manifest.mismatches.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.mismatches.csv")


def journal_path(manifest_path: Path) -> Path:
    """Where a manifest's journal of decoding is kept: `a/manifest.parquet` → `a/manifest.decoded`."""
    return manifest_path.with_name(f"{manifest_path.stem}.decoded")


def ingest(
    sources: Sequence[Path | SourceConfig],
    *,
    tag_lists: TagLists | None = None,
    duplicates: DuplicateConfig | None = None,
    background: Colour = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> IngestResult:
    """The manifest of all pictures of the sources (a path is a folder with captions), each decoded whole, once; writes
    nothing but the journal, if there is one.

    `workers` processes decode (default: one a core); a picture that kills its process or takes it more than
    `verification.MAX_CPU_SECONDS` is a reject. With 0 this process decodes, without that protection.
    Raises: ConfigError: no such folder, folders within each other, records that are not there. DataError: no picture in
        any of them, records or tag lists that cannot be read.
    """
    configs, lists = _check_sources(sources), tag_lists or TagLists()
    workers = available_cores() if workers is None else workers
    if workers < 0:
        raise ConfigError(f"workers: expected 0 or more, found {workers}.")
    rewriter = load_tag_rewriter(lists)
    named = load_tag_categories(lists.categories) if lists.categories else {}
    scans = [scan_source(index, config, workers) for index, config in enumerate(configs)]
    total = sum(map(len, scans))
    rejects = [reject for scan in scans for reject in scan.rejects]
    if not total and not rejects:
        folders = ", ".join(str(config.folder) for config in configs)
        raise DataError(f"expected pictures (PNG, JPEG, WebP), found none below {folders}.")
    duplicates = duplicates or DuplicateConfig()
    look = Look(background, duplicates.near != "off")
    rows = _Rows()
    mismatches: list[MismatchLine] = []
    done = decoded = found_earlier = 0
    with Journal(journal, look) as known:
        for entries in (window for scan in scans for window in scan.entries()):
            for entry, outcome, state in _look_at(entries, known, look, workers):
                config, task = configs[entry.task.source], entry.task
                judged = _judge(outcome, config, rewriter)
                if isinstance(judged, Facts) and (mismatch := _mismatch(entry, judged)):
                    mismatches.append(mismatch)
                    if config.rules.mismatch == "reject":
                        judged = (
                            "record_mismatch",
                            f"expected {mismatch.told}, as its record says, found {mismatch.found}.",
                        )
                if isinstance(judged, Facts):
                    rows.add(task, judged)
                else:
                    rejects.append(Reject(task.source, task.path, *judged))
                done, decoded, found_earlier = done + 1, decoded + (state == "new"), found_earlier + (state == "known")
                if progress is not None:
                    progress(done, total)
        known.prune()
    table, copies = _without_copies(rows.table(), duplicates, rejects)
    told = _categories(table, sum((scan.categories for scan in scans), Counter()), rewriter, named)
    is_untagged = pc.equal(pc.list_value_length(table["tags"]), 0)
    roots = tuple(config.folder for config in configs)
    columns = [*SCHEMA.names, *(ARCHIVE_SCHEMA.names if table["archive"].null_count < len(table) else ())]
    return IngestResult(
        manifest=Manifest(table.select(columns), roots, background, {"pictures_found": total}, told),
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
        mismatches=sorted(mismatches),
        decoded=decoded,
        found_earlier=found_earlier,
    )


def _look_at(
    entries: Sequence[Entry], journal: Journal, look: Look, workers: int
) -> Iterator[tuple[Entry, Outcome, Literal["new", "known", "unread"]]]:
    """Each entry in its order, what there is to see, and whether it was looked at now, in an earlier run, or not."""
    known = journal.find([entry.stamp for entry in entries], [entry.task.md5 for entry in entries])
    new = [entry for entry, found in zip(entries, known, strict=True) if found is None and entry.fault is None]
    # The pool starts anew for each window: a second or two in some minutes of decoding.
    outcomes = inspect_all([entry.task for entry in new], look, min(workers, len(new)))
    for entry, found in zip(entries, known, strict=True):
        if entry.fault is not None:
            yield entry, entry.fault, "unread"
        elif found is not None:
            yield entry, _with_tags(entry.task, found), "known"
        else:
            _, outcome = next(outcomes)
            journal.add(entry.stamp, outcome, entry.task.md5)
            yield entry, outcome, "new"


def _with_tags(task: ImageTask, outcome: Outcome) -> Outcome:
    """The outcome of an earlier run with the tags of today."""
    try:
        tags = read_tags(task)
    except ImageRejected as error:
        return error.reason, str(error)
    return outcome._replace(tags=tags) if isinstance(outcome, Facts) else outcome


_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def _mismatch(entry: Entry, facts: Facts) -> "MismatchLine | None":
    """What the record says of the picture, if that is not so; sides count either way up, for EXIF turns pictures."""
    height, width, file_ext = entry.claims
    told, found = [], []
    if height and width and sorted((height, width)) != sorted((facts.height, facts.width)):
        told.append(f"{height}×{width}")
        found.append(f"{facts.height}×{facts.width}")
    if file_ext in _FORMATS and _FORMATS[file_ext] != facts.format:
        told.append(_FORMATS[file_ext])
        found.append(facts.format)
    if not told:
        return None
    return MismatchLine(entry.task.source, entry.task.path, " ".join(told), " ".join(found))


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
        if config.kind == "webdataset" and folder.is_file():
            if folder.suffix.lower() != ".tar":
                raise ConfigError(f"expected a folder of .tar files or one of them, found the file {folder}.")
        elif not folder.is_dir():
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
    for written in (path, rejects_path(path), copies_path(path), mismatches_path(path), journal_path(path)):
        if written.resolve() in [each.resolve() for each in read]:
            raise ConfigError(f"manifest: {written} would take the place of a file that is read: give another name.")


# --- rows -------------------------------------------------------------------------------------------------------------

_BATCH = 8_192


class _Rows:
    """Collects rows in Arrow batches, so that six million pictures are not six million objects."""

    def __init__(self) -> None:
        more = [("captioned", pa.bool_()), ("profile_ignored", pa.bool_()), ("perceptual_hash", pa.uint64())]
        columns = (column for column in SCHEMA if column.name != "id")
        self._schema = pa.schema([*columns, *ARCHIVE_SCHEMA, *more])
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


class MismatchLine(NamedTuple):
    """A picture that is not what its record says, as .mismatches.csv has it."""

    source: int
    path: str
    told: str
    found: str


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
    copies = find_copies(table["sha256"], table["perceptual_hash"].to_numpy(), pixels, config)
    sources, paths = table["source"].combine_chunks(), table["path"].combine_chunks()
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


def _ids(digests: pa.ChunkedArray) -> pa.ChunkedArray:
    """The digests' first 16 digits, made unique by "-2", "-3", … in row order."""
    short = pc.utf8_slice_codeunits(digests, 0, 16)
    values, counts = pc.value_counts(short).flatten() if len(short) else (pa.array([]), pa.array([]))
    repeated = values.filter(pc.greater(counts, 1))
    if not len(repeated):
        return short
    texts = short.to_pylist()
    seen: Counter[str] = Counter()
    for row in np.flatnonzero(pc.is_in(short, value_set=repeated).to_numpy()).tolist():
        digest = texts[row]
        seen[digest] += 1
        if seen[digest] > 1:
            texts[row] = f"{digest}-{seen[digest]}"
    return pa.chunked_array([pa.array(texts, pa.string())])


# --- copies -----------------------------------------------------------------------------------------------------------


COPY_COLUMNS = ("source", "path", "kind", "distance", "kept_source", "kept_path", "dropped")
"""of .duplicates.csv"""


def _write_copies(result: IngestResult, path: Path) -> None:
    roots = [printable(str(root)) for root in result.manifest.sources]
    lines = (
        (roots[source], *middle, roots[kept], path, dropped) for source, *middle, kept, path, dropped in result.copies
    )
    write_csv(path, COPY_COLUMNS, lines)


def _write_mismatches(result: IngestResult, path: Path) -> None:
    roots = [str(root) for root in result.manifest.sources]
    lines = ((roots[source], *texts) for source, *texts in result.mismatches)
    write_csv(path, ["source", "path", "record", "file"], lines)
