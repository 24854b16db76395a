"""Ingest without its decoder: rows a second and bytes a row of matching records, planning tasks and finding copies.

    python benchmarks/bench_ingest.py --rows 300000

Draws no picture: files are empty names in a temporary folder, and what decoding would find is made up of the name.
Every part runs in a process of its own, whose peak memory above its start is measured.
"""

import argparse
import hashlib
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from measurement import record

TAGS = [f"tag_number_{number}" for number in range(20_000)]
PER_FOLDER = 1_000


def write_set(root: Path, count: int) -> Path:
    """Empty files `id.png` in folders of a thousand, and a JSONL dump of their records with 30 tags each."""
    rng = np.random.default_rng(0)
    dump = root / "posts.jsonl"
    with dump.open("w") as file:
        for number in range(count):
            folder = root / "images" / f"{number // PER_FOLDER:04}"
            if number % PER_FOLDER == 0:
                folder.mkdir(parents=True)
            (folder / f"{number}.png").touch()
            chosen = (20_000 * rng.random(30) ** 3).astype(int)
            tags = " ".join(TAGS[each] for each in chosen[:28])
            row = {
                "id": number,
                "md5": hashlib.md5(str(number).encode()).hexdigest(),
                "tag_string_general": tags,
                "tag_string_artist": TAGS[chosen[28]],
                "tag_string_character": TAGS[chosen[29]],
                "rating": "gsqe"[number % 4],
                "score": int(chosen[0]),
                "created_at": f"20{10 + number % 14}-05-03",
                "image_width": 1200,
                "image_height": 800,
                "file_ext": "png",
            }
            file.write(json.dumps(row) + "\n")
    return dump


def fake_outcomes(tasks: Sequence[Any], look: object, workers: int) -> Iterator[tuple[Any, Any]]:
    """What decoding might have found, without decoding."""
    from sumizome.data.verification import Facts, read_tags

    for task in tasks:
        digest = hashlib.sha256(task.path.encode()).hexdigest()
        yield task, Facts(digest, 1000, "PNG", 800, 1200, read_tags(task), False, int(digest[:15], 16))


def ingest_records(root: Path, near: str) -> int:
    from sumizome.data import ingest as module
    from sumizome.data.source_config import DuplicateConfig, PictureRules, SourceConfig

    module.inspect_all = fake_outcomes  # type: ignore[assignment]
    rules = PictureRules(ratings=("g", "s", "q", "e"), quality=("0=low", "50=good", "90=best"), year="year {year}")
    source = SourceConfig(root / "images", "booru", root / "posts.jsonl", rules=rules)
    result = module.ingest([source], duplicates=DuplicateConfig(near=near), workers=1)  # type: ignore[arg-type]
    return len(result.manifest)


def match_only(root: Path, near: str) -> int:
    from sumizome.data.source_config import SourceConfig
    from sumizome.data.sources import scan_source

    scan = scan_source(0, SourceConfig(root / "images", "booru", root / "posts.jsonl"))
    return len(scan.tasks if hasattr(scan, "tasks") else scan)  # the first: as it was before sources were columns


def near_copies(count: int, kind: str) -> int:
    """Copies among hashes that are unrelated, or of one layout (three fifths of the bits agree), or all near to few."""
    from sumizome.data.duplicates import find_copies
    from sumizome.data.source_config import DuplicateConfig

    rng = np.random.default_rng(1)
    hashes = rng.integers(1, 1 << 63, count, dtype=np.uint64)
    if kind == "layout":
        hashes = (hashes & np.uint64((1 << 26) - 1)) | np.uint64(0b1011 << 58)
    if kind == "clusters":
        hashes = hashes[rng.integers(0, 20, count)]
        for _ in range(2):
            hashes ^= np.uint64(1) << rng.integers(0, 63, count).astype(np.uint64)
    digests = [f"{number:064x}" for number in range(count)]
    return len(find_copies(digests, hashes, np.full(count, 4096), DuplicateConfig(near="report")))


def measured(work: Callable[..., int], *arguments: object) -> tuple[int, float, int]:
    """(what `work` returns, processor seconds, bytes of peak memory above the start) in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found: tuple[int, float, int] = pool.apply(_measure, (work, arguments))
    return found


def _measure(work: Callable[..., int], arguments: Sequence[object]) -> tuple[int, float, int]:
    import sumizome.data.ingest  # noqa: F401 — what imports take is not the rows'

    before, start = _peak(), time.process_time()
    found = work(*arguments)
    return found, time.process_time() - start, _peak() - before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--copies", type=int, default=50_000)
    parser.add_argument("--only", choices=["match", "records", "copies"])
    options = parser.parse_args()
    if options.only != "copies":
        with tempfile.TemporaryDirectory() as folder:
            write_set(Path(folder), options.rows)
            parts = [("match", match_only), ("ingest without decoding", ingest_records)]
            for name, work in parts[: 1 if options.only == "match" else 2]:
                rows, seconds, peak = measured(work, Path(folder), "off")
                assert rows == options.rows
                record(f"{name}: rows a second of processor time", rows / seconds, "rows/s", better="higher")
                record(f"{name}: memory", peak / rows, "bytes/row", better="lower")
    if options.only in (None, "copies"):
        for kind in ("unrelated", "layout", "clusters"):
            copies, seconds, peak = measured(near_copies, options.copies, kind)
            record(f"near copies, {kind} ({copies} found)", seconds, "s", better="lower")
            record(f"near copies, {kind}: memory", peak / options.copies, "bytes/row", better="lower")


if __name__ == "__main__":
    main()
