"""Folders of pictures and captions become one verified manifest and a list of what was left out, and why.

Owns the folder conventions (same-stem `.txt` / `.caption`, kohya's `N_name/` repeats, `metadata.jsonl`) and the pool of
processes that decodes every picture once. Invariant: each picture found is either a row or a reject with one reason,
and both follow from the files alone, not from the order of a listing or the number of workers. Reads the user's
folders, never writes there. What a picture is stands in `images`, what a tag is in `tags`.
"""

import csv
import json
import multiprocessing
import os
import re
import signal
import stat
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from sumizome.data.images import WHITE, Colour, ImageRejected, read_image
from sumizome.data.manifest import SCHEMA, Manifest, write_atomically, write_manifest
from sumizome.data.tags import ParsedTags, parse_tags
from sumizome.errors import ConfigError, DataError

__all__ = ["IngestResult", "Reject", "available_cores", "ingest", "ingest_to", "rejects_path"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
OTHER_IMAGE_SUFFIXES = frozenset(
    {".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".tga", ".apng", ".jfif"}
)
"""pictures that are reported instead of passed over in silence"""
CAPTION_SUFFIXES = (".txt", ".caption")
"""the first that exists is read"""
METADATA_NAME = "metadata.jsonl"

MAX_CAPTION_BYTES = 2**20
MAX_REPEATS = 1000
"""`1500_name` is a name, not a repeat count: years and serial numbers begin folder names, too"""
MAX_CPU_SECONDS = 20
"""of one picture; a legal one of 100 megapixels takes about eight"""

Progress: TypeAlias = Callable[[int, int], object]
"""called with (pictures done, pictures in all)"""


class Reject(NamedTuple):
    """A file that is not in the manifest."""

    source: int
    path: str
    """posix, relative to its source, printable"""
    reason: str
    """one short word: those of `ImageRejected`, and of this module: `decoder_died`, `bad_path`, `link_outside`,
    `linked_folder`, `zero_repeats`, `caption_unreadable`, `caption_too_large`, `caption_not_utf8`, `caption_invalid`,
    `caption_without_image`, `metadata_invalid`, `metadata_outside`, `metadata_without_image`, `metadata_twice`"""
    sentence: str


@dataclass(frozen=True)
class IngestResult:
    """The manifest and everything that a user should know of how it came about."""

    manifest: Manifest
    rejects: list[Reject]
    """sorted by (source, path)"""
    captions_missing: int
    """pictures kept without tags because nothing names any"""
    captions_empty: int
    """pictures kept without tags because their caption holds none"""
    captions_doubled: int
    """pictures with two captions; `.txt` was read before `.caption`, and both before `metadata.jsonl`"""
    duplicates: int
    """pictures whose bytes another row already has; kept, with ids of their own"""
    profiles_ignored: int
    """pictures whose embedded colour profile could not be used"""
    files_ignored: int
    """files that are neither picture nor caption"""
    repeats: dict[str, int] = field(default_factory=dict)
    """kohya folder → its repeats"""


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ingest_to(
    manifest_path: Path,
    sources: Sequence[Path],
    *,
    background: Colour = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """`ingest`, with the manifest and its table of rejects written; refuses to write into a source.

    Raises: ConfigError, DataError.
    """
    roots = _check_sources(sources)
    _check_output(manifest_path, roots)
    result = ingest(roots, background=background, workers=workers, progress=progress)
    _write_rejects(result.rejects, result.manifest.sources, rejects_path(manifest_path))
    write_manifest(result.manifest, manifest_path)  # last: where it stands, the rest stands
    return result


def rejects_path(manifest_path: Path) -> Path:
    """Where the rejects of a manifest are written: `a/manifest.parquet` → `a/manifest.rejects.csv`."""
    return manifest_path.with_name(f"{manifest_path.stem}.rejects.csv")


def ingest(
    sources: Sequence[Path],
    *,
    background: Colour = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """The manifest of all pictures below the source folders, each decoded whole once; writes nothing.

    `workers` processes decode (default: one a core); a picture that kills its process or takes more than
    `MAX_CPU_SECONDS` is a reject. 0 decodes in this process, without that protection.
    Raises: ConfigError: no such folder, folders within each other. DataError: no picture in any of them.
    """
    roots = _check_sources(sources)
    workers = available_cores() if workers is None else workers
    if workers < 0:
        raise ConfigError(f"workers: expected 0 or more, found {workers}.")
    scans = [_scan(index, root) for index, root in enumerate(roots)]
    tasks = [task for scan in scans for task in scan.tasks]
    rejects = [reject for scan in scans for reject in scan.rejects]
    if not tasks and not rejects:
        raise DataError(f"expected pictures (PNG, JPEG, WebP), found none below {', '.join(map(str, roots))}.")
    rows = _Rows()
    for done, (task, outcome) in enumerate(_inspect_all(tasks, background, workers), start=1):
        if isinstance(outcome, _Facts):
            rows.add(task, outcome)
        else:
            rejects.append(Reject(task.source, _printable(task.path), *outcome))
        if progress is not None:
            progress(done, len(tasks))
    table = rows.table()
    return IngestResult(
        manifest=Manifest(table, tuple(roots), background),
        rejects=sorted(rejects),
        captions_missing=rows.counter["missing"],
        captions_empty=rows.counter["empty"],
        captions_doubled=sum(scan.captions_doubled for scan in scans),
        duplicates=len(table) - len(table["sha256"].unique()),
        profiles_ignored=rows.counter["profile_ignored"],
        files_ignored=sum(scan.files_ignored for scan in scans),
        repeats={name: count for scan in scans for name, count in scan.repeats.items()},
    )


# --- what may be read and written -----------------------------------------------------------------------------------


def _check_sources(sources: Sequence[Path]) -> list[Path]:
    if not sources:
        raise ConfigError("expected at least one folder of pictures, found none.")
    roots = []
    for source in sources:
        if not source.exists():
            raise ConfigError(f"expected a folder of pictures, found nothing at {source}.")
        if not source.is_dir():
            raise ConfigError(f"expected a folder of pictures, found a file at {source}: name the folder it is in.")
        roots.append(source.resolve())
    for index, root in enumerate(roots):
        for other in roots[:index] + roots[index + 1 :]:
            if root.is_relative_to(other):
                raise ConfigError(
                    f"expected folders apart from each other, found {root} in {other}: name the outer one."
                )
    return roots


def _check_output(path: Path, roots: Sequence[Path]) -> None:
    if path.suffix != ".parquet" or path.is_dir():
        raise ConfigError(f"manifest: expected the path of a .parquet file to write, found {path}.")
    for root in roots:
        if path.resolve().is_relative_to(root):
            raise ConfigError(
                f"manifest: expected a place outside the folders of pictures, which are never written to, "
                f"found {path} in {root}."
            )


# --- what a folder holds ----------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """One picture to decode and its caption: from a sidecar file, from metadata, or none."""

    source: int
    root: str
    path: str
    repeats: int
    sidecar: str | None
    text: str | None


@dataclass
class _Scan:
    """What one source holds."""

    tasks: list[_Task] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    captions_doubled: int = 0
    files_ignored: int = 0
    repeats: dict[str, int] = field(default_factory=dict)


def _scan(source: int, root: Path) -> _Scan:
    """The pictures below `root` in the order of their paths, each with its caption's place."""
    scan = _Scan()

    def reject(path: str, reason: str, sentence: str) -> None:
        scan.rejects.append(Reject(source, _printable(path), reason, sentence))

    files = _list_files(root, reject)
    texts = _read_metadata(root, files, reject)
    stems = {_stem(path) for path in files if _suffix(path) in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES}
    for path in sorted(files):
        suffix = _suffix(path)
        if suffix in IMAGE_SUFFIXES:
            try:
                scan.tasks.append(_build_task(source, root, path, files, texts, scan))
            except ImageRejected as error:
                reject(path, error.reason, str(error))
        elif suffix in OTHER_IMAGE_SUFFIXES:
            reject(path, "format_not_supported", f"expected PNG, JPEG or WebP, found {suffix}: convert it.")
        elif suffix in CAPTION_SUFFIXES:
            if _stem(path) not in stems:
                reject(path, "caption_without_image", "expected a picture of the same name beside this caption.")
        elif _name(path) != METADATA_NAME:
            scan.files_ignored += 1
    return scan


def _build_task(source: int, root: Path, path: str, files: set[str], texts: Mapping[str, str], scan: _Scan) -> _Task:
    if path != _printable(path) or "\\" in path:
        raise ImageRejected(
            "bad_path", "expected a name in UTF-8 without control characters or backslashes: rename it."
        )
    _check_link(root, path)
    sidecars = [path_ for suffix in CAPTION_SUFFIXES if (path_ := _stem(path) + suffix) in files]
    for sidecar in sidecars[:1]:
        _check_link(root, sidecar)
    repeats = _repeats(path, scan.repeats)
    if repeats == 0:
        raise ImageRejected("zero_repeats", "the folder's name asks for 0 repeats.")
    text = texts.get(path)
    scan.captions_doubled += len(sidecars) + (text is not None) > 1
    return _Task(source, str(root), path, repeats, sidecars[0] if sidecars else None, text)


def _list_files(root: Path, reject: Callable[[str, str, str], None]) -> set[str]:
    """The relative posix paths of all files below `root`; folders behind links are reported, not entered."""
    files: set[str] = set()

    def unreadable(error: OSError) -> None:
        reject(_relative(root, error.filename), "unreadable", f"cannot list this folder: {error.strerror}.")

    for folder, names, file_names in os.walk(root, onerror=unreadable):
        for name in names:
            if (path := Path(folder, name)).is_symlink():
                reject(_relative(root, path), "linked_folder", "folders behind symbolic links are not entered.")
        files.update(_relative(root, Path(folder, name)) for name in file_names)
    return files


def _relative(root: Path, path: str | Path) -> str:
    return Path(path).relative_to(root).as_posix()


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder + slash + os.path.splitext(name)[0]  # noqa: PTH122 — a Path a file would be most of the scan


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()  # noqa: PTH122


def _check_link(root: Path, path: str) -> None:
    """A link may lead to a file within its source only: captions end up in models and reports."""
    full = root / path
    if full.is_symlink() and not full.resolve().is_relative_to(root):
        raise ImageRejected("link_outside", f"expected a file in its source, found {_name(path)} linked out of it.")


_REPEATS = re.compile(r"(\d+)_.+")


def _repeats(path: str, seen: dict[str, int]) -> int:
    """The repeats that the nearest `N_name` folder below the source asks for; without one, 1."""
    folders = path.split("/")[:-1]
    for depth in range(len(folders), 0, -1):
        match = _REPEATS.fullmatch(folders[depth - 1])
        if match and len(match[1]) <= 4 and int(match[1]) <= MAX_REPEATS:
            return seen.setdefault("/".join(folders[:depth]), int(match[1]))
    return 1


# --- metadata.jsonl ---------------------------------------------------------------------------------------------------


def _read_metadata(root: Path, files: set[str], reject: Callable[[str, str, str], None]) -> dict[str, str]:
    """picture → caption, from every `metadata.jsonl`; its `file_name`s are relative to the folder it is in."""
    texts: dict[str, str] = {}
    for metadata in sorted(path for path in files if _name(path) == METADATA_NAME):
        try:
            _check_link(root, metadata)
            for number, line in _lines(root / metadata):
                where = f"{metadata}:{number}"
                try:
                    image, text = _parse_metadata(line, metadata, files)
                    if image in texts:
                        raise ImageRejected("metadata_twice", f"expected one line for {image}, found a second.")
                    texts[image] = text
                except ImageRejected as error:
                    reject(where, error.reason, str(error))
        except ImageRejected as error:
            reject(metadata, error.reason, str(error))
        except (OSError, UnicodeDecodeError) as error:
            reject(
                metadata, "metadata_invalid", f"expected lines of JSON in UTF-8, found the file unreadable: {error}."
            )
    return texts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_CAPTION_BYTES), ""), start=1):
            if line.strip():
                yield number, line


def _parse_metadata(line: str, metadata: str, files: set[str]) -> tuple[str, str]:
    try:
        record = json.loads(line)
        name, text = record["file_name"], record["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageRejected("metadata_invalid", "expected JSON with file_name and text, found another line.") from error
    if not isinstance(name, str) or not isinstance(text, str):
        raise ImageRejected("metadata_invalid", "expected file_name and text as strings.")
    path = os.path.normpath(os.path.join(os.path.dirname(metadata), name))  # noqa: PTH118, PTH120 — text, not a file
    if os.path.isabs(name) or path.startswith(".."):  # noqa: PTH117
        raise ImageRejected("metadata_outside", f"expected a file_name in its folder, found {name[:200]!r}.")
    if path not in files or _suffix(path) not in IMAGE_SUFFIXES:
        raise ImageRejected("metadata_without_image", f"expected a picture at {name[:200]!r}, found none.")
    return path, text


# --- one picture ------------------------------------------------------------------------------------------------------


class _Facts(NamedTuple):
    """What a row holds beyond its task."""

    sha256: str
    file_bytes: int
    format: str
    height: int
    width: int
    tags: ParsedTags
    caption_missing: bool
    profile_ignored: bool


_Outcome: TypeAlias = _Facts | tuple[str, str]
"""facts, or (reason, sentence)"""


def _inspect(task: _Task, background: Colour) -> _Outcome:
    """Decodes one picture and reads its caption. Runs in the workers."""
    try:
        tags = _read_tags(task)
        decoded = read_image(Path(task.root, task.path), background)
    except ImageRejected as error:
        return error.reason, str(error)
    return _Facts(
        decoded.sha256,
        decoded.file_bytes,
        decoded.format,
        decoded.image.height,
        decoded.image.width,
        tags,
        caption_missing=task.sidecar is None and task.text is None,
        profile_ignored=decoded.profile_ignored,
    )


def _read_tags(task: _Task) -> ParsedTags:
    text = task.text or ""
    if task.sidecar is not None:
        text = _read_caption(Path(task.root, task.sidecar))
    try:
        return parse_tags(text)
    except DataError as error:
        raise ImageRejected("caption_invalid", str(error)) from error


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
"""pictures a message to a worker: 64-px pictures take a millisecond each, as long as the message itself"""

_DIED = (
    "decoder_died",
    f"the picture killed the process that decoded it, or took it more than {MAX_CPU_SECONDS} s.",
)


def _inspect_all(tasks: Sequence[_Task], background: Colour, workers: int) -> Iterator[tuple[_Task, _Outcome]]:
    """Each task with its outcome, in the order given."""
    if workers == 0:
        yield from ((task, _inspect(task, background)) for task in tasks)
        return
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    start = 0
    while start < len(chunks):
        try:
            for outcomes in _run_pool(chunks[start:], background, workers):
                yield from zip(chunks[start], outcomes, strict=True)
                start += 1
        except BrokenProcessPool:
            yield from _inspect_singly(chunks[start], background)
            start += 1


def _run_pool(chunks: Sequence[Sequence[_Task]], background: Colour, workers: int) -> Iterator[list[_Outcome]]:
    """The outcomes of each chunk in turn; at most four chunks a worker are under way, whatever the folder's size."""
    with _pool(min(workers, len(chunks))) as pool:
        waiting: deque[Future[list[_Outcome]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_inspect_chunk, chunk, background))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _inspect_singly(chunk: Sequence[_Task], background: Colour) -> Iterator[tuple[_Task, _Outcome]]:
    """The same, one picture at a time, so that the one that kills its process is known by name."""
    pool = _pool(1)
    try:
        for task in chunk:
            try:
                yield task, pool.submit(_inspect_chunk, [task], background).result()[0]
            except BrokenProcessPool:
                pool.shutdown()
                pool = _pool(1)
                yield task, _DIED
    finally:
        pool.shutdown()


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork would copy the threads' locks of whatever else runs here (torch, Arrow, a progress bar).
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pool.submit(os.getpid).result()  # a worker that cannot start at all is a bug to show, not a broken picture
    return pool


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the pool
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def _inspect_chunk(tasks: Sequence[_Task], background: Colour) -> list[_Outcome]:
    return [_inspect_timed(task, background) for task in tasks]


def _inspect_timed(task: _Task, background: Colour) -> _Outcome:
    # CPU time, not wall time: a slow disk or a busy machine is no fault of the picture. The signal ends the process.
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    outcome = _inspect(task, background)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0)
    return outcome


# --- rows -------------------------------------------------------------------------------------------------------------


class _Rows:
    """Collects rows in Arrow batches, so that six million pictures are not six million objects."""

    def __init__(self) -> None:
        self.counter: Counter[str] = Counter()
        self._columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names if name != "id"}
        self._batches: list[pa.Table] = []

    def add(self, task: _Task, facts: _Facts) -> None:
        self.counter["missing"] += facts.caption_missing
        self.counter["empty"] += not facts.caption_missing and not facts.tags.tags
        self.counter["profile_ignored"] += facts.profile_ignored
        values = {
            "source": task.source,
            "path": task.path,
            "sha256": facts.sha256,
            "file_bytes": facts.file_bytes,
            "format": facts.format,
            "height": facts.height,
            "width": facts.width,
            "tags": facts.tags.tags,
            "kept_tags": facts.tags.kept,
            "repeats": task.repeats,
        }
        for name, value in values.items():
            self._columns[name].append(value)
        if len(self._columns["path"]) == 4096:
            self._flush()

    def _flush(self) -> None:
        schema = pa.schema([column for column in SCHEMA if column.name != "id"])
        self._batches.append(pa.table(self._columns, schema=schema))
        for values in self._columns.values():
            values.clear()

    def table(self) -> pa.Table:
        """All rows, with their ids."""
        self._flush()
        table = pa.concat_tables(self._batches)
        return table.add_column(0, SCHEMA.field("id"), _ids(table["sha256"])).combine_chunks()


