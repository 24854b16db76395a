"""The journal: a second ingest decodes what is new or changed, whatever became of its file meanwhile."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import MALFORMED
from test_ingest import draw, reasons
from test_source_kinds import write_lines
from test_tar_reader import packed
from test_tar_sources import png

from sumizome.data import journal, verification
from sumizome.data.images import WHITE
from sumizome.data.ingest import IngestResult, ingest_to
from sumizome.data.journal import Journal
from sumizome.data.source_config import DuplicateConfig, SourceConfig
from sumizome.data.tags import ParsedTags
from sumizome.data.verification import Facts, Look
from sumizome.errors import DataError

YESTERDAY = 1_600_000_000


def settle(root: Path) -> None:
    """Makes the files older than the two seconds in which they might change again."""
    for path in root.rglob("*"):
        os.utime(path, (YESTERDAY, YESTERDAY))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for at in range(12):
        draw(root / f"{at}.png", at, caption=f"tag {at}")
    for name in ("zero_bytes.png", "cut_in_half.jpg"):
        (root / name).write_bytes(MALFORMED[name][0])
    settle(root)
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are decoded from here on."""
    seen: list[str] = []
    inspect = verification._inspect
    monkeypatch.setattr(verification, "_inspect", lambda task, look: (seen.append(task.path), inspect(task, look))[1])
    return seen


def run(root: Path, **changes: object) -> IngestResult:
    return ingest_to(root.parent / "out" / "m.parquet", [root], workers=0, **changes)  # type: ignore[arg-type]


def test_only_what_is_new_or_changed_is_decoded(root: Path, decoded: list[str]) -> None:
    first = run(root)
    assert (len(decoded), first.decoded, first.found_earlier) == (14, 14, 0)
    decoded.clear()
    again = run(root)
    assert (decoded, again.decoded, again.found_earlier) == ([], 0, 14)
    assert again.manifest.table.equals(first.manifest.table)
    assert again.rejects == first.rejects
    draw(root / "new.png", 20)
    draw(root / "3.png", 33)  # other contents
    (root / "4.txt").write_text("another caption")
    (root / "5.txt").write_bytes(b"\xff")
    os.utime(root / "6.png", (YESTERDAY + 1, YESTERDAY + 1))
    (root / "7.png").rename(root / "8.png")  # its time is as old, its path is another's
    os.utime(root / "8.png", (YESTERDAY - 7, YESTERDAY - 7))
    changed = run(root)
    assert sorted(decoded) == ["3.png", "6.png", "8.png", "new.png"]
    table = {row["path"]: row for row in changed.manifest.table.to_pylist()}
    assert table["4.png"]["tags"] == ["another caption"]
    assert reasons(changed)["5.png"] == "caption_not_utf8"
    for name in ("3.png", "8.png", "0.png"):
        assert table[name]["sha256"] == hashlib.sha256((root / name).read_bytes()).hexdigest()


def test_another_way_of_looking_decodes_again(root: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(root)
    for changes in ({"background": (1, 2, 3)}, {"duplicates": DuplicateConfig(near="report")}, {"decode_again": True}):
        decoded.clear()
        run(root, **changes)
        assert len(decoded) == 14
    run(root)
    decoded.clear()
    run(root)
    assert decoded == []
    monkeypatch.setattr(journal.PIL, "__version__", "0.1")
    run(root)
    assert len(decoded) == 14


def test_a_journal_that_cannot_be_removed_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "m.decoded").mkdir()
    with pytest.raises(DataError, match=r"cannot remove .*m\.decoded"):
        ingest_to(tmp_path / "m.parquet", [root], workers=0, decode_again=True)


def test_files_that_have_just_changed_are_not_trusted_yet(root: Path, decoded: list[str]) -> None:
    draw(root / "fresh.png", 50)
    run(root)
    decoded.clear()
    run(root)
    assert decoded == ["fresh.png"]


def test_a_record_md5_is_checked_once_and_then_known(tmp_path: Path, decoded: list[str]) -> None:
    root = tmp_path / "p"
    digest = hashlib.md5(draw(root / "1.png").read_bytes()).hexdigest()
    settle(root)
    manifest = tmp_path / "m.parquet"
    for md5, known, rejected in [(None, 0, 0), (digest, 0, 0), (digest, 1, 0), ("0" * 32, 0, 1), (None, 1, 0)]:
        table = write_lines(tmp_path / "r.jsonl", [{"id": 1, "tags": "a", "md5": md5}])
        sources = [SourceConfig(root, "booru", table)]
        draw(tmp_path / "other" / "x.png", 5)
        result = ingest_to(manifest, [*sources, SourceConfig(tmp_path / "other")], workers=0)
        assert (result.found_earlier, len(result.rejects)) == (known, rejected)


