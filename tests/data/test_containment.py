"""Nothing outside the sources is opened, whatever names, tars, manifests and links say: watched by an audit hook."""

import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from test_ingest import draw, reasons
from test_tar_reader import with_members
from test_tar_sources import png

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import open_image
from sumizome.data.ingest import ingest, ingest_to
from sumizome.data.manifest import Manifest, load_manifest, write_manifest
from sumizome.data.source_config import SourceConfig
from sumizome.errors import ManifestError

OPENED: list[str] | None = None


def watch(event: str, arguments: tuple[object, ...]) -> None:
    if OPENED is not None and event in ("open", "os.listdir", "os.scandir"):
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            OPENED.append(os.path.realpath(os.fsdecode(path)))


@contextmanager
def opened() -> Iterator[list[str]]:
    """What Python opens within the block, links followed. (Arrow opens in C++, but only tables that the user names.)"""
    global OPENED
    OPENED = seen = []
    try:
        yield seen
    finally:
        OPENED = None


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(watch)  # stays until the process ends; idle unless OPENED is a list


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of things that must not be read."""
    folder = tmp_path / "outside"
    draw(folder / "secret.png", 1, caption="secret")
    (folder / "secret.png.json").write_text('{"tags": "secret"}')
    (folder / "secret.json").write_text('{"tags": "secret"}')
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "secret"}))
    info = tarfile.TarInfo("s.png")
    (folder / "secret.tar").write_bytes(with_members(info))
    return folder


def links_out(root: Path, outside: Path) -> None:
    draw(root / "a.png", 2)
    draw(root / "b.png", 3)
    for name, target in [
        ("stolen.png", "secret.png"),
        ("a.txt", "secret.txt"),
        ("a.png.json", "secret.png.json"),
        ("metadata.jsonl", "metadata.jsonl"),
        ("metadata.csv", "metadata.jsonl"),
        ("stolen.tar", "secret.tar"),
    ]:
        (root / name).symlink_to(outside / target)
    (root / "linked").symlink_to(outside)
    (root / "up").symlink_to(root.parent)
    (root / "device.png").symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["folder", "gallery-dl", "imagefolder", "webdataset", "booru", "kohya"])
def test_links_names_and_records_open_nothing_outside(tmp_path: Path, outside: Path, kind: str) -> None:
    root = tmp_path / "root"
    links_out(root, outside)
    names = ["../outside/secret.png", str(outside / "secret.png"), "linked/secret.png", "up/outside/secret.png"]
    records = None
    if kind == "booru":
        records = tmp_path / "r.jsonl"
        records.write_text("\n".join(json.dumps({"file_name": name, "id": name, "tags": "x"}) for name in names))
    if kind == "kohya":
        records = tmp_path / "r.json"
        records.write_text(json.dumps({name: {"tags": "x"} for name in names}))
    draw(root / "c.png", 4)
    with opened() as seen:
        result = ingest([SourceConfig(root, kind, records)], workers=0)  # type: ignore[arg-type]
    assert str(root) in seen  # the hook sees
    touched = {path for path in seen if path.startswith((str(tmp_path), "/dev/"))}
    allowed = {str(records)} if records else set()
    assert {path for path in touched if not Path(path).is_relative_to(root)} <= allowed
    assert not any("secret" in str(row["tags"]) + row["path"] for row in result.manifest.table.to_pylist())
    assert set(reasons(result).values()) >= {"link_outside", "linked_folder"}


def test_members_of_tars_open_nothing_but_the_tar(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    infos, buffer = [], io.BytesIO()
    for name in [
        "../outside/secret.png",
        str(outside / "secret.png"),
        "a/../../outside/secret.png",
        "\0x.png",
        "ok.png",
    ]:
        infos.append(tarfile.TarInfo(name))
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(outside / "secret.png")
    hard = tarfile.TarInfo("hard.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../outside/secret.png"
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info in infos:
            info.size = len(png(1))
            tar.addfile(info, io.BytesIO(png(1)))
        for info in (link, hard):
            tar.addfile(info)
    (root / "a.tar").write_bytes(buffer.getvalue())
    with opened() as seen:
        manifest = ingest([SourceConfig(root, "webdataset")], workers=0).manifest
        for row in range(len(manifest)):
            open_image(manifest.picture(row))
    assert {path for path in seen if path.startswith(str(tmp_path))} == {str(root), str(root / "a.tar")}
    assert [row["path"] for row in manifest.table.to_pylist()] == ["a.tar/ok.png"]


def test_a_manifest_leads_nowhere_else(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "root"
    draw(root / "a.png", 2)
    (root / "linked").symlink_to(outside)
    (root / "stolen.png").symlink_to(outside / "secret.png")
    (root / "stolen.tar").symlink_to(outside / "secret.tar")
    sound = ingest([root], workers=0).manifest
    for path in ("../outside/secret.png", str(outside / "secret.png"), "x/../../outside/secret.png", "a.png\0"):
        forged = replace(sound, table=sound.table.set_column(2, "path", pa.array([path])))
        with pytest.raises(ManifestError, match="stays below"):
            write_manifest(forged, tmp_path / "m.parquet")
    archives = {"archive": pa.array(["stolen.tar"]), "offset": pa.array([512])}
    for path in ("linked/secret.png", "stolen.png", "stolen.tar/s.png"):
        table = sound.table.set_column(2, "path", pa.array([path]))
        if ".tar" in path:
            for name, column in archives.items():
                table = table.append_column(name, column)
        write_manifest(Manifest(table, sound.sources), tmp_path / "m.parquet")  # sealed: as a hostile hand could
        with opened() as seen, pytest.raises(ImageRejected, match="out of it"):
            open_image(load_manifest(tmp_path / "m.parquet").picture(0))
        assert not [each for each in seen if each.startswith(str(outside))]


def test_outputs_stay_beside_the_manifest(tmp_path: Path) -> None:
    root = tmp_path / "root"
    draw(root / "a.png")
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    ingest_to(tmp_path / "out" / "m.parquet", [root], workers=0)
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before
    assert {path.name for path in tmp_path.iterdir()} == {"root", "out"}
