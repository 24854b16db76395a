"""Sources of pictures and captions become one verified manifest, and a list of what was left out and why.

Owns the pool of processes that decodes every picture exactly once, the rows that come of it, and the table of rejects.
Invariant: each picture is a row or a reject with one reason, and both follow from the files alone, not from the number
of workers. Reads the user's folders and never writes there. What a source holds is in `sources`, what a picture is in
`images`, what a tag is in `tags`, what rules make of them in `rules`.
"""

import csv
import multiprocessing
import os
import signal
import stat
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sumizome.data.images import WHITE, Colour, ImageRejected, read_image
from sumizome.data.manifest import SCHEMA, Manifest, write_atomically, write_manifest
from sumizome.data.rules import TagRewriter, check_size, load_tag_rewriter
from sumizome.data.source_config import SourceConfig, TagLists
from sumizome.data.sources import ImageTask, Reject, printable, scan_source
from sumizome.data.tags import GENERAL, ParsedTags, load_tag_categories, parse_tags
from sumizome.errors import ConfigError, DataError

__all__ = ["IngestResult", "Progress", "available_cores", "ingest", "ingest_to", "rejects_path"]

MAX_CAPTION_BYTES = 2**20
MAX_CPU_SECONDS = 20
"""of one picture; a legal one of 100 megapixels takes about eight"""

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


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ingest_to(
    manifest_path: Path,
    sources: Sequence[Path | SourceConfig],
    *,
    tag_lists: TagLists | None = None,
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
    result = ingest(sources, tag_lists=tag_lists, background=background, workers=workers, progress=progress)
    _write_rejects(result, rejects_path(manifest_path))
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


def ingest(
    sources: Sequence[Path | SourceConfig],
    *,
    tag_lists: TagLists | None = None,
    background: Colour = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """The manifest of all pictures of the sources (a path is a folder with captions), each decoded whole, once; writes
    nothing.

    `workers` processes decode (default: one a core); a picture that kills its process or takes it more than
    `MAX_CPU_SECONDS` is a reject. With 0 this process decodes, without that protection.
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
    rows = _Rows()
    for done, (task, outcome) in enumerate(_inspect_all(tasks, background, workers), start=1):
        judged = _judge(outcome, configs[task.source], rewriter)
        if isinstance(judged, _Facts):
            rows.add(task, judged)
        else:
            rejects.append(Reject(task.source, task.path, *judged))
        if progress is not None:
            progress(done, len(tasks))
    table = rows.table()
    told = _categories(table, sum((scan.categories for scan in scans), Counter()), rewriter, named)
    roots = tuple(config.folder for config in configs)
    return IngestResult(
        manifest=Manifest(table, roots, background, {"pictures_found": len(tasks)}, told),
        rejects=sorted(rejects),
        captions_missing=rows.counter["missing"],
        captions_empty=rows.counter["empty"],
        captions_doubled=sum(scan.captions_doubled for scan in scans),
        duplicates=len(table) - len(table["sha256"].unique()),
        profiles_ignored=rows.counter["profile_ignored"],
        files_ignored=sum(scan.files_ignored for scan in scans),
        repeats={scan.root / folder: count for scan in scans for folder, count in sorted(scan.repeats.items())},
        records_unused=sum(scan.records_unused for scan in scans),
    )


def _judge(outcome: "_Outcome", config: SourceConfig, rewriter: TagRewriter) -> "_Outcome":
    """What decoding found, after the rules of the source and the lists of tags."""
    if not isinstance(outcome, _Facts):
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
    for written in (path, rejects_path(path)):
        if written.resolve() in [each.resolve() for each in read]:
            raise ConfigError(f"manifest: {written} would take the place of a file that is read: give another name.")


# --- one picture ------------------------------------------------------------------------------------------------------


class _Facts(NamedTuple):
    """What a row holds beyond its task."""

    sha256: str
    file_bytes: int
    format: str
    height: int
    width: int
    tags: ParsedTags
    profile_ignored: bool


_Outcome: TypeAlias = _Facts | tuple[str, str]
"""facts, or (reason, sentence)"""


def _inspect(task: ImageTask, background: Colour) -> _Outcome:
    """Decodes one picture and reads its caption. Runs in the workers."""
    try:
        tags = _read_tags(task)
        decoded = read_image(Path(task.root, task.path), background, md5=task.md5)
    except ImageRejected as error:
        return error.reason, str(error)
    height, width = decoded.image.height, decoded.image.width
    return _Facts(decoded.sha256, decoded.file_bytes, decoded.format, height, width, tags, decoded.profile_ignored)


def _read_tags(task: ImageTask) -> ParsedTags:
    text = task.text or ""
    if task.sidecar is not None:
        text = _read_caption(Path(task.root, task.sidecar))
    try:
        return parse_tags(text)
    except DataError as error:
        raise ImageRejected("caption_invalid", f"caption: {error}") from error


def _read_caption(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageRejected("caption_unreadable", f"expected a regular file, found something else at {path.name}.")
        if status.st_size > MAX_CAPTION_BYTES:
            raise ImageRejected("caption_too_large", f"expected at most 1 MB of caption, found {status.st_size} bytes.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImageRejected("caption_not_utf8", f"expected UTF-8 in {path.name}, found {error}.") from error
    except OSError as error:
        raise ImageRejected("caption_unreadable", f"cannot read {path.name}: {error.strerror}.") from error


# --- all pictures -----------------------------------------------------------------------------------------------------

_CHUNK = 16
"""pictures a message to a worker: a small one decodes in less time than the message takes"""

_DIED = ("decoder_died", f"the picture killed the process that decoded it, or took it over {MAX_CPU_SECONDS} s.")


def _inspect_all(tasks: Sequence[ImageTask], background: Colour, workers: int) -> Iterator[tuple[ImageTask, _Outcome]]:
    """Each task with its outcome, in the order given."""
    if workers == 0:
        yield from ((task, _inspect(task, background)) for task in tasks)
        return
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    under_way = 2 * workers
    while chunks:
        done = 0
        try:
            for outcomes in _run_pool(chunks, background, workers, under_way):
                yield from zip(chunks[done], outcomes, strict=True)
                done += 1
        except BrokenProcessPool:
            # The culprit is among those that were under way: they are done again one by one, so that it has a name.
            for chunk in chunks[done : done + under_way]:
                yield from _inspect_singly(chunk, background)
            done += under_way
        chunks = chunks[done:]


def _run_pool(
    chunks: Sequence[Sequence[ImageTask]], background: Colour, workers: int, under_way: int
) -> Iterator[list[_Outcome]]:
    """The outcomes of each chunk in turn. A bounded number is under way, so memory does not grow with the folder."""
    with _pool(min(workers, len(chunks))) as pool:
        waiting: deque[Future[list[_Outcome]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_inspect_chunk, chunk, background))
                if len(waiting) == under_way:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _inspect_singly(chunk: Sequence[ImageTask], background: Colour) -> Iterator[tuple[ImageTask, _Outcome]]:
    """One picture at a time in a process that is replaced when a picture kills it."""
    pool = _pool(1)
    try:
        for task in chunk:
            try:
                yield task, pool.submit(_inspect_chunk, [task], background).result()[0]
            except BrokenProcessPool:
                yield task, _DIED
                pool.shutdown()
                pool = _pool(1)
    finally:
        pool.shutdown()


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork would copy the locked locks of whatever else runs here (torch, Arrow, a progress bar).
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pool.submit(os.getpid).result()  # a worker that cannot even start is a bug to show, not a broken picture
    return pool


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the pool
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def _inspect_chunk(tasks: Sequence[ImageTask], background: Colour) -> list[_Outcome]:
    return [_inspect_timed(task, background) for task in tasks]


def _inspect_timed(task: ImageTask, background: Colour) -> _Outcome:
    """`_inspect`, ended with its process by a signal after `MAX_CPU_SECONDS`.

    Processor time, not the clock's: a slow disk or a busy machine is no fault of the picture.
    """
    if not hasattr(signal, "setitimer"):  # Windows
        return _inspect(task, background)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    outcome = _inspect(task, background)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return outcome


# --- rows -------------------------------------------------------------------------------------------------------------

_BATCH = 65_536


class _Rows:
    """Collects rows in Arrow batches, so that six million pictures are not six million objects."""

    def __init__(self) -> None:
        self.counter: Counter[str] = Counter()
        self._schema = pa.schema([column for column in SCHEMA if column.name != "id"])
        self._columns: dict[str, list[object]] = {name: [] for name in self._schema.names}
        self._batches: list[pa.Table] = []

    def add(self, task: ImageTask, facts: _Facts) -> None:
        captioned = task.sidecar is not None or task.text is not None
        self.counter["missing"] += not captioned
        self.counter["empty"] += captioned and not facts.tags.tags
        self.counter["profile_ignored"] += facts.profile_ignored
        row = task._asdict() | facts._asdict() | {"tags": facts.tags.tags, "kept_tags": facts.tags.kept}
        for name, values in self._columns.items():
            values.append(row[name])
        if len(self._columns["path"]) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        self._batches.append(pa.table(self._columns, schema=self._schema))
        for values in self._columns.values():
            values.clear()

    def table(self) -> pa.Table:
        """All rows, with their ids."""
        self._flush()
        table = pa.concat_tables(self._batches)
        return table.add_column(0, SCHEMA.field("id"), _ids(table["sha256"]))


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


# --- rejects ----------------------------------------------------------------------------------------------------------


def _write_rejects(result: IngestResult, path: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["source", "path", "reason", "sentence"])
            for source, *texts in result.rejects:
                writer.writerow([_cell(text) for text in (str(result.manifest.sources[source]), *texts)])

    write_atomically(path, write)


def _cell(text: str) -> str:
    """A spreadsheet runs a cell that begins like a formula; a leading apostrophe makes it text."""
    return ("'" if text[:1] in tuple("=+-@\t\r") else "") + printable(text)