def _ids(digests: pa.ChunkedArray) -> pa.Array:
    """The digests' first 16 digits, made unique by "-2", "-3", … in row order."""
    short = np.array(digests.to_pylist(), dtype="S16")  # numpy cuts at 16
    order = np.argsort(short, kind="stable")
    ordered = short[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(short) else np.empty(0, int)
    place = np.empty(len(short), np.int64)
    place[order] = np.arange(len(short)) - np.repeat(starts, np.diff(np.r_[starts, len(short)])) + 1
    ids = short.astype("U16").astype(object)
    for row in np.flatnonzero(place > 1):
        ids[row] = f"{ids[row]}-{place[row]}"
    return pa.array(ids, pa.string())


# --- rejects ----------------------------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """The text with control characters, bidirectional marks and undecodable bytes escaped: names are untrusted."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def _write_rejects(rejects: Sequence[Reject], sources: Sequence[Path], path: Path) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["source", "path", "reason", "sentence"])
            for reject in rejects:
                row = (str(sources[reject.source]), reject.path, reject.reason, reject.sentence)
                writer.writerow([_cell(text) for text in row])

    write_atomically(path, write)


def _cell(text: str) -> str:
    """A spreadsheet runs a cell that begins like a formula; a leading apostrophe makes it text."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else _printable(text)
