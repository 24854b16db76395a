"""The tar reader against Python's tarfile: the same members, the same bytes; no damage passes as a shorter set."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sumizome.data import tar_reader
from sumizome.data.tar_reader import Member, TarDamage, read_members

NAMES = ["a.png", "deep/er/b.txt", "ünï/墨.webp", "x" * 150 + ".png", "p/" * 70 + "long.txt", "y/" * 200 + "z.json"]


def packed(members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def with_members(*infos: tarfile.TarInfo, kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def read(tmp_path: Path, data: bytes) -> list[Member]:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    return list(read_members(path))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_members_are_those_of_tarfile(tmp_path: Path, kind: int) -> None:
    # ustar splits names at a slash: 155 bytes before it, 100 after; two of the names do not fit.
    names = [name for name in NAMES if kind != tarfile.USTAR_FORMAT or len(name.encode()) < 150]
    content = [(name, bytes([at]) * (at * 300)) for at, name in enumerate(names)]
    data = packed(content, kind)
    found = read(tmp_path, data)
    assert [(member.name, data[member.offset : member.offset + member.size]) for member in found] == content
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(each.name, each.offset_data, each.size) for each in tar] == [
            (member.name, member.offset, member.size) for member in found
        ]


def test_kinds_are_told_and_links_lead_nowhere(tmp_path: Path) -> None:
    infos = []
    for name, kind in [
        ("folder", tarfile.DIRTYPE),
        ("soft.png", tarfile.SYMTYPE),
        ("hard.png", tarfile.LNKTYPE),
        ("pipe.png", tarfile.FIFOTYPE),
        ("device.png", tarfile.CHRTYPE),
        ("odd.png", b"Z"),
        ("plain.png", tarfile.REGTYPE),
        ("old.png", tarfile.AREGTYPE),
    ]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd" * 20 if "soft" in name else "x"
        infos.append(info)
    found = {member.name.rstrip("/"): member.kind for member in read(tmp_path, with_members(*infos))}
    assert found == {
        "folder": "folder",
        "soft.png": "link",
        "hard.png": "link",
        "pipe.png": "device",
        "device.png": "device",
        "odd.png": "unknown",
        "plain.png": "file",
        "old.png": "file",
    }


def test_a_tar_cut_at_any_block_is_an_error_that_says_where(tmp_path: Path) -> None:
    content = [(f"{at}.{kind}", bytes([at + 1]) * 700) for at in range(6) for kind in ("png", "txt")]
    content += [("n" * 200 + ".png", b"x" * 512)]
    data = packed(content, tarfile.GNU_FORMAT)
    whole = read(tmp_path, data)
    end = whole[-1].offset + 512 + 1024  # contents, two blocks of zeros; what follows is padding
    for cut in range(0, end, 512):
        with pytest.raises(TarDamage, match=r"a\.tar: expected .* at byte \d+, after \d+ whole members"):
            read(tmp_path, data[:cut])
    for cut in range(end, len(data) + 1, 512):
        assert read(tmp_path, data[:cut]) == whole
    for cut in (1, 511, 513, 1025, end - 1):
        with pytest.raises(TarDamage, match="truncated"):
            read(tmp_path, data[:cut])


def test_damage_to_any_byte_of_a_header_is_seen_or_without_effect(tmp_path: Path) -> None:
    data = packed([("a.png", b"x" * 600), ("b.png", b"y" * 10)], tarfile.GNU_FORMAT)
    whole = read(tmp_path, data)
    for start in (0, 512 + 1024):
        for at in range(start, start + 500, 3):
            changed = bytearray(data)
            changed[at] ^= 0x15
            try:
                assert read(tmp_path, bytes(changed)) == whole  # never: the checksum covers the block
            except TarDamage:
                continue
            raise AssertionError(f"byte {at} was changed unseen")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "found the file's end"),
        (b"PK\x03\x04" * 300, "octal digits|checksum"),
        (bytes(512), "end mark of two blocks"),
        (packed([("a", b"b")]) + packed([("c", b"d")]), "nothing after the end mark"),
    ],
)
def test_what_is_no_whole_tar_is_named(tmp_path: Path, data: bytes, complaint: str) -> None:
    with pytest.raises(TarDamage, match=complaint):
        read(tmp_path, data)


def test_headers_that_readers_understand_differently_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "b"
    raw = bytearray(with_members(link))
    raw[124:136] = b"00000001000\0"
    raw[148:156] = b"%06o\0 " % sum(raw[:148] + b" " * 8 + raw[156:512])
    with pytest.raises(TarDamage, match="no contents"):
        read(tmp_path, bytes(raw))
    sparse = tarfile.TarInfo("s.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "s.png"}
    with pytest.raises(TarDamage, match="sparse"):
        read(tmp_path, with_members(sparse, kind=tarfile.PAX_FORMAT))
    old = tarfile.TarInfo("o.png")
    old.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(TarDamage, match="sparse"):
        read(tmp_path, with_members(old))
    for headers, complaint in [({"path": "x"}, "for all members"), ({"size": "3"}, "for all members")]:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(TarDamage, match=complaint):
            read(tmp_path, buffer.getvalue())
    forever = tarfile.TarInfo("big.png")
    forever.size = 2**40  # in base 256
    with pytest.raises(TarDamage, match="truncated"):
        read(tmp_path, forever.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_members_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_reader, "MAX_MEMBERS", 3)
    assert len(read(tmp_path, packed([(str(at), b"") for at in range(3)]))) == 3
    with pytest.raises(TarDamage, match="at most 3 members"):
        read(tmp_path, packed([(str(at), b"") for at in range(4)]))


SOUND = packed([(name, name.encode() * 3) for name in NAMES[:4]], tarfile.GNU_FORMAT)


def mangle(data: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(data[: len(data) - cut])
    for at, value in changes:
        changed[at % max(len(changed), 1) : at % max(len(changed), 1) + 1] = bytes([value])
    return bytes(changed)


@settings(deadline=None, max_examples=int(os.environ.get("SUMIZOME_FUZZ_CASES", "150")))
@given(st.lists(st.tuples(st.integers(0, len(SOUND)), st.integers(0, 255)), max_size=8), st.integers(0, len(SOUND)))
def test_a_mangled_tar_is_damage_or_tiles_the_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    data = mangle(SOUND, changes, cut if cut % 3 == 0 else 0)
    path = tmp_path_factory.getbasetemp() / "mangled.tar"
    path.write_bytes(data)
    try:
        members = list(read_members(path))
    except TarDamage:
        return
    ends = [0]
    for member in members:
        assert ends[-1] < member.offset <= member.offset + member.size <= len(data)
        ends.append(member.offset + member.size)
