"""The report on data sets whose figures are known, and on one that is hostile from tag to file name."""

import csv
import json
import re
import tarfile
from io import BytesIO
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_text import HOSTILE, HTML, parse
from PIL import Image

from sumizome.cli import data_report as cli
from sumizome.data.buckets import BucketConfig
from sumizome.data.captions import CaptionConfig
from sumizome.data.ingest import ingest, ingest_to
from sumizome.data.manifest import SCHEMA, Manifest, load_manifest, write_manifest
from sumizome.data.source_config import DuplicateConfig, PictureRules, SourceConfig
from sumizome.data.stored_manifest import open_manifest
from sumizome.data.tags import TagWeightConfig
from sumizome.errors import ConfigError, DataError, ManifestError
from sumizome.models.text_encoding import chunk_prompt, count_chunks
from sumizome.report.data_report import ReportConfig, build_data_report, held_out, write_data_report
from sumizome.report.gallery import look_at
from sumizome.report.page import visible
from sumizome.train import build

TINY = ReportConfig(BucketConfig(64, 16), workers=0)


def manifest_of(tags: list[list[str]], paths: list[str] | None = None, root: Path = Path("/nowhere")) -> Manifest:
    count = len(tags)
    columns = {
        "id": [f"{row:016x}" for row in range(count)],
        "source": [0] * count,
        "path": paths or [f"{row}.png" for row in range(count)],
        "sha256": [f"{row:064x}" for row in range(count)],
        "file_bytes": [100] * count,
        "format": ["PNG"] * count,
        "height": [64 + 16 * (row % 3) for row in range(count)],
        "width": [64] * count,
        "tags": tags,
        "kept_tags": [0] * count,
        "repeats": [1 + row % 2 for row in range(count)],
    }
    return Manifest(pa.table(columns, schema=SCHEMA), (root,))


def page_of(manifest: Manifest, folder: Path, config: ReportConfig = TINY) -> Element:
    write_manifest(manifest, folder / "m.parquet")
    write_data_report(folder / "m.parquet", folder / "r.html", config)
    return parse((folder / "r.html").read_text(encoding="utf-8"))


def all_text(root: Element) -> set[str]:
    return {text for element in root.iter() for text in (element.text, element.tail) if text}


SAFE = [value for value in HOSTILE if "\ud800" not in value]  # Arrow holds no lone surrogate
PATHS = [f"{value.replace('/', '÷').replace(chr(0), '').replace(chr(92), '')}.png" for value in SAFE]


def test_every_hostile_tag_and_name_is_text(tmp_path: Path) -> None:
    def document(tags: list[list[str]], paths: list[str], folder: Path, category: str) -> Element:
        folder.mkdir()
        manifest = manifest_of(tags, paths)
        names = {tags[0][0]: category}
        manifest = Manifest(manifest.table, manifest.sources, categories=names)
        root = folder / "m.rejects.csv"
        with root.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["source", "path", "reason", "sentence"])
            writer.writerows(["/nowhere", paths[i], "truncated", tags[i][0]] for i in range(8))
        return page_of(manifest, folder)

    plain = [f"tag{index:03d}" for index in range(len(SAFE))]
    hostile = document([[each] for each in SAFE], PATHS, tmp_path / "a", SAFE[0])
    harmless = document([[each] for each in plain], [f"{p}.png" for p in plain], tmp_path / "b", plain[0])

    def elements(root: Element) -> list[tuple[str, tuple[str, ...]]]:
        return sorted((str(each.tag), tuple(sorted(each.attrib))) for each in root.iter())

    assert elements(hostile) == elements(harmless)
    texts = {element.text for element in hostile.iter() if (element.get("class") or "") == "tag"}
    shown = {visible(value) for value in SAFE}
    assert len(shown & texts) >= 24  # of each category the most frequent
    assert shown & texts <= shown
    for value in (*SAFE[:8], *PATHS[:8]):
        assert visible(value) in all_text(hostile)
    assert_inert(hostile)


