"""Dumps, sidecars and metadata JSON beside pictures: each picture a row or a reject, no name a path."""

import csv
import hashlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ingest import draw, reasons, rows

from sumizome.cli import ingest as cli
from sumizome.data import matching
from sumizome.data.ingest import IngestResult, ingest, ingest_to
from sumizome.data.manifest import load_manifest
from sumizome.data.picture_list import Namesakes, Picture, stem
from sumizome.data.source_config import Columns, PictureRules, SourceConfig
from sumizome.data.source_file import load_sources
from sumizome.data.sources import scan_source
from sumizome.errors import ConfigError, DataError


def run(*sources: SourceConfig) -> IngestResult:
    return ingest(sources, workers=0)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_lines(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, content)))
    return path


def tags(result: IngestResult) -> dict[str, list[str]]:
    return {path: row["tags"] for path, row in rows(result).items()}


def test_a_booru_dump_finds_its_pictures_by_id_and_md5_in_any_folder(tmp_path: Path) -> None:
    root = tmp_path / "images"
    draw(root / "0012" / "12.png", 1)
    draw(root / "13.JPG.png", 2)  # its stem is 13.JPG: no record
    draw(root / "14.webp", 3)
    sharded = draw(root / "new.png", 4)
    digest = md5(sharded)
    sharded = sharded.rename((root / digest[:2]).with_name(f"{digest.upper()}.png"))
    content = [
        {"id": 12, "md5": None, "tag_string_general": "by_id", "tag_string_artist": "some_one"},
        {"id": 99, "md5": digest, "tag_string_general": "by_md5", "tag_string_artist": "some_one"},
        {"id": 100, "tag_string_general": "nothing_there"},
        {"id": 14, "md5": "0" * 32, "tag_string_general": "not_what_it_says"},
    ]
    table = write_lines(tmp_path / "posts.jsonl", content)
    result = run(SourceConfig(root, "booru", table))
    assert tags(result) == {"0012/12.png": ["some one", "by id"], sharded.name: ["some one", "by md5"]}
    assert reasons(result) == {"13.JPG.png": "record_missing", "14.webp": "md5_mismatch"}
    assert result.records_unused == 1
    assert result.manifest.categories == {"some one": "artist"}
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "posts.parquet")
    again = run(SourceConfig(root, "booru", tmp_path / "posts.parquet"))
    assert again.manifest.table.to_pylist() == result.manifest.table.to_pylist()
    assert again.manifest.digest == result.manifest.digest
    assert (again.rejects, again.records_unused) == (result.rejects, 1)


@pytest.mark.parametrize("table", ["p.parquet", "decimal.parquet", "text.parquet", "p.csv", "p.jsonl"])
def test_ids_that_pandas_made_floats_of_are_whole_numbers(tmp_path: Path, table: str) -> None:
    """One id that is missing, and 12 is written as 12.0."""
    root, floats = tmp_path / "images", pa.array([12.0, None, 13.0, 99.0], pa.float64())
    for number in (12, 13):
        draw(root / f"{number}.png", number)
    ids = {"decimal.parquet": pa.decimal128(20, 2), "text.parquet": pa.string()}.get(table)
    texts = pa.array(["12.0", None, "13.0", "99.0"])
    column = texts if table == "text.parquet" else floats.cast(ids) if ids else floats
    rows = pa.table({"id": column, "tags": ["twelve", "lost", "thirteen", "away"]})
    if table.endswith("parquet"):
        pq.write_table(rows, tmp_path / table)
    elif table == "p.csv":
        (tmp_path / table).write_text("id,tags\n12.0,twelve\n,lost\n13.0,thirteen\n99.0,away\n")
    else:
        write_lines(tmp_path / table, rows.to_pylist())
    result = run(SourceConfig(root, "booru", tmp_path / table))
    assert tags(result) == {"12.png": ["twelve"], "13.png": ["thirteen"]}
    assert (result.rejects, result.records_unused) == ([], 2)


