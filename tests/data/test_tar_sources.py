"""Pictures in webdataset's tars: from the archive through the manifest to what prepare reads; none is unpacked."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from test_ingest import draw, reasons, rows
from test_source_kinds import write_lines
from test_tar_reader import packed, with_members

from sumizome.data.byte_range import ByteRange
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.images import open_image
from sumizome.data.ingest import IngestResult, ingest, ingest_to
from sumizome.data.manifest import Manifest, load_manifest, write_manifest
from sumizome.data.source_config import PictureRules, SourceConfig
from sumizome.errors import ConfigError, DataError, ManifestError


def png(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def webdataset(folder: Path, **changes: Any) -> SourceConfig:
    return SourceConfig(folder, "webdataset", **changes)


def run(*sources: SourceConfig) -> IngestResult:
    return ingest(sources, workers=0)


def tags(result: IngestResult) -> dict[str, list[str]]:
    return {path: row["tags"] for path, row in rows(result).items()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of two samples: captions in txt, caption and json."""
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    (folder / "0.tar").write_bytes(
        packed([("a.png", png(0)), ("a.txt", b"from_txt, 1girl"), ("d/b.PNG", png(1)), ("d/b.caption", b"deeper")])
    )
    record = {"tags": ["from_json"], "tags_artist": ["some_one"], "rating": "g", "score": 3, "width": 16, "height": 20}
    lone = [("c.png", png(2)), ("c.json", json.dumps(record).encode()), ("c.txt", b"words"), ("x.tags", b"lonely")]
    (folder / "1.tar").write_bytes(packed([*lone, ("d.png", png(3)), ("d.tags", b"in_tags")], tarfile.GNU_FORMAT))
    (folder / "more" / "2.tar").write_bytes(packed([("./e.png", png(4)), ("./f.png", png(5))], tarfile.USTAR_FORMAT))
    return folder


def test_samples_have_their_captions_and_rows_their_place(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "m.parquet"
    result = ingest_to(path, [webdataset(shards)], workers=1)
    assert tags(result) == {
        "0.tar/a.png": ["from txt", "1girl"],
        "0.tar/d/b.PNG": ["deeper"],
        "1.tar/c.png": ["words"],
        "1.tar/d.png": ["in tags"],
        "more/2.tar/e.png": [],
        "more/2.tar/f.png": [],
    }
    assert (result.rejects, result.files_ignored, result.captions_missing) == ([], 1, 2)
    assert result.manifest.categories == {}
    read = load_manifest(path)
    assert (read.version, read.digest) == (3, result.manifest.digest)  # a record of one has rating and score
    for row in range(len(read)):
        place = read.picture(row)
        assert isinstance(place, ByteRange)
        data, told = place.read(), read.table.slice(row, 1).to_pylist()[0]
        assert hashlib.sha256(data).hexdigest() == told["sha256"]
        assert (place.path, place.size, place.offset % 512) == (shards / told["archive"], len(data), 0)
        image = open_image(place, sha256=told["sha256"])
        assert image.size[::-1] == (told["height"], told["width"])
    assert sorted(file.name for file in shards.rglob("*")) == ["0.tar", "1.tar", "2.tar", "more"]


def test_the_number_of_a_tar_is_no_count_of_repeats(tmp_path: Path) -> None:
    for name, seed in (("0000_train.tar", 0), ("0002_train.tar", 1), ("3_dogs/0009_train.tar", 2)):
        path = tmp_path / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed([("a.png", png(seed)), ("4_cats/b.png", png(seed + 10))]))
    result = run(webdataset(tmp_path / "shards"))
    assert {path: row["repeats"] for path, row in rows(result).items()} == {
        "0000_train.tar/a.png": 1,
        "0000_train.tar/4_cats/b.png": 4,
        "0002_train.tar/a.png": 1,
        "0002_train.tar/4_cats/b.png": 4,
        "3_dogs/0009_train.tar/a.png": 3,
        "3_dogs/0009_train.tar/4_cats/b.png": 4,
    }


def test_suffixes_of_captions_and_records_in_a_tar_may_be_in_upper_case(tmp_path: Path) -> None:
    members = [("a.PNG", png(0)), ("a.TXT", b"loud"), ("b.png", png(1)), ("b.JSON", b'{"tags": ["told"]}')]
    (tmp_path / "0.tar").write_bytes(packed(members))
    result = run(webdataset(tmp_path / "0.tar"))
    assert tags(result) == {"a.PNG": ["loud"], "b.png": ["told"]}
    assert result.files_ignored == 0