def assert_inert(root: Element) -> None:
    """No script, no event, no address but data: and places of the page itself."""
    for element in root.iter():
        tag = str(element.tag).rsplit("}", 1)[-1]
        assert tag not in {"script", "iframe", "object", "embed", "form", "link", "base", "a:href", "foreignObject"}
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on")
            assert name != "style"
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert re.fullmatch(r"#[a-z]+|data:image/webp;base64,[A-Za-z0-9+/=]+", value), value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of known sizes, one copied, one cut short, one GIF, captions of known lengths; ingested."""
    root = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    (root / "in").mkdir()
    for name, (height, width) in {"a": (64, 64), "b": (128, 64), "c": (32, 32), "d": (64, 200)}.items():
        Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(root / "in" / f"{name}.png")
    (root / "in" / "a2.png").write_bytes((root / "in" / "a.png").read_bytes())
    (root / "in" / "cut.png").write_bytes((root / "in" / "b.png").read_bytes()[:3000])
    (root / "in" / "x.gif").write_bytes(b"GIF89a")
    (root / "in" / "a.txt").write_text("1girl, <b>, >_<")
    (root / "in" / "b.txt").write_text(", ".join(f"a very long tag number {n}" for n in range(60)))
    ingest_to(root / "m.parquet", [root / "in"], duplicates=DuplicateConfig(), workers=0)
    return root


def test_the_figures_are_those_of_the_pictures(folder: Path) -> None:
    config = ReportConfig(BucketConfig(64, 16), weights=TagWeightConfig(strength=0.5, min_count=1), workers=1)
    manifest = load_manifest(folder / "m.parquet")
    facts = build_data_report(folder / "m.parquet", manifest, config)
    pictures, buckets, tokens = facts["pictures"], facts["buckets"], facts["tokens"]
    assert (pictures.count, pictures.untagged, pictures.doubled) == (5, 3, 1)
    assert pictures.smallest == (32, 32) and pictures.largest == (64, 200)
    assert buckets.much_enlarged == 1  # c, to twice its size
    assert sum(row.pictures for row in buckets.rows) + buckets.rejected == 5
    by_reason = {reason.name: reason.count for reason in facts["rejects"]}
    assert by_reason == {"truncated": 1, "format_not_supported": 1}
    assert (facts["copies"].exact, facts["copies"].groups, facts["copies"].left) == (1, 1, 1)
    need = len(chunk_prompt(", ".join(f"a very long tag number {n}" for n in range(60)), 99).chunks)
    assert need > 3 and tokens.cut == 1 and tokens.chunks[-1] == (need, 1)
    thumbnails = {path: picture for (_, path), picture in facts["thumbnails"].items()}
    assert thumbnails["cut.png"].uri is None and thumbnails["x.gif"].uri is None
    assert thumbnails["a.png"].uri.startswith("data:image/webp;base64,") and thumbnails["d.png"].size == (64, 200)
    said = " ".join(finding.what for finding in facts["findings"])
    for words in ("1 (20.0 %) captions are cut", "files are damaged", "3 (60.0 %) pictures have no tags", "1.5×"):
        assert words in said


def test_rows_of_a_tag_table_without_effect_are_a_finding(folder: Path) -> None:
    table = folder / "typed.csv"
    table.write_text("tag,weight\na_very_long_tag_number_1,2\nno_such_tag,2\n")
    config = ReportConfig(BucketConfig(64, 16), weights=TagWeightConfig(table=table), workers=0)
    facts = build_data_report(folder / "m.parquet", load_manifest(folder / "m.parquet"), config)
    (found,) = (finding for finding in facts["findings"] if "no effect" in finding.what)
    assert found.what.startswith("1 of the 2 rows") and "(no such tag)" in found.what and found.section == "weights"


def test_a_caption_group_that_no_tag_is_in_is_a_finding(folder: Path) -> None:
    config = ReportConfig(BucketConfig(64, 16), captions=CaptionConfig(leave_out=("metta",)), workers=0)
    facts = build_data_report(folder / "m.parquet", load_manifest(folder / "m.parquet"), config)
    (found,) = (finding for finding in facts["findings"] if "no effect" in finding.what)
    assert found.what.startswith("captions.leave_out names 'metta'") and found.section == "tags"


def test_the_page_on_real_pictures_is_inert_and_shows_them(folder: Path) -> None:
    write_data_report(folder / "m.parquet", folder / "r.html", ReportConfig(BucketConfig(64, 16), workers=1))
    root = parse((folder / "r.html").read_text(encoding="utf-8"))
    assert_inert(root)
    assert len(list(root.iter(f"{HTML}img"))) >= 3
    assert {"<b>", ">_<"} <= {element.text for element in root.iter() if element.get("class") == "tag"}


def test_members_of_tars_are_shown(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    png = BytesIO()
    Image.new("RGB", (40, 64), "red").save(png, "PNG")
    for name in ("a.tar", "b.tar"):  # the second holds copies of the first's: the table of duplicates is shown, too
        with tarfile.open(tmp_path / "in" / name, "w") as tar:
            member = tarfile.TarInfo("1.png")
            member.size = len(png.getvalue())
            tar.addfile(member, BytesIO(png.getvalue()))
    source = SourceConfig(tmp_path / "in", "webdataset")
    ingest_to(tmp_path / "m.parquet", [source], duplicates=DuplicateConfig(), workers=0)
    manifest = load_manifest(tmp_path / "m.parquet")
    facts = build_data_report(tmp_path / "m.parquet", manifest, ReportConfig(BucketConfig(64, 16), workers=1))
    root = str(manifest.sources[0])
    shown = {place: picture.size for place, picture in facts["thumbnails"].items() if picture.uri}
    assert shown == {(root, "a.tar/1.png"): (64, 40), (root, "b.tar/1.png"): (64, 40)}


def test_rejects_of_tars_are_shown_and_ratings_and_scores_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    posts = []
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
        for number in range(6):
            png = BytesIO()
            Image.new("RGB", (40, 40 if number == 5 else 64), (40 * number, 90, 200)).save(png, "PNG")
            member = tarfile.TarInfo(f"<{number}>.png")
            member.size = len(png.getvalue())
            tar.addfile(member, BytesIO(png.getvalue()))
            rating = ["g", "S ", None][number % 3]
            posts.append({"id": f"<{number}>", "tags": "a", "rating": rating, "score": number or None})
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, posts)))
    rules = PictureRules(min_pixels=2000)
    source = SourceConfig(tmp_path / "in", "webdataset", tmp_path / "posts.jsonl", rules=rules)
    manifest = ingest_to(tmp_path / "m.parquet", [source], workers=0).manifest
    assert manifest.table.select(["rating", "score"]).to_pydict() == {
        "rating": ["g", "s", None, "g", "s"],
        "score": [None, 1.0, 2.0, 3.0, 4.0],
    }
    opened = open_manifest(tmp_path / "m.parquet")
    assert (opened.version, opened.digest) == (3, manifest.digest)
    facts = build_data_report(tmp_path / "m.parquet", opened, ReportConfig(BucketConfig(64, 16), workers=1))
    assert facts["pictures"].ratings == [("g", 2), ("s", 2), ("none", 1)]
    assert facts["pictures"].scored == 4 and facts["pictures"].scores is not None
    shown = {path for (_, path), picture in facts["thumbnails"].items() if picture.uri}
    assert "a.tar/<5>.png" in shown, "left out by a rule, and still there to be looked at"


def test_what_records_tell_is_sealed_and_decides_no_latent(tmp_path: Path) -> None:
    plain = manifest_of([["a"], ["b"]])
    columns = {"archive": pa.nulls(2, pa.string()), "offset": pa.nulls(2, pa.int64())}
    digests = set()
    for scores in ([1.0, None], [2.0, None]):
        told = {**columns, "rating": pa.array(["g", None]), "score": pa.array(scores, pa.float64())}
        table = plain.table
        for name, column in told.items():
            table = table.append_column(name, column)
        manifest = Manifest(table, plain.sources)
        write_manifest(manifest, tmp_path / "m.parquet")
        assert load_manifest(tmp_path / "m.parquet").table.equals(manifest.table)
        digests.add(manifest.digest)
        metadata = pq.read_schema(tmp_path / "m.parquet").metadata
    assert digests == {plain.digest}
    for score, words in ((9.0, "seal"), (np.inf, "finite number.*'score', row 0")):
        forged = table.set_column(table.num_columns - 1, "score", pa.array([score, None]))
        pq.write_table(forged.cast(manifest.schema).replace_schema_metadata(metadata), tmp_path / "m.parquet")
        for read in (load_manifest, open_manifest):
            with pytest.raises(ManifestError, match=words):
                read(tmp_path / "m.parquet")


def test_a_tar_outside_the_folders_is_not_opened(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "secret.png")
    size = (tmp_path / "secret.png").stat().st_size
    (root / "link.tar").symlink_to(tmp_path / "secret.png")
    tars = {"link.tar/x.png": "link.tar", "../secret.png/x.png": "../secret.png"}
    members = {(str(root), path): (tar, 0, size) for path, tar in tars.items()}
    found = look_at(members, [root], (255, 255, 255), 0, members)
    assert [picture.uri for picture in found.values()] == [None, None]


def test_a_table_opens_no_file_outside_the_folders(tmp_path: Path) -> None:
    root, outside = tmp_path / "in", tmp_path / "secret.png"
    root.mkdir()
    Image.new("RGB", (32, 32), "red").save(outside)
    (root / "link.png").symlink_to(outside)
    places = [(str(root), "../secret.png"), (str(root), str(outside)), (str(root), "link.png"), (str(root), "a\0.png")]
    places += [(str(tmp_path), "secret.png"), (str(root), "x" * 5000)]
    found = look_at(places, [root], (255, 255, 255), 0)
    assert [found[place].uri for place in places] == [None] * len(places)


def test_a_large_set_is_sampled_and_says_so(tmp_path: Path) -> None:
    manifest = manifest_of([["a tag", f"tag {row}"] for row in range(50)])
    root = page_of(manifest, tmp_path, ReportConfig(BucketConfig(64, 16), token_sample=20, workers=0))
    assert any("Of a random sample of 20 captions (of 50)" in " ".join(text.split()) for text in all_text(root))
    whole = page_of(manifest, tmp_path, ReportConfig(BucketConfig(64, 16), token_sample=50, workers=0))
    assert any("Of all 50 captions" in " ".join(text.split()) for text in all_text(whole))


def test_one_picture_without_tags_is_a_page(tmp_path: Path) -> None:
    assert_inert(page_of(manifest_of([[]]), tmp_path))


def test_chunks_are_counted_as_prompts_are_cut() -> None:
    words = [
        "1girl",
        "hatsune miku (vocaloid)",
        ":)",
        "(a)",
        "",
        "sky,",
        "x" * 300,
        "a " * 80,
        "赤い髪",
        "e\u0301",
        ", ,",
        "'s",
    ]
    random = np.random.default_rng(0)
    prompts = ["", ",", ", ", *(", ".join(random.choice(words, n)) for n in range(60))]
    expected = [chunk_prompt(prompt, 10**6).chunks for prompt in prompts]
    assert count_chunks(prompts).tolist() == [[sum(map(len, chunks)), len(chunks)] for chunks in expected]


def test_validation_takes_what_training_takes() -> None:
    assert [held_out(64, count) for count in (10, 100, 10_000)] == [
        min(64, count // build._HELD_OUT_AT_MOST) for count in (10, 100, 10_000)
    ]


def test_left_out_groups_need_fewer_chunks(tmp_path: Path) -> None:
    manifest = manifest_of([["a", *(f"long meta tag {n}" for n in range(70))]])
    manifest = Manifest(manifest.table, manifest.sources, categories={f"long meta tag {n}": "meta" for n in range(70)})
    for captions, cut in ((CaptionConfig(), 1), (CaptionConfig(leave_out=("meta",)), 0)):
        config = ReportConfig(BucketConfig(64, 16), captions, workers=0)
        assert build_data_report(tmp_path / "m.parquet", manifest, config)["tokens"].cut == cut


def test_latents_are_described(tiny_latents: Path, tagged_folder: Path, tmp_path: Path) -> None:
    manifest = ingest([tagged_folder], workers=0).manifest
    facts = build_data_report(tmp_path / "m.parquet", manifest, TINY, latents=tiny_latents, vae_digest="another")
    cache = facts["cache"]
    assert cache.written + sum(reason.count for reason in cache.rejects) == len(manifest)
    assert cache.of_this_manifest and cache.other_vae and not cache.damages and cache.missing == 0
    assert len(cache.channels) == 4 and all(channel.std > 0 for channel in cache.channels)
    assert any("another VAE" in finding.what for finding in facts["findings"])


def test_the_command_writes_and_says(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.run(cli.Command(folder / "m.parquet", tmp_path / "r.html", area=64, step=16, workers=0))
    printed = capsys.readouterr().out
    assert "files are damaged" in printed and "r.html" in printed
    with pytest.raises(ConfigError, match="never written"):
        cli.run(cli.Command(folder / "m.parquet", folder / "in" / "r.html"))
    with pytest.raises(ConfigError, match="--latents"):
        cli.run(cli.Command(folder / "m.parquet", tmp_path / "r.html", model=folder))
    (folder / "m.rejects.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"m\.rejects\.csv"):
        cli.run(cli.Command(folder / "m.parquet", tmp_path / "r.html"))
