"""Sources of pictures and captions become one verified manifest, and a list of what was left out and why.

Owns the way from a source to rows and rejects. Invariant: each picture is a row or a reject with one reason, and both
follow from the files alone, not from the number of workers. Reads the user's folders and never writes there. What a
source holds is in `sources`, what a picture is in `images`, what a tag is in `tags`, what rules make of them in
`rules`; what becomes of rows in `ingest_rows`, of the rest in `ingest_tables`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import WHITE, Colour
from sumizome.data.ingest_rows import Rows, manifest_columns, without_copies
from sumizome.data.ingest_tables import (
    CopyLine,
    MismatchLine,
    copies_path,
    journal_path,
    mismatches_path,
    rejects_path,
    write_copies,
    write_mismatches,
)
from sumizome.data.journal import Journal
from sumizome.data.listing import printable
from sumizome.data.manifest import Manifest, is_other_parquet, write_manifest
from sumizome.data.reject_table import write_rejects
from sumizome.data.rules import TagRewriter, check_size, load_tag_rewriter
from sumizome.data.source_config import DuplicateConfig, SourceConfig, TagLists
from sumizome.data.sources import SourceScan, scan_source
from sumizome.data.tags import GENERAL, load_tag_categories
from sumizome.data.tasks import Entry, ImageTask, Reject
from sumizome.data.verification import Facts, Look, Outcome, inspect_all, read_tags
from sumizome.errors import ConfigError, DataError

__all__ = [
    "IngestResult",
    "Progress",
    "available_cores",
    "ingest",
    "ingest_to",
]

Progress: TypeAlias = Callable[[int, int], object]
"""called with (pictures done, pictures in all); while they are being listed with (pictures found, 0)"""


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
    copies: list[CopyLine] = field(default_factory=list)
    """pictures that are there more than once, and whether they were dropped"""
    mismatches: list[MismatchLine] = field(default_factory=list)
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
    result = ingest(
        sources,
        tag_lists=tag_lists,
        duplicates=duplicates,
        background=background,
        workers=workers,
        progress=progress,
        journal=journal_path(manifest_path),
        decode_again=decode_again,
    )
    _write_result(result, manifest_path)
    return result


def _write_result(result: IngestResult, manifest_path: Path) -> None:
    write_rejects(rejects_path(manifest_path), result.rejects, result.manifest.sources)
    write_copies(copies_path(manifest_path), result.copies, result.manifest.sources)
    write_mismatches(mismatches_path(manifest_path), result.mismatches, result.manifest.sources)
    if not len(result.manifest):
        common = Counter(reject.reason for reject in result.rejects).most_common(1)[0][0]
        first = next(reject for reject in result.rejects if reject.reason == common)
        raise DataError(
            f"expected at least one usable picture, found {len(result.rejects)} rejects and nothing else, most often "
            f"{common} ({first.path}: {first.sentence}): see {rejects_path(manifest_path)}."
        )
    write_manifest(result.manifest, manifest_path)  # last: where it stands, the rest stands


def ingest(
    sources: Sequence[Path | SourceConfig],
    *,
    tag_lists: TagLists | None = None,
    duplicates: DuplicateConfig | None = None,
    background: Colour = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
    decode_again: bool = False,
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
    scans = _scan(configs, workers, progress)
    duplicates = duplicates or DuplicateConfig()
    look = Look(background, duplicates.near != "off")
    found = _Sorted(configs, rewriter, [reject for scan in scans for reject in scan.rejects])
    total = sum(map(len, scans))
    with Journal(journal, look, anew=decode_again) as known:
        for entries in (window for scan in scans for window in scan.entries()):
            for entry, outcome, state in _look_at(entries, known, look, workers):
                found.add(entry, outcome, state)
                if progress is not None:
                    progress(found.states.total(), total)
        known.prune()
    table, copies = without_copies(found.rows.table(), duplicates, found.rejects)
    told = _categories(table, sum((scan.categories for scan in scans), Counter()), rewriter, named)
    is_untagged = pc.equal(pc.list_value_length(table["tags"]), 0)
    roots = tuple(config.folder for config in configs)
    return IngestResult(
        manifest=Manifest(table.select(manifest_columns(table)), roots, background, {"pictures_found": total}, told),
        rejects=sorted(found.rejects),
        captions_missing=pc.sum(pc.invert(table["captioned"])).as_py() or 0,
        captions_empty=pc.sum(pc.and_(table["captioned"], is_untagged)).as_py() or 0,
        captions_doubled=sum(scan.captions_doubled for scan in scans),
        duplicates=len(table) - len(table["sha256"].unique()),
        profiles_ignored=pc.sum(table["profile_ignored"]).as_py() or 0,
        files_ignored=sum(scan.files_ignored for scan in scans),
        repeats={scan.root / folder: count for scan in scans for folder, count in sorted(scan.repeats.items())},
        records_unused=sum(scan.records_unused for scan in scans),
        copies=copies,
        mismatches=sorted(found.mismatches),
        decoded=found.states["new"],
        found_earlier=found.states["known"],
    )


def _scan(configs: Sequence[SourceConfig], workers: int, progress: Progress | None) -> list[SourceScan]:
    """What each source holds.

    Raises: DataError if that is nothing at all.
    """
    scans: list[SourceScan] = []
    for index, config in enumerate(configs):
        before = sum(map(len, scans))

        def told(count: int, before: int = before) -> None:
            if progress is not None:
                progress(before + count, 0)

        scans.append(scan_source(index, config, workers, told))
    if not any(len(scan) or scan.rejects for scan in scans):
        folders = ", ".join(str(config.folder) for config in configs)
        raise DataError(f"expected pictures (PNG, JPEG, WebP), found none below {folders}.")
    return scans


State: TypeAlias = Literal["new", "known", "unread"]
"""Of an entry: looked at now, in an earlier run, or not at all."""


class _Sorted:
    """Pictures as they come: rows, rejects, and those that are not what their records say."""

    def __init__(self, configs: Sequence[SourceConfig], rewriter: TagRewriter, rejects: list[Reject]) -> None:
        self._configs, self._rewriter = configs, rewriter
        self.rows, self.rejects = Rows(), rejects
        self.mismatches: list[MismatchLine] = []
        self.states: Counter[State] = Counter()

    def add(self, entry: Entry, outcome: Outcome, state: State) -> None:
        self.states[state] += 1
        config = self._configs[entry.task.source]
        judged = _judge(outcome, config, self._rewriter)
        if isinstance(judged, Facts) and (mismatch := _mismatch(entry, judged)):
            self.mismatches.append(mismatch)
            if config.rules.mismatch == "reject":
                judged = (
                    "record_mismatch",
                    f"expected {mismatch.told}, as its record says, found {mismatch.found}.",
                )
        if isinstance(judged, Facts):
            self.rows.add(entry, judged)
        else:
            self.rejects.append(Reject(entry.task.source, entry.task.path, *judged))


def _look_at(
    entries: Sequence[Entry], journal: Journal, look: Look, workers: int
) -> Iterator[tuple[Entry, Outcome, State]]:
    """Each entry in its order, and what there is to see."""
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


def _mismatch(entry: Entry, facts: Facts) -> MismatchLine | None:
    """What the record says of the picture, if that is not so; sides count either way up, for EXIF turns pictures."""
    height, width, file_ext, *_ = entry.claims
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
        if not _is_utf8(root):
            raise ConfigError(f"expected a folder whose path is UTF-8, found {printable(str(root))}: rename it.")
        for other in (each.folder for each in found):
            if root.is_relative_to(other) or other.is_relative_to(root):
                raise ConfigError(f"expected folders apart from each other, found {root} and {other}: name the outer.")
        found.append(replace(config, folder=root, records=config.records.resolve() if config.records else None))
    return found


def _is_utf8(path: Path) -> bool:
    """False for a path with bytes that are no UTF-8, which no manifest, table or terminal could show."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    if path.is_file() and is_other_parquet(path):
        raise ConfigError(f"manifest: {path} is a table that ingest did not write: give another name.")
