"""Folders in, manifest and rejects out: the conventions, the refusals, and that the user's files stay as they were."""

import csv
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dying_decoder import inspect_chunk
from malformed import MALFORMED, encoded
from PIL import Image

from sumizome.cli import ingest as cli
from sumizome.data import verification
from sumizome.data.ingest import IngestResult, ingest, ingest_to
from sumizome.data.ingest_tables import rejects_path
from sumizome.data.manifest import load_manifest
from sumizome.errors import ConfigError, DataError


def draw(path: Path, seed: int = 0, caption: str | None = None, size: tuple[int, int] = (20, 16)) -> Path:
    """A picture of (height, width) with a caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(array).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def rows(result: IngestResult) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in result.manifest.table.to_pylist()}


def reasons(result: IngestResult) -> dict[str, str]:
    found = {reject.path: reject.reason for reject in result.rejects}
    assert len(found) == len(result.rejects), "one reason a file"
    return found


def run(*sources: Path) -> IngestResult:
    return ingest(sources, workers=0)


# --- conventions ------------------------------------------------------------------------------------------------------


def test_the_suffix_of_a_caption_may_be_in_upper_case(tmp_path: Path) -> None:
    for seed, name in enumerate(["a.png", "b.PNG", "c.png"]):
        draw(tmp_path / name, seed)
    (tmp_path / "a.TXT").write_text("loud")
    (tmp_path / "b.Caption").write_text("mixed")
    (tmp_path / "c.txt").write_text("the usual one")
    (tmp_path / "c.TXT").write_text("another")
    result = run(tmp_path)
    assert {path: row["tags"] for path, row in rows(result).items()} == {
        "a.png": ["loud"],
        "b.PNG": ["mixed"],
        "c.png": ["the usual one"],
    }
    assert (result.rejects, result.captions_missing) == ([], 0)


def test_wide_spaces_and_joined_emoji_are_ordinary_names(tmp_path: Path) -> None:
    names = ["\u521d\u97f3\u3000\u30df\u30af.png", "\U0001f469\u200d\U0001f4bb.png", "a\u00a0b.png"]
    for seed, name in enumerate(names):
        draw(tmp_path / "pictures" / name, seed, caption=f"tag {seed}")
    result = ingest_to(tmp_path / "m.parquet", [tmp_path / "pictures"], workers=0)
    assert sorted(rows(result)) == sorted(names)
    assert len(load_manifest(tmp_path / "m.parquet")) == 3


def test_a_table_of_somebody_elses_is_not_written_over(tmp_path: Path) -> None:
    draw(tmp_path / "pictures" / "a.png")
    table = tmp_path / "posts.parquet"
    pq.write_table(pa.table({"id": [1], "tags": ["a"]}), table)
    before = table.read_bytes()
    with pytest.raises(ConfigError, match=r"posts\.parquet is a table that ingest did not write"):
        ingest_to(table, [tmp_path / "pictures"], workers=0)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["posts.parquet"]
    assert table.read_bytes() == before
    for damaged in (before[:-9], b""):  # what may have been a manifest is
        table.write_bytes(damaged)
        ingest_to(table, [tmp_path / "pictures"], workers=0)
        assert len(load_manifest(table)) == 1


def test_a_folder_whose_path_is_no_utf8_is_named(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    os.utime(draw(folder / "a.png"), (1e9, 1e9))
    with pytest.raises(ConfigError, match=r"caf\\udce9: rename it"):
        run(folder)


def test_a_row_says_what_the_file_is(tmp_path: Path) -> None:
    path = draw(tmp_path / "sub" / "a.png", caption="1girl, blue_hair ||| ^_^")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows(run(tmp_path)) == {
        "sub/a.png": {
            "id": digest[:16],
            "source": 0,
            "path": "sub/a.png",
            "sha256": digest,
            "file_bytes": path.stat().st_size,
            "format": "PNG",
            "height": 20,
            "width": 16,
            "tags": ["1girl", "blue hair", "^_^"],
            "kept_tags": 2,
            "repeats": 1,
        }
    }


def test_sizes_are_those_of_the_upright_picture_and_formats_those_of_the_content(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 24))
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "really.png", "JPEG")
    image.save(tmp_path / "UPPER.WEBP", "WEBP")
    found = {path: (row["format"], row["height"], row["width"]) for path, row in rows(run(tmp_path)).items()}
    assert found == {"turned.jpg": ("JPEG", 40, 24), "really.png": ("JPEG", 24, 40), "UPPER.WEBP": ("WEBP", 24, 40)}


def test_captions_come_from_txt_then_caption_then_metadata(tmp_path: Path) -> None:
    for index, name in enumerate(["both.png", "only.png", "meta.jpg", "none.webp", "empty.png"]):
        draw(tmp_path / name, index)
    (tmp_path / "both.txt").write_text("from txt")
    (tmp_path / "both.caption").write_text("from caption")
    (tmp_path / "only.caption").write_bytes(b"\xef\xbb\xbffrom caption")  # a byte order mark is no part of a tag
    (tmp_path / "empty.txt").write_text(" , \n")
    lines = [{"file_name": "meta.jpg", "text": "from_metadata, 2girls"}, {"file_name": "only.png", "text": "unused"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "notes.md").write_text("passed over")
    result = run(tmp_path)
    assert {path: row["tags"] for path, row in rows(result).items()} == {
        "both.png": ["from txt"],
        "only.png": ["from caption"],
        "meta.jpg": ["from metadata", "2girls"],
        "none.webp": [],
        "empty.png": [],
    }
    assert result.rejects == []
    counts = result.captions_missing, result.captions_empty, result.captions_doubled, result.files_ignored
    assert counts == (1, 1, 2, 1)


def test_metadata_is_relative_to_its_folder_and_each_bad_line_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    draw(root / "split" / "images" / "a.png", 1)
    draw(tmp_path / "secret.png")
    lines = [
        json.dumps({"file_name": "images/a.png", "text": "good"}),
        json.dumps({"file_name": "./images//a.png", "text": "again"}),
        json.dumps({"file_name": "../../secret.png", "text": "out"}),
        json.dumps({"file_name": str(tmp_path / "secret.png"), "text": "out"}),
        json.dumps({"file_name": "images/b.png", "text": "not there"}),
        json.dumps({"file_name": "metadata.jsonl", "text": "no picture"}),
        json.dumps({"file_name": "images/a.png"}),
        json.dumps({"file_name": 3, "text": "t"}),
        json.dumps({"file_name": "images/a.png", "text": ["list"]}),
        json.dumps(["a", "b"]),
        "{broken",
        "[" * 100_000,
        json.dumps({"file_name": "nul\0.png", "text": "t"}),
    ]
    (root / "split" / "metadata.jsonl").write_text("\n".join(lines))
    result = run(root)
    assert rows(result)["split/images/a.png"]["tags"] == ["good"]
    expected = ["twice", "outside", "outside", "without_image", "without_image", *["invalid"] * 6, "without_image"]
    assert reasons(result) == {
        f"split/metadata.jsonl:{number}": f"metadata_{reason}" for number, reason in enumerate(expected, start=2)
    }


def test_kohya_folders_repeat_and_years_do_not(tmp_path: Path) -> None:
    names = [
        "10_cat/a.png",
        "10_cat/deeper/b.png",
        "3_x/2_y/c.png",
        "2023_summer/d.png",
        "e.png",
        "12/f.png",
        "5_/g.png",
    ]
    for index, name in enumerate([*names, "0_off/h.png"]):
        draw(tmp_path / "7_root" / name, index)
    result = run(tmp_path / "7_root")
    assert {path: row["repeats"] for path, row in rows(result).items()} == dict(
        zip(names, [10, 10, 2, 1, 1, 1, 1], strict=True)
    )
    assert reasons(result) == {"0_off/h.png": "zero_repeats"}
    root = tmp_path / "7_root"
    assert result.repeats == {root / "0_off": 0, root / "10_cat": 10, root / "3_x/2_y": 2}


def test_byte_identical_pictures_are_kept_counted_and_told_apart(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c/d.png"):
        draw(tmp_path / "one" / name, seed=1, caption=name)
    draw(tmp_path / "two" / "a.png", seed=1)
    draw(tmp_path / "two" / "z.png", seed=2)
    result = run(tmp_path / "one", tmp_path / "two")
    table = result.manifest.table.to_pylist()
    short = table[0]["sha256"][:16]
    assert [(row["source"], row["path"], row["id"]) for row in table] == [
        (0, "a.png", short),
        (0, "b.png", f"{short}-2"),
        (0, "c/d.png", f"{short}-3"),
        (1, "a.png", f"{short}-4"),
        (1, "z.png", table[4]["sha256"][:16]),
    ]
    assert result.duplicates == 3
    assert result.manifest.picture(3) == (tmp_path / "two" / "a.png").resolve()


def test_odd_but_legal_names_and_tags_pass(tmp_path: Path) -> None:
    for index, name in enumerate(["ünï cödé 墨染.png", "=1+1.png", "a,b'\"<c>.png", "-rf.png", "#.png", "x.y.z.png"]):
        draw(tmp_path / name, index, caption='<3, "hm", &amp;, =cmd|calc')
    found = rows(run(tmp_path))
    assert len(found) == 6
    assert all(row["tags"] == ["<3", '"hm"', "&amp;", "=cmd|calc"] for row in found.values())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_each_malformed_picture_gets_its_reason_and_the_good_ones_stay(tmp_path: Path) -> None:
    for name, (data, _) in MALFORMED.items():
        (tmp_path / name).write_bytes(data)
    draw(tmp_path / "good.png", caption="1girl")
    result = ingest([tmp_path], workers=2)
    assert list(rows(result)) == ["good.png"]
    assert reasons(result) == {name: reason for name, (_, reason) in MALFORMED.items()}


def test_captions_that_cannot_be_read_reject_their_picture(tmp_path: Path) -> None:
    captions = {
        "latin": ("café".encode("latin-1"), "caption_not_utf8"),
        "utf16": ("1girl".encode("utf-16"), "caption_not_utf8"),
        "large": (b"a," * 2**20, "caption_too_large"),
        "binary": (b"1girl\0\x01", "caption_invalid"),
        "many": (",".join(map(str, range(2001))).encode(), "caption_invalid"),
        "long": (b"x" * 257, "caption_invalid"),
        "marked": (b"a ||| b ||| c", "caption_invalid"),
    }
    for index, (stem, (data, _)) in enumerate(captions.items()):
        draw(tmp_path / f"{stem}.png", index)
        (tmp_path / f"{stem}.txt").write_bytes(data)
    draw(tmp_path / "folder.png", 50)
    (tmp_path / "folder.caption").mkdir()  # a folder is no caption
    draw(tmp_path / "pipe.png", 51)
    os.mkfifo(tmp_path / "pipe.txt")
    result = run(tmp_path)
    expected = {f"{stem}.png": reason for stem, (_, reason) in captions.items()}
    assert reasons(result) == expected | {"pipe.png": "caption_unreadable"}
    assert list(rows(result)) == ["folder.png"]


def test_what_is_not_used_is_reported(tmp_path: Path) -> None:
    draw(tmp_path / "good.png", caption="a")
    (tmp_path / "moving.gif").write_bytes(encoded(Image.new("RGB", (20, 20)), "GIF"))
    (tmp_path / "moving.txt").write_text("has its picture, if an unusable one")
    (tmp_path / "lonely.txt").write_text("1girl")
    (tmp_path / "lonely.caption").write_text("1girl")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("new\nline.png", "escape\x1b[31m.png", "back\\slash.png", "\u202egnp.png"):
        draw(tmp_path / name)
    draw(tmp_path / "plain.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    result = run(tmp_path)
    assert reasons(result) == {
        "moving.gif": "format_not_supported",
        "lonely.txt": "caption_without_image",
        "lonely.caption": "caption_without_image",
        "pipe.png": "not_a_file",
        "new\\nline.png": "bad_path",
        "escape\\x1b[31m.png": "bad_path",
        "back\\slash.png": "bad_path",
        "\\u202egnp.png": "bad_path",
        "\\udcff.png": "bad_path",
    }
    assert all(reject.path.isprintable() and reject.sentence.isprintable() for reject in result.rejects)


def test_links_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    draw(outside / "private.png", caption="secret")
    draw(root / "inner.png", 1, caption="mine")
    draw(root / "captioned.png", 2)
    (root / "stolen.png").symlink_to(outside / "private.png")
    (root / "captioned.txt").symlink_to(outside / "private.txt")
    (root / "again.png").symlink_to("inner.png")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "circle.png").symlink_to("circle.png")
    (root / "metadata.jsonl").symlink_to(outside / "metadata.jsonl")
    (outside / "metadata.jsonl").write_text(json.dumps({"file_name": "inner.png", "text": "secret"}))
    (tmp_path / "alias").symlink_to(root)
    result = run(tmp_path / "alias")
    assert {path: row["tags"] for path, row in rows(result).items()} == {"again.png": [], "inner.png": ["mine"]}
    assert reasons(result) == {
        "stolen.png": "link_outside",
        "captioned.png": "link_outside",
        "metadata.jsonl": "link_outside",
        "folder": "linked_folder",
        "loop": "linked_folder",
        "dangling.png": "missing",
        "circle.png": "unreadable",
    }


def test_sources_that_cannot_be_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    file = draw(tmp_path / "full" / "a.png")
    cases = [
        ([], ConfigError, "at least one folder"),
        ([tmp_path / "missing"], ConfigError, "found nothing at .*missing"),
        ([file], ConfigError, "found a file at .*a.png"),
        ([tmp_path / "empty"], DataError, "none below .*empty"),
        ([tmp_path / "full", tmp_path / "full"], ConfigError, "apart from each other"),
        ([tmp_path / "full", tmp_path], ConfigError, "apart from each other"),
    ]
    for sources, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            ingest_to(tmp_path / "out" / "m.parquet", sources, workers=0)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="workers"):
        ingest([tmp_path / "full"], workers=-1)


def test_nothing_is_written_into_a_source(tmp_path: Path) -> None:
    draw(tmp_path / "full" / "a.png")
    (tmp_path / "way_in").symlink_to(tmp_path / "full")
    (tmp_path / "folder.parquet").mkdir()
    for place in ("full/m.parquet", "full/new/m.parquet", "way_in/m.parquet", "full/../full/m.parquet"):
        with pytest.raises(ConfigError, match="never written to"):
            ingest_to(tmp_path / place, [tmp_path / "full"], workers=0)
    for place in ("out", "m.csv", "folder.parquet"):
        with pytest.raises(ConfigError, match=r"\.parquet file"):
            ingest_to(tmp_path / place, [tmp_path / "full"], workers=0)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["a.png"]


# --- the whole --------------------------------------------------------------------------------------------------------


def snapshot(root: Path) -> dict[str, tuple[int, int, str]]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    } | {str(path): (path.stat().st_mtime_ns, 0, "") for path in [root, *root.rglob("*")] if path.is_dir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty good pictures and three bad ones, in two folders."""
    root = tmp_path / "pictures"
    for index in range(40):
        draw(root / ("5_cats" if index % 3 else "dogs") / f"{index}.png", index % 30, caption=f"tag_{index % 4}, all")
    for name in ("zero_bytes.png", "cut_in_half.jpg", "text.jpg"):
        (root / name).write_bytes(MALFORMED[name][0])
    return root


