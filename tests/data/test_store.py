"""Stores: the same promises on a folder and on a real S3 server, through faults; no credential in any word."""

import os
import re
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import FAULTS, SECRET_KEY, FaultyProxy, S3Server

from sumizome.data.retries import GaveUp, RetryPolicy, redacted
from sumizome.data.store import Store, as_address, is_remote, open_store
from sumizome.errors import ConfigError, StoreError

QUICK = RetryPolicy(attempts=12, first_s=0.01, longest_s=0.05, read_timeout_s=0.7)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(tmp_path / "store")
    return open_store(f"{request.getfixturevalue('s3_bucket')}/some/prefix")


# ── One interface ──


def test_what_is_written_is_what_is_read(store: Store, tmp_path: Path) -> None:
    big = os.urandom(17 * 2**20 + 3)  # more than one part of a download
    (tmp_path / "big").write_bytes(big)
    store.write_bytes("units/a.json", b"first")
    store.write_bytes("units/a.json", b"second")
    store.write_bytes("empty", b"")
    store.put_file(tmp_path / "big", "units/big.bin")
    assert store.read_bytes("units/a.json") == b"second"
    assert store.read_bytes("empty") == b""
    assert store.read_range("units/big.bin", 5, 105) == big[5:105]
    assert store.read_range("units/big.bin", 7, 7) == b""
    store.fetch("units/big.bin", tmp_path / "back" / "big")
    assert (tmp_path / "back" / "big").read_bytes() == big
    assert store.size("units/big.bin") == len(big)
    assert store.list() == {"empty": 0, "units/a.json": 6, "units/big.bin": len(big)}
    assert list(store.list("units")) == ["units/a.json", "units/big.bin"]
    assert store.list("nothing") == {}
    assert store.exists("empty")
    assert not store.exists("units")
    store.remove("units/a.json")
    store.remove("units/a.json")
    assert not store.exists("units/a.json")


def test_what_is_missing_is_named(store: Store, tmp_path: Path) -> None:
    store.write_bytes("there", b"x")
    actions: tuple[Callable[[], object], ...] = (
        lambda: store.read_bytes("no/such"),
        lambda: store.read_range("no/such", 0, 9),
        lambda: store.size("no/such"),
        lambda: store.fetch("no/such", tmp_path / "to"),
    )
    for action in actions:
        with pytest.raises(StoreError, match=re.escape(f"{store.location('no/such')} is missing")):
            action()
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/etc/passwd", "a\\b", "a\x00b", "line\nbreak"])
def test_a_name_never_leads_out(store: Store, name: str) -> None:
    for action in (store.read_bytes, store.size, store.exists, store.remove):
        with pytest.raises(ValueError, match="no name of a store"):
            action(name)
    with pytest.raises(ValueError, match="no name of a store"):
        store.write_bytes(name, b"x")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write_bytes("kept", b"old")
    with pytest.raises(StoreError, match="cannot write"):
        store.put_file(tmp_path / "not there", "kept")
    assert store.read_bytes("kept") == b"old"
    assert list(store.list()) == ["kept"]


# ── Addresses ──