def test_an_id_that_is_no_whole_number_is_told_by_line(tmp_path: Path) -> None:
    root = tmp_path / "images"
    digest = md5(draw(root / "12.png", 1))
    ids = [12.0, float("nan"), 12.5, 2.0**60, float("nan")]
    table = pa.table({"id": ids, "md5": [None] * 4 + [digest], "tags": ["a"] * 5})
    pq.write_table(table, tmp_path / "p.parquet")
    result = run(SourceConfig(root, "booru", tmp_path / "p.parquet"))
    assert tags(result) == {"12.png": ["a"]}
    assert reasons(result) == dict.fromkeys([f"p.parquet:{row}" for row in (2, 3, 4)], "record_invalid")
    told = {reject.path: reject.sentence for reject in result.rejects}
    assert "whole number or text, found nan (or a float too short" in told["p.parquet:2"]
    assert result.records_unused == 1, "the last row has an md5, by which no file is called"


@pytest.mark.parametrize(("kind", "exact"), [(pa.float32(), 2**24), (pa.float16(), 2**11)])
def test_an_id_that_a_short_float_has_rounded_gives_no_picture_anothers_tags(
    tmp_path: Path, kind: pa.DataType, exact: int
) -> None:
    root = tmp_path / "images"
    for number in (exact - 1, exact):
        draw(root / f"{number}.png", number % 7)
    ids = pa.array([exact - 1, exact + 1], pa.float64()).cast(kind, safe=False)  # the second is stored as `exact`
    pq.write_table(pa.table({"id": ids, "tags": ["mine", "another's"]}), tmp_path / "p.parquet")
    result = run(SourceConfig(root, "booru", tmp_path / "p.parquet"))
    assert tags(result) == {f"{exact - 1}.png": ["mine"]}
    assert reasons(result)["p.parquet:2"] == "record_invalid"


def test_names_in_records_select_files_and_are_never_opened(tmp_path: Path) -> None:
    root = tmp_path / "images"
    draw(root / "a" / "good.png", 1)
    draw(tmp_path / "secret.png", 2)
    names = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "a/../../secret.png",
        "nul\0.png",
        "a",
        "",
        "C:\\secret.png",
    ]
    content: list[dict[str, Any]] = [{"file_name": name, "tags": "out"} for name in names]
    content += [{"id": name, "tags": "out"} for name in ("../secret", "/etc/passwd", "..", True, None, 1.5, ["x"])]
    fraction = content.index({"id": 1.5, "tags": "out"}) + 1
    content += [{"file_name": ".\\a\\good.png", "tags": "mine"}, {"file_name": "a/good.png", "tags": "again"}]
    result = run(SourceConfig(root, "booru", write_lines(tmp_path / "x.jsonl", content)))
    assert tags(result) == {"a/good.png": ["mine"]}
    assert reasons(result) == {f"x.jsonl:{fraction}": "record_invalid", f"x.jsonl:{len(content)}": "record_twice"}
    assert result.records_unused == len(content) - 3


def test_gallery_dl_sidecars(tmp_path: Path) -> None:
    root, outside = tmp_path / "images", tmp_path / "outside"
    outside.mkdir()
    good = draw(root / "danbooru" / "danbooru_1_x.png", 1, caption="not read")
    sidecar = {"category": "danbooru", "md5": md5(good), "tags_artist": ["art_ist"], "tags_general": ["1girl"]}
    Path(f"{good}.json").write_text(json.dumps(sidecar))
    bad = {
        "broken.png": "{",
        "list.png": "[]",
        "types.png": '{"tags": 3}',
        "bom.png": '\ufeff{"tags": "after a mark"}',
        "control.png": json.dumps({"tags": ["a\x01b"]}),
        "large.png": " " * (5 << 20),
    }
    for index, (name, text) in enumerate(bad.items()):
        draw(root / name, 10 + index)
        (root / f"{name}.json").write_text(text)
    draw(root / "none.png", 2)
    draw(root / "linked.png", 3)
    (outside / "secret.json").write_text('{"tags": "secret"}')
    (root / "linked.png.json").symlink_to(outside / "secret.json")
    (root / "lonely.png.json").write_text("{}")
    (root / "moving.gif").write_bytes(b"GIF89a")
    result = run(SourceConfig(root, "gallery-dl"))
    assert tags(result) == {
        "danbooru/danbooru_1_x.png": ["art ist", "1girl"],
        "bom.png": ["after", "a", "mark"],
    }
    assert reasons(result) == {
        "broken.png": "record_invalid",
        "list.png": "record_invalid",
        "types.png": "record_invalid",
        "control.png": "caption_invalid",
        "large.png": "record_invalid",
        "none.png": "record_missing",
        "linked.png": "link_outside",
        "moving.gif": "format_not_supported",
    }
    assert all(each.sentence.isprintable() for each in result.rejects)