def test_the_users_folder_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    before = snapshot(folder)
    ingest_to(tmp_path / "out" / "m.parquet", [folder], workers=1)
    assert snapshot(folder) == before


def test_the_result_is_the_same_with_any_number_of_workers_and_any_listing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers in (0, 1, 3):
        ingest_to(tmp_path / f"{workers}" / "m.parquet", [folder], workers=workers)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: sorted(scandir(path), key=lambda entry: entry.name, reverse=True))
    ingest_to(tmp_path / "reversed" / "m.parquet", [folder], workers=0)
    outputs = [tmp_path / name for name in ("0", "1", "3", "reversed")]
    for name in ("m.parquet", "m.rejects.csv"):
        assert len({(output / name).read_bytes() for output in outputs}) == 1


def test_manifest_and_rejects_are_written_and_replaced_whole(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "m.parquet"
    steps: list[tuple[int, int]] = []
    result = ingest_to(
        path, [folder], background=(1, 2, 3), workers=0, progress=lambda done, total: steps.append((done, total))
    )
    listed = [done for done, total in steps if total == 0]
    assert listed == sorted(listed) and listed[-1] == 43, "what was found so far, folder by folder"
    assert steps[len(listed) :] == [(done, 43) for done in range(1, 44)]
    read = load_manifest(path)
    assert read.digest == result.manifest.digest
    assert (len(read), read.background, read.sources) == (40, (1, 2, 3), (folder,))
    assert result.duplicates == 10
    (folder / "dogs" / "0.png").unlink()
    ingest_to(path, [folder], workers=0)
    assert len(load_manifest(path)) == 39
    found = {file.name for file in path.parent.iterdir() if not file.name.startswith(".")}
    assert found <= {"m.decoded", "m.duplicates.csv", "m.mismatches.csv", "m.parquet", "m.rejects.csv"}
    assert found >= {"m.duplicates.csv", "m.mismatches.csv", "m.parquet", "m.rejects.csv"}


def test_the_rejects_file_is_safe_in_a_spreadsheet(tmp_path: Path) -> None:
    root = tmp_path / "root"
    draw(root / "good.png")
    names = ["=cmd|' calc'!A0.png", "+1.png", "-1.png", "@sum.png", '"quoted", and.png', "plain.png"]
    for name in names:
        (root / name).write_bytes(b"")
    path = tmp_path / "m.parquet"
    ingest_to(path, [root], workers=0)
    with rejects_path(path).open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["source", "path", "reason", "sentence"]
    assert sorted(line[1] for line in lines) == sorted("'" + name if name[0] in "=+-@" else name for name in names)
    assert {line[2] for line in lines} == {"empty_file"}
    assert not any(cell[:1] in "=+-@\t\r" for line in lines for cell in line)


def test_with_no_usable_picture_the_rejects_are_written_and_the_manifest_is_not(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 rejects and nothing else, most often empty_file .*: see .*m.rejects.csv"):
        ingest_to(tmp_path / "m.parquet", [tmp_path / "root"], workers=0)
    assert not (tmp_path / "m.parquet").exists()
    assert "empty_file" in rejects_path(tmp_path / "m.parquet").read_text()


def test_a_picture_that_kills_or_holds_its_decoder_is_named_and_the_rest_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    culprits = {"7_kill.png", "8_crash.png", "dogs/spin.png", "dogs/sleep.png"}
    for name in culprits:
        draw(folder / name)
    expected = ingest([folder], workers=0)
    monkeypatch.setattr(verification, "_inspect_chunk", inspect_chunk)
    result = ingest([folder], workers=2)
    died = {path for path, reason in reasons(result).items() if reason == "decoder_died"}
    assert died == culprits
    assert rows(result).keys() == rows(expected).keys() - died


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux keeps the limit")
def test_a_picture_that_takes_too_much_memory_is_named_and_the_rest_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (6000, 6000)).save(folder / "hungry.png")
    assert "hungry.png" in rows(ingest([folder], workers=1))
    monkeypatch.setattr(verification, "MAX_MEMORY_BYTES", 100 << 20)  # of 144 MB that its pixels take
    result = ingest([folder], workers=1)
    assert reasons(result)["hungry.png"] == "out_of_memory"
    assert len(result.manifest) == 40


def test_the_command_prints_what_came_in_and_what_did_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (folder / "[bold]odd[red].png").write_bytes(b"")
    manifest = tmp_path / "out" / "m.parquet"
    cli.run(cli.Command((folder,), manifest, background="#102030", workers=0))
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert {"pictures 40", "different tags 5", "without a caption 0", "rejected 4"} <= set(lines)
    assert "byte-identical to another 10" in lines
    assert "most frequent: all 40, tag 0 10, tag 1 10, tag 2 10, tag 3 10" in lines
    assert f"repeats 5: {folder / '5_cats'}" in lines
    assert any(line.startswith("empty_file 2") for line in lines)
    assert any("[bold]odd[red].png" in line for line in lines)
    assert any(line.startswith("truncated 1 cut_in_half.jpg") for line in lines)
    assert lines[-1] == f"wrote {manifest}"
    assert load_manifest(manifest).background == (16, 32, 48)