def test_members_of_tars_are_known_by_the_tar(tmp_path: Path, decoded: list[str]) -> None:
    root = tmp_path / "t"
    root.mkdir()
    for name, seeds in (("a.tar", (1, 2)), ("b.tar", (3, 4))):
        (root / name).write_bytes(packed([(f"{seed}.png", png(seed)) for seed in seeds]))
    settle(root)
    sources = [SourceConfig(root, "webdataset")]
    ingest_to(tmp_path / "m.parquet", sources, workers=0)
    (root / "b.tar").write_bytes(packed([("4.png", png(4))]))
    decoded.clear()
    result = ingest_to(tmp_path / "m.parquet", sources, workers=0)
    assert decoded == ["b.tar/4.png"]
    assert (result.found_earlier, len(result.manifest)) == (2, 3)


# --- damage -----------------------------------------------------------------------------------------------------------


def facts(at: int) -> Facts:
    return Facts(f"{at:064x}", 10 + at, "PNG", 20, 30 + at, ParsedTags((), 0), False, at)


def stamp(at: int) -> bytes:
    return hashlib.blake2b(bytes([at]), digest_size=16).digest()


LOOK = Look(WHITE, False)


def written(path: Path, blocks: int = 4, rows: int = 3) -> None:
    for block in range(blocks):
        with Journal(path, LOOK) as known:
            for at in range(block * rows, (block + 1) * rows):
                known.add(stamp(at), facts(at) if at % 5 else ("truncated", f"cut {at}"), None)


def found(path: Path, count: int = 12) -> list[object]:
    return list(Journal(path, LOOK).find([stamp(at) for at in range(count)], [None] * count))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3), st.integers(0, 5000))
def test_damage_is_forgotten_and_never_believed(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.decoded"
    path.unlink(missing_ok=True)
    written(path)
    sound = found(path)
    assert None not in sound
    data = bytearray(path.read_bytes())
    for at, flip in flips:
        data[at % len(data)] ^= flip
    path.write_bytes(data[: max(0, len(data) - (cut if cut % 2 else 0))])
    for was, now in zip(sound, found(path), strict=True):
        assert now is None or now == was
    written(path, 1)  # and what is added behind the damage is found
    assert found(path)[:3] == sound[:3]


def test_one_damaged_block_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.decoded"
    written(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert sum(each is None for each in found(path)) == 3


def test_entries_that_nothing_asks_for_are_pruned(tmp_path: Path) -> None:
    path = tmp_path / "x.decoded"
    written(path, 1, 12)
    with Journal(path, LOOK) as known:
        assert known.find([stamp(1), stamp(2), None], [None] * 3)[2] is None
        known.add(stamp(99), facts(99), None)
        known.prune()
    assert len(Journal(path, LOOK)) == 3
    assert [each is not None for each in found(path)] == [at in (1, 2) for at in range(12)]
    assert Journal(path, LOOK).find([stamp(99)], [None]) == [facts(99)]


def test_faults_that_may_pass_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.decoded"
    with Journal(path, LOOK) as known:
        for at, reason in enumerate(["unreadable", "decoder_died", "out_of_memory", "md5_mismatch", "caption_invalid"]):
            known.add(stamp(at), (reason, "x"), None)
    assert not path.exists()


def test_one_ingest_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "x.decoded", LOOK),
        pytest.raises(DataError, match=r"process \d+ on .* is ingesting here"),
        Journal(tmp_path / "x.decoded", LOOK),
    ):
        pass


def test_who_is_refused_takes_nothing_away(root: Path) -> None:
    run(root)
    path = root.parent / "out" / "m.decoded"
    before = path.read_bytes()
    with Journal(path, LOOK), pytest.raises(DataError, match="is ingesting here"):
        run(root, decode_again=True)
    assert path.read_bytes() == before


def test_a_journal_that_is_deleted_meanwhile_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.decoded"
    written(path, 1, 12)
    with Journal(path, LOOK) as known:
        known.find([stamp(1)], [None])
        path.unlink()
        known.add(stamp(99), facts(99), None)
        known.prune()
    assert Journal(path, LOOK).find([stamp(99)], [None]) == [facts(99)]


# --- killed -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import signal, sys, time
from pathlib import Path
from sumizome.data import journal, verification
from sumizome.data.ingest import ingest_to
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started ignoring it
journal.ROWS = 4
inspect = verification._inspect
seen = []
def halting(task, look):
    seen.append(task)
    if len(seen) == 30:
        print("thirtieth", flush=True)
        time.sleep(600)
    return inspect(task, look)
verification._inspect = halting
ingest_to(Path(sys.argv[2]), [Path(sys.argv[1])], workers=0)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_ingest_goes_on_where_it_was(tmp_path: Path, how: signal.Signals, decoded: list[str]) -> None:
    root, manifest = tmp_path / "p", tmp_path / "m.parquet"
    for at in range(60):
        draw(root / f"{at:02}.png", at)
    settle(root)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, root, manifest], stdout=-1, stderr=-3) as process:
        assert process.stdout and process.stdout.readline() == b"thirtieth\n"
        process.send_signal(how)
        process.wait()
    assert not manifest.exists()
    result = ingest_to(manifest, [root], workers=0)
    assert 4 <= result.found_earlier < 60
    assert (len(decoded), len(result.manifest)) == (60 - result.found_earlier, 60)
