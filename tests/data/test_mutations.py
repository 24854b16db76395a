"""Thousands of damaged pictures through the real pool of decoders: each gets a verdict, none harms the parent.

The mutations are seeded; each worker's own peak of memory is reported by the system when it has ended.
"""

import os
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import dying_decoder
import numpy as np
import pytest
from malformed import MALFORMED, NOISE, ODD, encoded

from sumizome.data import verification
from sumizome.data.images import WHITE
from sumizome.data.tasks import ImageTask
from sumizome.data.verification import Facts, Look, inspect_all

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

SEEDS = [
    *(
        ODD[name].data
        for name in ("progressive.jpg", "alpha.png", "alpha.webp", "palette_with_alpha.png", "16_bits.png")
    ),
    *(ODD[name].data for name in ("inverted_cmyk.jpg", "orientation_6.jpg", "one_bit.png", "broken_profile.png")),
    *(encoded(NOISE, format_) for format_ in ("PNG", "JPEG", "WEBP")),
    encoded(NOISE, "WEBP", lossless=True),
]


def mutated(random: np.random.Generator) -> bytes:
    """A valid file with bits flipped, bytes cut out, doubled or overwritten, or a piece of another file within it."""
    data = bytearray(SEEDS[random.integers(len(SEEDS))])
    for _ in range(random.integers(1, 6)):
        at, size = int(random.integers(len(data))), int(random.integers(1, 40))
        match random.integers(6):
            case 0:
                data[at] ^= 1 << int(random.integers(8))
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at : at + size] = random.bytes(size)
            case 4:
                data[at : at + 4] = b"\xff\xff\xff\xff"
            case 5:
                other = SEEDS[random.integers(len(SEEDS))]
                start = int(random.integers(len(other)))
                data[at : at + size] = other[start : start + size]
        if not data:
            break
    return bytes(data)


def task(root: Path, name: str) -> ImageTask:
    return ImageTask(0, str(root), name, 1, None, "")


def check_verdicts(root: Path, count: int, seed: int) -> Counter[str]:
    random = np.random.default_rng(seed)
    names = [f"{number:05}.png" for number in range(count)]
    for name in names:
        (root / name).write_bytes(mutated(random))
    found = list(inspect_all([task(root, name) for name in names], Look(WHITE, True), workers=2))
    assert [each.path for each, _ in found] == names
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest worker that has ended
    assert peak <= verification.MAX_MEMORY_BYTES
    return Counter("taken" if isinstance(outcome, Facts) else outcome[0] for _, outcome in found)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_four_hundred_damaged_files_get_a_verdict_each(tmp_path: Path) -> None:
    verdicts = check_verdicts(tmp_path, 400, seed=1)
    assert verdicts.total() == 400
    assert "decoder_died" not in verdicts  # none of these is known to kill a decoder
    assert len(verdicts) >= 4 and verdicts["taken"] > 20


@pytest.mark.slow
def test_five_thousand_damaged_files_get_a_verdict_each(tmp_path: Path) -> None:
    assert check_verdicts(tmp_path, 5000, seed=2).total() == 5000


def test_every_malformed_and_odd_file_gets_its_verdict_in_the_pool_and_in_time(tmp_path: Path) -> None:
    expected = {name: reason for name, (_, reason) in MALFORMED.items()} | dict.fromkeys(ODD, "taken")
    for name, data in [(name, data) for name, (data, _) in MALFORMED.items()] + [
        (n, odd.data) for n, odd in ODD.items()
    ]:
        (tmp_path / name).write_bytes(data)
    started = time.monotonic()
    tasks = [task(tmp_path, name) for name in expected]
    found = {
        each.path: "taken" if isinstance(outcome, Facts) else outcome[0]
        for each, outcome in inspect_all(tasks, Look(WHITE, False), workers=2)
    }
    assert found == expected
    assert time.monotonic() - started < 20 * len(expected)


@pytest.fixture
def worker() -> "ProcessPoolExecutor":
    with verification._pool(1) as pool:
        yield pool


def test_a_worker_can_write_no_file_and_open_few(tmp_path: Path, worker: ProcessPoolExecutor) -> None:
    target = tmp_path / "written"
    assert worker.submit(dying_decoder.write_file, str(target)).result() == "File too large"
    assert not target.exists() or target.stat().st_size == 0
    if sys.platform == "linux":
        assert worker.submit(dying_decoder.open_files, verification.MAX_OPEN_FILES + 50).result() == os.strerror(24)


def test_files_that_cannot_be_read_are_counted_by_reason_and_the_rest_go_on(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded(NOISE, "PNG"))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "nowhere.png").symlink_to("missing.png")
    odd_names = ["new\nline.png", "bell\x07.png", os.fsdecode(b"latin\xe9.png")]
    for name in odd_names:
        (tmp_path / name).write_bytes(encoded(NOISE, "PNG"))
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**30)
    expected = {
        "good.png": "taken",
        "folder.png": "not_a_file",
        "pipe.png": "not_a_file",
        "circle.png": "unreadable",
        "nowhere.png": "missing",
        "gone.png": "missing",
        "large.png": "file_too_large",
    } | dict.fromkeys(odd_names, "taken")
    if os.geteuid() != 0:  # root may read everything
        (tmp_path / "secret.png").write_bytes(b"?")
        (tmp_path / "secret.png").chmod(0)
        expected["secret.png"] = "no_permission"
    outcomes = inspect_all([task(tmp_path, name) for name in expected], Look(WHITE, False), workers=1)
    found = {each.path: "taken" if isinstance(outcome, Facts) else outcome[0] for each, outcome in outcomes}
    assert found == expected