def test_one_tar_is_a_source_and_its_neighbours_are_not(shards: Path, tmp_path: Path) -> None:
    result = ingest_to(shards / "m.parquet", [webdataset(shards / "1.tar"), webdataset(shards / "0.tar")], workers=0)
    assert [(row["source"], row["path"], row["archive"]) for row in result.manifest.table.to_pylist()] == [
        (0, "c.png", ""),
        (0, "d.png", ""),
        (1, "a.png", ""),
        (1, "d/b.PNG", ""),
    ]
    manifest = load_manifest(shards / "m.parquet")
    assert str(manifest.picture(3)) == f"{shards / '0.tar'}:d/b.PNG"
    open_image(manifest.picture(3), sha256=manifest.table["sha256"][3].as_py())
    with pytest.raises(ConfigError, match="or one of them"):
        run(webdataset(draw(tmp_path / "a.png")))


def test_json_in_tars_has_ratings_scores_and_md5(tmp_path: Path) -> None:
    members = []
    for at, rating in enumerate("gsgg"):
        record = {"rating": rating, "score": at, "created_at": "2020", "tags": f"tag_{at}", "md5": "0" * 32}
        record["md5"] = hashlib.md5(png(at)).hexdigest() if at != 2 else "0" * 32
        members += [(f"{at}.png", png(at)), (f"{at}.json", json.dumps(record).encode())]
    members += [("4.png", png(4)), ("5.png", png(5)), ("5.json", b"{")]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.tar").write_bytes(packed(members))
    rules = PictureRules(ratings=("g",), quality=("0=low", "60=good"), year="y {year}")
    result = run(webdataset(tmp_path / "t", rules=rules))
    assert tags(result) == {"a.tar/0.png": ["tag 0", "low", "y 2020"], "a.tar/3.png": ["tag 3", "good", "y 2020"]}
    assert reasons(result) == {
        "a.tar/1.png": "rating_excluded",
        "a.tar/2.png": "md5_mismatch",
        "a.tar/4.png": "record_missing",
        "a.tar/5.png": "record_invalid",
    }
    plain = run(webdataset(tmp_path / "t"))  # without rules a picture needs no record, but a broken one is a fault
    assert "a.tar/4.png" in rows(plain)
    assert reasons(plain) == {"a.tar/2.png": "md5_mismatch", "a.tar/5.png": "record_invalid"}


def test_a_dump_describes_pictures_in_tars(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.tar").write_bytes(packed([("0012/12.png", png(1)), ("0012/12.txt", b"unread")]))
    (tmp_path / "t" / "b.tar").write_bytes(packed([("13.png", png(2)), ("14.png", png(3))]))
    content = [{"id": 12, "tags": "by_id"}, {"file_name": "b.tar/13.png", "tags": "by_path"}, {"id": 99, "tags": "no"}]
    result = run(webdataset(tmp_path / "t", records=write_lines(tmp_path / "posts.jsonl", content)))
    assert tags(result) == {"a.tar/0012/12.png": ["by id"], "b.tar/13.png": ["by path"]}
    assert (reasons(result), result.records_unused) == ({"b.tar/14.png": "record_missing"}, 1)


def test_hostile_and_unusable_members_are_named_and_never_opened(tmp_path: Path) -> None:
    secret = draw(tmp_path / "secret.png", 9)
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    names = ["../secret.png", str(secret), "a/../../secret.png", "back\\slash.png", "new\nline.png", "good.png"]
    body = packed([(name, png(1)) for name in [*names, "good.png", "x.jpg", "x.mask.png", "y.v2.png", "z.gif"]])
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.tar").write_bytes(body[:-10240] + body[-10240:])
    (tmp_path / "t" / "l.tar").write_bytes(with_members(link))
    (tmp_path / "t" / "b.tar.gz").write_bytes(b"")
    draw(tmp_path / "t" / "loose.png", 3)
    (tmp_path / "outside.tar").write_bytes(packed([("o.png", png(7))]))
    (tmp_path / "t" / "o.tar").symlink_to(tmp_path / "outside.tar")
    result = run(webdataset(tmp_path / "t", damaged_tars="reject"))
    assert rows(result).keys() == {"a.tar/good.png", "a.tar/x.jpg", "a.tar/y.v2.png"}
    assert sorted((each.path.replace(str(tmp_path), "…"), each.reason) for each in result.rejects) == [
        ("a.tar/../secret.png", "tar_member_outside"),
        ("a.tar/a/../../secret.png", "tar_member_outside"),
        ("a.tar/back\\slash.png", "bad_path"),
        ("a.tar/good.png", "tar_member_twice"),
        ("a.tar/new\\nline.png", "bad_path"),
        ("a.tar/x.mask.png", "second_picture"),
        ("a.tar/z.gif", "format_not_supported"),
        ("a.tar/…/secret.png".replace("/…", "/…"), "tar_member_outside"),
        ("b.tar.gz", "archive"),
        ("l.tar/link.png", "tar_member_kind"),
        ("loose.png", "not_in_tar"),
        ("o.tar", "link_outside"),
    ]
    assert all(each.path.isprintable() and each.sentence.isprintable() for each in result.rejects)


def test_a_damaged_tar_stops_ingest_or_is_left_out_whole(shards: Path) -> None:
    data = (shards / "1.tar").read_bytes()
    (shards / "1.tar").write_bytes(data[:2048])
    (shards / "more" / "2.tar").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"2 tars .*1\.tar: .*truncated.*byte \d+, after 1 whole .*2\.tar.*Fetch again"
    ) as caught:
        run(webdataset(shards))
    assert "\n" not in str(caught.value)
    result = run(webdataset(shards, damaged_tars="reject"))
    assert rows(result).keys() == {"0.tar/a.png", "0.tar/d/b.PNG"}
    assert reasons(result) == {"1.tar": "tar_damaged", "more/2.tar": "tar_damaged"}


