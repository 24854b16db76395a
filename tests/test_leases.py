"""Leases: one holder, free at once when it dies here, after a minute without a heartbeat when it is elsewhere."""

import os
import signal
import time
from pathlib import Path

import pytest

from sumizome import leases as module
from sumizome.errors import DataError
from sumizome.leases import Leases


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "STALE_SECONDS", 0.4)


def test_one_holds_it_until_it_gives_it_back(tmp_path: Path) -> None:
    with Leases(tmp_path / "l") as first, Leases(tmp_path / "l") as second:
        assert first.take("a") is not None
        assert second.take("a") is None and second.take("b") is not None
        assert second.holder() is not None and f"process {os.getpid()}" in str(second.holder())
        first.release("a")
        assert second.take("a") is not None and first.take("a") is None
    assert not (tmp_path / "l").exists(), "the last one out removes the folder"


def test_a_killed_holder_on_this_machine_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 1000.0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        Leases(tmp_path).take("a")
        os.write(write, b"x")
        time.sleep(100)
    os.read(read, 1)
    with Leases(tmp_path) as mine:
        assert mine.take("a") is None
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert mine.take("a") is not None


def foreign(path: Path, beat: int) -> None:
    """What a process of another machine leaves; no lock of its can be seen here."""
    path.write_text(f"elsewhere 1234-boot\n77\ndeadbeef\n{beat:012d}\n")


def test_another_machines_lease_is_taken_only_after_silence(tmp_path: Path) -> None:
    foreign(tmp_path / "a", 0)
    with Leases(tmp_path) as mine:
        for beat in range(1, 12):  # a second of heartbeats, more than twice what makes one stale
            assert mine.take("a") is None
            time.sleep(0.1)
            foreign(tmp_path / "a", beat)
        started = time.monotonic()
        while mine.take("a") is None:
            time.sleep(0.02)
        assert time.monotonic() - started > 0.3


def test_a_clock_that_jumps_steals_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path / "a", 0)
    for shift in (-86400, 86400):
        os.utime(tmp_path / "a", (time.time() + shift,) * 2)
        monkeypatch.setattr(time, "time", lambda shift=shift: shift)
        with Leases(tmp_path) as mine:
            assert mine.take("a") is None and mine.take("a") is None


def test_one_who_was_taken_for_dead_notices(tmp_path: Path) -> None:
    with Leases(tmp_path) as mine:
        lease = mine.take("a")
        assert lease is not None and mine.owns("a")
        foreign(tmp_path / "a", 3)
        assert not lease.is_held() and not mine.owns("a")
        mine.release("a")
        assert (tmp_path / "a").exists(), "it is the other's now"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"cannot write .*file/leases: Not a directory"),
        Leases(tmp_path / "file/leases"),
    ):
        pass