def test_kohya_metadata(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for index, name in enumerate(["a/one.png", "a/two.png", "b/three.png", "four.png", "5_x/five.png", "six.png"]):
        draw(root / name, index)
    content = {
        str(root / "a/one.png"): {"tags": "1girl, blue hair", "train_resolution": [64, 64]},
        "a/two": {"caption": "a girl", "tags": "solo"},
        "D:\\elsewhere\\three.png": {"tags": "moved, single_tag"},
        "four": {"tags": "blue hair"},
        "five.png": {"caption": "plain words"},
        "six": "no object",
        "../../etc/passwd": {"tags": "x"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(content))
    result = run(SourceConfig(root, "kohya", tmp_path / "meta.json"))
    assert tags(result) == {
        "a/one.png": ["1girl", "blue hair"],
        "a/two.png": ["a girl", "solo"],
        "b/three.png": ["moved", "single tag"],
        "four.png": ["blue hair"],
        "5_x/five.png": ["plain words"],
    }
    assert rows(result)["5_x/five.png"]["repeats"] == 5
    assert reasons(result) == {"six.png": "record_missing", "meta.json:six": "record_invalid"}
    assert result.records_unused == 1
    for text in ("[]", "{", ""):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(DataError, match=r"meta\.json"):
            run(SourceConfig(root, "kohya", tmp_path / "meta.json"))


def test_kohya_names_that_several_folders_have_go_by_the_folders_of_the_record(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for index, name in enumerate(["a/001.png", "b/001.png", "c/002.png", "d/002.png", "e/003.png", "e/003.webp"]):
        draw(root / name, index)
    content = {
        "/old/place/b/001.png": {"tags": "dog"},
        "/old/place/a/001.png": {"tags": "cat"},
        "002": {"tags": "which of them"},
        "/old/e/003.png": {"tags": "bird"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(content))
    result = run(SourceConfig(root, "kohya", tmp_path / "meta.json"))
    birds = {"e/003.png": ["bird"], "e/003.webp": ["bird"]}
    assert tags(result) == {"a/001.png": ["cat"], "b/001.png": ["dog"], **birds}
    assert reasons(result) == {
        "meta.json:002": "record_ambiguous",
        "c/002.png": "record_missing",
        "d/002.png": "record_missing",
    }


def test_half_of_an_emoji_in_a_dump_costs_its_own_picture_only(tmp_path: Path) -> None:
    for number in (1, 2):
        draw(tmp_path / "images" / f"{number}.png", number)
    (tmp_path / "posts.jsonl").write_text('{"id": 1, "caption": "cut \\ud83d"}\n{"id": 2, "caption": "whole"}')
    result = run(SourceConfig(tmp_path / "images", "booru", tmp_path / "posts.jsonl"))
    assert tags(result) == {"2.png": ["whole"]}
    assert reasons(result) == {"1.png": "record_invalid"}


def test_several_sources_in_one_manifest_from_a_file(tmp_path: Path) -> None:
    draw(tmp_path / "plain" / "3_x" / "a.png", 1, caption="folder")
    draw(tmp_path / "booru" / "1.png", 2)
    write_lines(tmp_path / "b.jsonl", [{"number": 1, "words": ["table"], "by": "an artist;another"}])
    (tmp_path / "sources.toml").write_text(
        f"""
        [[source]]
        folder = "{tmp_path}/plain"
        repeats = 2
        [source.rules]
        min_side = 8
        [[source]]
        folder = "{tmp_path}/booru"
        kind = "booru"
        records = "{tmp_path}/b.jsonl"
        [source.columns]
        id = "number"
        tags = ["words"]
        separator = ";"
        categories = {{ artist = "by" }}
        """
    )
    first, second = load_sources(tmp_path / "sources.toml")
    assert first == SourceConfig(tmp_path / "plain", repeats=2, rules=PictureRules(min_side=8))
    assert second.columns == Columns(id=("number",), tags=("words",), separator=";", categories={"artist": ("by",)})
    manifest = tmp_path / "out" / "m.parquet"
    cli.run(cli.Command((), manifest, workers=0, sources=tmp_path / "sources.toml"))
    read = load_manifest(manifest)
    assert [(row["source"], row["path"], row["tags"], row["repeats"]) for row in read.table.to_pylist()] == [
        (0, "3_x/a.png", ["folder"], 6),
        (1, "1.png", ["an artist", "another"], 1),
    ]
    assert read.categories == {"an artist": "artist", "another": "artist"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "one .*source"),
        ("x = 1\n[[source]]\nfolder='a'", "unknown key 'x'"),
        ("[[source]]\n", "the key 'folder'"),
        ("[[source]]\nfolder='a'\n[[source]]\nfoldr='a'", "source 2: unknown key 'foldr'; did you mean 'folder'"),
        ("[[source]]\nfolder='a'\nrules={rating=['g']}", "did you mean 'ratings'"),
        ("[[source]]\nfolder='a'\nrepeats='2'", "repeats: expected a whole number"),
        ("[[source]]\nfolder='a'\nrepeats=true", "repeats: expected a whole number"),
        ("[[source]]\nfolder='a'\nrepeats=0", "repeats: expected 1 to"),
        ("[[source]]\nfolder='a'\nrules=3", "rules: expected a table"),
        ("[[source]]\nfolder='a'\nkind='boru'", "expected 'folder', 'booru'"),
        ("[[source]]\nfolder='a'\nkind='booru'", "expected records"),
        ("[[source]]\nfolder='a'\nrecords='b.jsonl'", "expected no records"),
        ("[[source]]\nfolder='a'\nrules={year='{year}'}", "a source of kind 'folder' has none"),
        ("[[source]]\nfolder='a'\nkind='gallery-dl'\nrules={quality=['best']}", "percentile=tag"),
        ("[[source]]\nfolder='a'\ncolumns={categories={artist=3}}", "categories.artist: expected text"),
        ("[[source", "not valid TOML"),
    ],
)
def test_a_source_file_that_cannot_be_is_one_clear_error(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_sources(tmp_path / "s.toml")
    assert str(tmp_path / "s.toml") in str(caught.value)


def test_what_is_read_is_never_written_over(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "1.png")
    posts = tmp_path / "posts.parquet"
    pq.write_table(pa.table({"id": [1], "tags": ["a"]}), posts)
    rejects = write_lines(tmp_path / "m.rejects.csv", [])
    before = posts.read_bytes()
    with pytest.raises(ConfigError, match="a file that is read"):
        ingest_to(posts, [SourceConfig(tmp_path / "images", "booru", posts)], workers=0)
    with pytest.raises(ConfigError, match="a file that is read"):
        ingest_to(tmp_path / "m.parquet", [SourceConfig(tmp_path / "images", "booru", rejects)], workers=0)
    assert posts.read_bytes() == before


def test_one_table_of_records_belongs_to_one_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one folder, found 2"):
        cli.run(cli.Command((tmp_path, tmp_path), tmp_path / "m.parquet", kind="booru", records=tmp_path / "x.jsonl"))
    with pytest.raises(ConfigError, match="set them in --sources"):
        cli.run(cli.Command((), tmp_path / "m.parquet", rules=PictureRules(min_side=3), sources=tmp_path / "s.toml"))


def test_records_are_compared_with_the_files(tmp_path: Path) -> None:
    root = tmp_path / "images"
    claims = [
        {"image_width": 16, "image_height": 20, "file_ext": "png"},
        {"width": 20, "height": 16},  # the other way up: EXIF turns pictures
        {"image_width": 1200, "image_height": 800, "file_ext": ".PNG"},  # a thumbnail
        {"width": "16", "height": 20.0, "file_ext": "jpg"},
        {"file": {"width": 1, "height": 1, "ext": "webp"}},
        {"width": 99, "file_ext": "mp4"},  # half a size and a suffix that is no picture's say nothing
        {"width": [1], "height": None, "file_ext": 3},
    ]
    for number in range(len(claims)):
        draw(root / f"{number}.png", number)
    content = [{"id": number, "tags": "a"} | each for number, each in enumerate(claims)]
    table = write_lines(tmp_path / "posts.jsonl", content)
    told = {"2.png": ("800×1200", "20×16"), "3.png": ("JPEG", "PNG"), "4.png": ("1×1 WEBP", "20×16 PNG")}
    result = ingest_to(tmp_path / "m.parquet", [SourceConfig(root, "booru", table)], workers=0)
    assert {line.path: (line.told, line.found) for line in result.mismatches} == told
    assert len(result.manifest) == len(claims)
    with (tmp_path / "m.mismatches.csv").open(newline="") as file:
        assert [line["path"] for line in csv.DictReader(file)] == sorted(told)
    strict = SourceConfig(root, "booru", table, rules=PictureRules(mismatch="reject"))
    assert reasons(run(strict)) == dict.fromkeys(told, "record_mismatch")
    pq.write_table(pa.table({"id": [2], "image_width": [1200], "image_height": [800]}), tmp_path / "p.parquet")
    (line,) = run(SourceConfig(root, "booru", tmp_path / "p.parquet")).mismatches
    assert (line.path, line.told) == ("2.png", "800×1200")


def test_sidecars_read_by_many_processes_say_what_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "images"
    for number in range(40):
        (root / f"{number}").mkdir(parents=True)
        (root / f"{number}" / "x.png").touch()
        text = "{" if number % 7 == 0 else json.dumps({"tags_artist": [f"tag_{number % 3}"], "score": number})
        (root / f"{number}" / "x.png.json").write_text(text)
    monkeypatch.setattr(matching, "_CHUNK", 3)
    monkeypatch.setattr(matching, "_FEW", 10)
    config = SourceConfig(root, "gallery-dl", rules=PictureRules(quality=("0=low", "50=good")))
    one, two = (scan_source(0, config, workers) for workers in (0, 2))
    assert list(one.entries()) == list(two.entries())
    assert one.rejects == two.rejects
    assert (len(one), len(one.rejects), one.categories) == (34, 6, two.categories)


def listed(paths: Sequence[str]) -> matching.PictureList:
    pictures = matching.PictureList()
    for path in paths:
        pictures.add(Picture(path, 1, 1))
    pictures.close()
    return pictures


@pytest.mark.parametrize("moved", ["", "/another/machine/"])
def test_kohya_names_are_not_compared_with_every_folder(monkeypatch: pytest.MonkeyPatch, moved: str) -> None:
    names = [f"{folder}/{number}.png" for folder in range(100) for number in range(4)]
    pictures = listed(names)
    looked: list[int] = []
    path = matching.PictureList.path
    monkeypatch.setattr(matching.PictureList, "path", lambda self, place: (looked.append(place), path(self, place))[1])
    rows = [(moved + name, {"tags": name.replace("/", " of ")}) for name in reversed(names)]
    monkeypatch.setattr(matching, "_kohya_rows", lambda table: iter(rows))
    matches = matching.Matches(len(names), PictureRules())
    matching.match_kohya(matches, pictures, Path("/nowhere"), Path("meta.json"), Columns())
    texts = matches.texts.close().to_pylist()
    assert [texts[row] for row in matches.place] == [path(pictures, at).replace("/", " of ") for at in range(400)]
    assert len(looked) <= 2 * len(names)  # not 100 times as many


folder_names = st.lists(st.sampled_from(["a", "b", "ab", "c "]), max_size=4)


@given(st.lists(st.tuples(folder_names, st.sampled_from(["x.png", "x.webp", "X.png"])), min_size=1), folder_names)
def test_the_nearest_namesake_is_the_one_that_comparing_with_all_finds(
    files: list[tuple[list[str], str]], wanted: list[str]
) -> None:
    def common(path: str) -> int:
        pairs = zip(path.split("/")[-2::-1], wanted[::-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    paths = sorted({"/".join([*folders, name]) for folders, name in files})
    found, count = Namesakes(listed(paths), range(len(paths))).nearest("/".join([*wanted, "x.png"]))
    best = max(map(common, paths))
    nearest = [place for place, path in enumerate(paths) if common(path) == best]
    assert count == len(nearest)
    assert found == (nearest if len({stem(paths[place]) for place in nearest}) == 1 else [])