def test_a_tar_that_changed_since_ingest_is_named(shards: Path) -> None:
    manifest = run(webdataset(shards)).manifest
    row = rows(run(webdataset(shards)))["0.tar/a.png"]
    place = manifest.picture(0)
    assert isinstance(place, ByteRange)
    data = bytearray((shards / "0.tar").read_bytes())
    data[place.offset + 100] ^= 1
    (shards / "0.tar").write_bytes(data)
    with pytest.raises(ImageRejected, match=r"0\.tar:a\.png as it was ingested"):
        open_image(place, sha256=row["sha256"])
    (shards / "0.tar").write_bytes(data[: place.offset + 10])
    with pytest.raises(ImageRejected, match=r"0\.tar:a\.png as it was ingested, found the archive shorter"):
        open_image(place, sha256=row["sha256"])
    (shards / "0.tar").unlink()
    with pytest.raises(ImageRejected, match="readable") as caught:
        open_image(place, sha256=row["sha256"])
    assert caught.value.reason == "missing"


def test_captions_in_tars_are_checked_as_files_are(tmp_path: Path) -> None:
    captions = {"latin": "café".encode("latin-1"), "large": b"a," * 2**20, "binary": b"a\0b", "fine": b"\xef\xbb\xbfa"}
    members = [(f"{name}.png", png(at)) for at, name in enumerate(captions)]
    members += [(f"{name}.txt", text) for name, text in captions.items()]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.tar").write_bytes(packed(members))
    result = run(webdataset(tmp_path / "t"))
    assert tags(result) == {"a.tar/fine.png": ["a"]}
    assert reasons(result) == {
        "a.tar/latin.png": "caption_not_utf8",
        "a.tar/large.png": "caption_too_large",
        "a.tar/binary.png": "caption_invalid",
    }


# --- the manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("archive", "../0.tar", "stays below"),
        ("archive", "/etc/passwd", "stays below"),
        ("archive", "1.tar", "beginning of the path"),
        ("archive", None, "an offset where there is an archive"),
        ("offset", None, "an offset where there is an archive"),
        ("offset", -512, "multiple of 512"),
        ("offset", 513, "multiple of 512"),
        ("offset", 0, "multiple of 512"),
        ("file_bytes", 0, "at least 1 byte"),
    ],
)
def test_rows_of_members_that_cannot_be_are_refused(
    shards: Path, tmp_path: Path, column: str, value: Any, complaint: str
) -> None:
    sound = run(webdataset(shards)).manifest
    content = sound.table.to_pydict() | {column: [value, *sound.table[column].to_pylist()[1:]]}
    broken = Manifest(pa.table(content, schema=sound.table.schema), sound.sources)
    with pytest.raises(ManifestError, match=complaint):
        write_manifest(broken, tmp_path / "m.parquet")


def test_a_manifest_without_tars_is_as_before(tmp_path: Path) -> None:
    draw(tmp_path / "p" / "a.png", caption="x")
    manifest = run(SourceConfig(tmp_path / "p")).manifest
    assert (manifest.version, "archive" in manifest.table.schema.names) == (1, False)
    (tmp_path / "p" / "a.png").unlink()
    (tmp_path / "p" / "a.png").symlink_to(draw(tmp_path / "secret.png"))
    with pytest.raises(ImageRejected, match="out of it") as caught:
        manifest.picture(0)
    assert caught.value.reason == "link_outside"