def test_addresses() -> None:
    assert as_address(Path("s3://bucket/a/b")) == "s3://bucket/a/b", "Path takes one slash away"
    assert as_address("s3://bucket") == "s3://bucket"
    assert as_address(Path("/data/latents")) == "/data/latents"
    assert [is_remote(each) for each in ("s3://b", Path("s3://b/c"), "/a", "a:b", "C:/x")] == [True, True, *[False] * 3]
    assert open_store(Path("s3://bucket/a/b/")).location("c") == "s3://bucket/a/b/c"
    assert open_store("/data").local_path("x") == Path("/data/x")
    assert open_store("s3://bucket").local_path("x") is None


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("gs://bucket/x", "no store that is known"),
        ("s3://Upper/x", "no S3 bucket"),
        ("s3://b/x", "no S3 bucket"),
        ("s3://key:hidden@bucket/x", "must not carry credentials"),
        ("s3://bucket/x?X-Amz-Signature=hidden", "must not carry credentials"),
    ],
)
def test_other_addresses_are_refused(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        open_store(address)
    assert "hidden" not in str(refused.value)


# ── Retries ──


def _refused(attempts: int, total_s: float) -> tuple[GaveUp, list[float]]:
    """What an action that always fails costs, on a clock that only sleeping moves."""
    waits: list[float] = []
    policy = RetryPolicy(attempts=attempts, total_s=total_s, first_s=1.0, longest_s=8.0)
    with pytest.raises(GaveUp) as gave_up:
        policy.run(
            lambda: (_ for _ in ()).throw(TimeoutError("no answer")),
            lambda error: isinstance(error, TimeoutError),
            sleep=waits.append,
            clock=lambda: sum(waits),
        )
    return gave_up.value, waits


def test_retries_are_bounded_in_count_and_in_time() -> None:
    gave_up, waits = _refused(attempts=7, total_s=1e9)
    assert (gave_up.attempts, len(waits)) == (7, 6)
    assert all(0 <= wait <= bound for wait, bound in zip(waits, (1, 2, 4, 8, 8, 8), strict=True))
    gave_up, waits = _refused(attempts=1000, total_s=60.0)
    assert gave_up.attempts < 1000
    assert sum(waits) <= 60


def test_waits_are_jittered() -> None:
    """Full jitter: two clients that failed together do not come back together."""
    first = [_refused(2, 1e9)[1][0] for _ in range(200)]
    assert min(first) < 0.1
    assert max(first) > 0.9
    assert 0.4 < sum(first) / 200 < 0.6


def test_what_is_not_transient_is_tried_once() -> None:
    calls: list[int] = []

    def action() -> None:
        calls.append(1)
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        RetryPolicy().run(action, lambda error: isinstance(error, TimeoutError))
    assert len(calls) == 1


# ── Faults between us and a real server ──


def test_a_fifth_of_all_requests_failing_changes_no_byte(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {f"units/{number:02d}": os.urandom(3000 + number) for number in range(40)}
    proxy = FaultyProxy(s3_server, share=0.2, seed=7)
    with proxy.running() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = open_store(f"{s3_bucket}/p", QUICK)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: store.write_bytes(*item), contents.items()))
            assert list(pool.map(store.read_bytes, contents)) == list(contents.values())
        assert store.list("units") == {name: len(data) for name, data in contents.items()}
        store.fetch("units/00", tmp_path / "00")
    assert (tmp_path / "00").read_bytes() == contents["units/00"]
    kinds = set(proxy.faulted) - {""}
    assert len(kinds) >= 5, f"too few kinds of faults were met: {kinds} of {FAULTS}"
    faults, requests = sum(proxy.faulted[kind] for kind in kinds), sum(proxy.requests.values())
    assert requests <= 3 * len(contents) + 4 + 2 * faults, "a fault may cost an operation, not a storm"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    behind = open_store(f"{s3_bucket}/p")
    assert {name: behind.read_bytes(name) for name in behind.list()} == contents, "what lies on the server is whole"


@pytest.mark.parametrize("fault", ["500", "503", "reset", "stall", "short", "truncated"])
def test_giving_up_is_one_line_that_says_what_where_and_how_often(
    s3_server: S3Server, s3_bucket: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(s3_bucket).write_bytes("x", b"0123456789")
    with FaultyProxy(s3_server, share=1.0, faults=(fault,)).running() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = open_store(s3_bucket, RetryPolicy(attempts=2, first_s=0.01, read_timeout_s=0.5))
        with pytest.raises(StoreError) as gave_up:
            store.read_range("x", 0, 10)
    said = str(gave_up.value)
    assert said.startswith(f"{s3_bucket}/x could not be read in 2 attempts")
    assert "\n" not in said
    assert "run the command again" in said


# ── Credentials ──


def test_no_credential_is_in_what_is_said(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong := "canary-wrong-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", token := "canary-session-token")
    with pytest.raises(StoreError) as refused:
        open_store(s3_bucket).write_bytes("x", b"y")
    said = "".join(traceback.format_exception(refused.value))
    assert "check the credentials" in said
    for secret in (wrong, token, SECRET_KEY, "canaryaccesskey"):
        assert secret not in said


def test_without_credentials_the_error_names_the_variables(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID"):
        open_store(s3_bucket).write_bytes("x", b"y")


@pytest.mark.parametrize(
    "text",
    [
        "GET https://h/b/k?X-Amz-Credential=CANARY&X-Amz-Signature=CANARY failed",
        "https://user:CANARY@host/b",
        "Authorization: CANARY, x-amz-security-token: CANARY",
        "key AKIACANARYCANARYCANA does not exist",
        "<AWSAccessKeyId>x</AWSAccessKeyId> Signature=CANARY",
    ],
)
def test_redaction(text: str) -> None:
    assert "CANARY" not in redacted(text)


def test_redaction_leaves_the_rest() -> None:
    text = "s3://bucket/units/unit-00001.safetensors: OSError: [Errno 5] Internal Error (http://127.0.0.1:9000/bucket)"
    assert redacted(text) == text
