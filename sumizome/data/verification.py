"""Every picture looked at once, in processes that a picture may kill: decoded whole, its caption read.

Owns the pool, its limits (time, memory and files of a worker) and the names of the culprits. Invariant: the outcomes
come in the order of the tasks and do not depend on the number of workers; a picture that kills a worker costs no other.
"""

import multiprocessing
import os
import signal
import stat
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeAlias

from PIL import Image

from sumizome.data.duplicates import FLAT, perceptual_hash
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import Colour, read_image
from sumizome.data.tags import ParsedTags, parse_tags
from sumizome.data.tasks import MAX_CAPTION_BYTES, ImageTask
from sumizome.errors import DataError
from sumizome.interrupts import ignore_interrupts, interrupts_held

__all__ = ["Facts", "Look", "Outcome", "inspect_all", "read_tags"]

MAX_CPU_SECONDS = 20
"""of one picture; a legal one of 100 megapixels takes about eight"""
MAX_SECONDS = 120
"""by the clock: a slow disk or a busy machine is no fault of the picture, but a read that never ends is an end"""
MAX_MEMORY_BYTES = 3 * 2**30
"""of address space that a worker may take beyond what it started with; a legal picture of 100 megapixels takes half"""
MAX_OPEN_FILES = 64
"""beyond those that a worker starts with"""


# --- one picture ------------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What a row holds beyond its task."""

    sha256: str
    file_bytes: int
    format: str
    height: int
    width: int
    tags: ParsedTags
    profile_ignored: bool
    perceptual_hash: int = FLAT
    """where it was asked for"""
    thumbnail: bytes = b""
    """WebP, where it was asked for"""


class Look(NamedTuple):
    """What a worker is told of the pictures."""

    background: Colour
    hashed: bool
    thumbnail: int = 0
    """px of the longer side; 0 = none"""


Outcome: TypeAlias = Facts | tuple[str, str]
"""facts, or (reason, sentence)"""


def _inspect(task: ImageTask, look: Look) -> Outcome:
    """Decodes one picture and reads its caption. Runs in the workers."""
    try:
        tags = read_tags(task)
        decoded = read_image(task.file, look.background, md5=task.md5)
        seen = perceptual_hash(decoded.image) if look.hashed else FLAT
        thumbnail = _thumbnail(decoded.image, look.thumbnail) if look.thumbnail else b""
    except ImageRejected as error:
        return error.reason, str(error)
    except MemoryError:
        return "out_of_memory", "the picture does not fit in memory."
    height, width = decoded.image.height, decoded.image.width
    facts = (decoded.sha256, decoded.file_bytes, decoded.format, height, width, tags, decoded.profile_ignored)
    return Facts(*facts, perceptual_hash=seen, thumbnail=thumbnail)


def _thumbnail(picture: Image.Image, side: int) -> bytes:
    width, height = (max(1, round(length * min(1.0, side / max(picture.size)))) for length in picture.size)
    file = BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0).save(file, "WEBP", quality=80)
    return file.getvalue()


def read_tags(task: ImageTask) -> ParsedTags:
    """The tags of the picture's caption.

    Raises: ImageRejected.
    """
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

_DIED = (
    "decoder_died",
    f"the picture killed the process that decoded it, or took it over {MAX_CPU_SECONDS} s of work or {MAX_SECONDS} s.",
)


def inspect_all(tasks: Sequence[ImageTask], look: Look, workers: int) -> Iterator[tuple[ImageTask, Outcome]]:
    """Each task with its outcome, in the order given."""
    if workers == 0:
        yield from ((task, _inspect(task, look)) for task in tasks)
        return
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    under_way = 2 * workers
    while chunks:
        done = 0
        try:
            for outcomes in _run_pool(chunks, look, workers, under_way):
                yield from zip(chunks[done], outcomes, strict=True)
                done += 1
        except BrokenProcessPool:
            # The culprit is among those that were under way: they are done again one by one, so that it has a name.
            for chunk in chunks[done : done + under_way]:
                yield from _inspect_singly(chunk, look)
            done += under_way
        chunks = chunks[done:]


def _run_pool(
    chunks: Sequence[Sequence[ImageTask]], look: Look, workers: int, under_way: int
) -> Iterator[list[Outcome]]:
    """The outcomes of each chunk in turn. A bounded number is under way, so memory does not grow with the folder."""
    with _pool(min(workers, len(chunks))) as pool:
        waiting: deque[Future[list[Outcome]]] = deque()
        try:
            for chunk in chunks:
                with interrupts_held():  # it may start a worker
                    waiting.append(pool.submit(_inspect_chunk, chunk, look))
                if len(waiting) == under_way:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _inspect_singly(chunk: Sequence[ImageTask], look: Look) -> Iterator[tuple[ImageTask, Outcome]]:
    """One picture at a time in a process that is replaced when a picture kills it."""
    pool = _pool(1)
    try:
        for task in chunk:
            try:
                yield task, pool.submit(_inspect_chunk, [task], look).result()[0]
            except BrokenProcessPool:
                yield task, _DIED
                pool.shutdown()
                pool = _pool(1)
    finally:
        pool.shutdown()


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork would copy the locked locks of whatever else runs here (torch, Arrow, a progress bar).
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(MAX_MEMORY_BYTES,)
    )
    with interrupts_held():
        started = pool.submit(os.getpid)
    started.result()  # a worker that cannot even start is a bug to show, not a broken picture
    return pool


def _start_worker(memory: int) -> None:
    ignore_interrupts()
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    _limit_resources(memory)


def _limit_resources(memory: int) -> None:
    """A decoder that has been taken over can write no file, open few, take no more memory, and leaves no core dump."""
    try:
        import resource
    except ImportError:  # Windows
        return

    def limit(kind: int, most: int) -> None:
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))

    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # elsewhere the limit of memory is absent or not kept
        pages = int(Path("/proc/self/statm").read_text().split()[0])  # what libraries and threads have reserved
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)
        limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + MAX_OPEN_FILES)  # noqa: PTH208


def _inspect_chunk(tasks: Sequence[ImageTask], look: Look) -> list[Outcome]:
    return [_inspect_timed(task, look) for task in tasks]


def _inspect_timed(task: ImageTask, look: Look) -> Outcome:
    """`_inspect`, ended with its process by a signal after `MAX_CPU_SECONDS` of work or `MAX_SECONDS` by the clock."""
    if not hasattr(signal, "setitimer"):  # Windows
        return _inspect(task, look)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    outcome = _inspect(task, look)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome
