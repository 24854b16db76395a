"""The table of tags: written, edited, read back, and used by training; its figures summed by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_caches import tag_table
from test_loader import cache, loader_of
from test_source_kinds import write_lines

from sumizome.cli import tags as cli
from sumizome.data.images import WHITE
from sumizome.data.ingest import ingest_to
from sumizome.data.latents import LatentCache
from sumizome.data.manifest import SCHEMA, Manifest, write_manifest
from sumizome.data.source_config import SourceConfig
from sumizome.data.tag_table import frequency_classes, load_tag_table, unused_rows, write_tag_table
from sumizome.data.tags import TagWeightConfig, normalise_tag, tag_loss_weights, tag_statistics
from sumizome.errors import ConfigError, DataError

__all__ = ["cache"]

WEIGHTED = TagWeightConfig(strength=0.7, min_count=1)


def pictures() -> pa.Table:
    """A head tag in every picture, a middle, a tail, and emoticons that spreadsheets take for formulas."""
    tags = [["1girl", *(["middle"] if row % 4 == 0 else []), *(["=_="] if row == 7 else [])] for row in range(200)]
    tags[3] += ["'s", "<b>", 'say "hi"', "@_@", "artist one"]
    tags[5] = []
    repeats = [1 + row % 3 for row in range(200)]
    return pa.table({"tags": pa.array(tags, pa.list_(pa.string())), "repeats": pa.array(repeats, pa.int32())})


def test_effective_counts_are_sums_of_loss_weights() -> None:
    table = pictures()
    categories = {"artist one": "artist"}
    found = {row["tag"]: row for row in tag_statistics(table, WEIGHTED, categories).to_pylist()}
    weights = tag_loss_weights(table, WEIGHTED, categories)
    for tag in ("1girl", "middle", "=_=", "'s"):
        rows = [row for row, tags in enumerate(table["tags"].to_pylist()) if tag in tags]
        repeats = table["repeats"].to_pylist()
        assert found[tag]["count"] == sum(repeats[row] for row in rows)
        assert found[tag]["effective"] == pytest.approx(sum(repeats[row] * weights[row] for row in rows))
    assert found["=_="]["weight"] > found["middle"]["weight"] > found["1girl"]["weight"]
    assert {tag for tag, row in found.items() if row["category"] == "artist"} == {"artist one"}


def test_classes_show_that_weighting_lowers_the_head_and_raises_the_tail() -> None:
    plain = tag_statistics(pictures(), TagWeightConfig())
    assert all(
        each.ratio == pytest.approx(1) and each.share == pytest.approx(each.effective_share)
        for each in frequency_classes(plain)
    )
    classes = frequency_classes(tag_statistics(pictures(), WEIGHTED))
    # 1girl is shown 396 times (all 399 showings but picture 5's three), middle 99 (fifty pictures), the others 1 or 2.
    assert [(each.least, each.tags) for each in classes] == [(100, 1), (10, 1), (1, 6)]
    assert classes[0].ratio < 1 < classes[1].ratio < classes[2].ratio
    for share in ("share", "effective_share"):
        assert sum(getattr(each, share) for each in classes) == pytest.approx(1)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    statistics = tag_statistics(pictures(), WEIGHTED, {"artist one": "=artist", "<b>": "meta"})
    write_tag_table(statistics, tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert not any(line.lstrip('"')[:1] in "=+-@" for line in lines)
    read = load_tag_table(tmp_path / "t.csv")
    assert read.weights == dict(zip(statistics["tag"].to_pylist(), statistics["weight"].to_pylist(), strict=True))
    assert read.categories == dict(zip(statistics["tag"].to_pylist(), statistics["category"].to_pylist(), strict=True))


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
weights = st.floats(1e-300, 1e300)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(texts.map(normalise_tag).filter(bool), st.tuples(texts, weights), max_size=8))
def test_any_tag_and_weight_survive(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[str, float]]
) -> None:
    path = tmp_path_factory.mktemp("table") / "t.csv"
    columns = {
        "tag": pa.array(list(entries), pa.string()),
        "category": pa.array([category for category, _ in entries.values()], pa.string()),
        "count": [1] * len(entries),
        "weight": pa.array([weight for _, weight in entries.values()], pa.float64()),
        "effective": [1.0] * len(entries),
    }
    write_tag_table(pa.table(columns), path)
    read = load_tag_table(path)
    assert read.weights == {tag: weight for tag, (_, weight) in entries.items()}
    assert read.categories == {tag: category for tag, (category, _) in entries.items()}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tag,count\na,1", "a column weight"),
        ("tag,weight\na,1\nb,0", "line 3: expected a weight above 0, found '0'"),
        ("tag,weight\na,-1", "above 0"),
        ("tag,weight\na,nan", "above 0"),
        ("tag,weight\na,inf", "above 0"),
        ("tag,weight\na,", "above 0"),
        ("tag,weight\na", "above 0"),
        ("tag,weight\na,1\na,2", "each tag once, found 'a'"),
        ("tag,weight\nlong hair,1\nlong_hair,2", "line 3: expected each tag once, found 'long hair'"),
        ("tag,weight\n,1", "each tag once"),
        ("", "a column tag"),
    ],
)
def test_an_edit_that_cannot_be_is_named_by_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=complaint):
        load_tag_table(tmp_path / "t.csv")
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match="unreadable"):
            load_tag_table(path)


def test_a_tag_typed_with_underscores_is_the_one_that_ingest_stored(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("tag,category,weight\nlong_hair,body,0.5\n o_o ,face,2\nhatsune__miku,character,3\n")
    read = load_tag_table(path)
    assert read.weights == {"long hair": 0.5, "o_o": 2.0, "hatsune miku": 3.0}
    assert read.categories == {"long hair": "body", "o_o": "face", "hatsune miku": "character"}


def test_rows_that_no_picture_has_are_told_in_one_line() -> None:
    path, given = Path("t.csv"), {"a": 1.0, "b\u202e": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}
    (line,) = unused_rows(path, given, ["a"])
    assert line == "4 of the 5 rows of t.csv have no effect: no picture has such a tag (b\\u202e, c, d, …)"
    assert unused_rows(path, given, [*given, "f"]) == unused_rows(None, None, ["a"]) == []


# --- training reads it ------------------------------------------------------------------------------------------------


def test_training_with_the_table_is_training_with_the_formula_until_it_is_edited(
    cache: LatentCache, tmp_path: Path
) -> None:
    everything = np.arange(len(cache))
    write_tag_table(tag_statistics(tag_table(cache.index, everything), WEIGHTED), tmp_path / "t.csv")
    by_formula = loader_of(cache, tag_weights=WEIGHTED, validation_count=0)
    by_table = loader_of(cache, tag_weights=TagWeightConfig(table=tmp_path / "t.csv"), validation_count=0)
    np.testing.assert_allclose(by_table.tag_weight, by_formula.tag_weight, rtol=1e-12)
    assert by_formula.tag_weight.std() > 0

    text = (tmp_path / "t.csv").read_text().splitlines()
    edited = ["common,character,1,100,1" if line.startswith("common,") else line for line in text]
    (tmp_path / "t.csv").write_text("\n".join(edited))
    raised = loader_of(cache, tag_weights=TagWeightConfig(table=tmp_path / "t.csv"), validation_count=0)
    common = np.array(["common" in tags for tags in cache.index.tag_lists(everything)])
    assert raised.tag_weight[common].min() > raised.tag_weight[~common].max()
    assert raised.categories["common"] == "character"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_categories_and_frequencies_and_spares_edits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    table, count = pictures(), 200
    columns = {
        **{name: [f"{row:064x}"[-16:] for row in range(count)] for name in ("id", "path")},
        "sha256": [f"{row:064x}" for row in range(count)],
        "format": ["PNG"] * count,
        **dict.fromkeys(("source", "kept_tags"), [0] * count),
        **dict.fromkeys(("file_bytes", "height", "width"), [64] * count),
        "tags": table["tags"].to_pylist(),
        "repeats": table["repeats"].to_pylist(),
    }
    source = tmp_path / "pictures"
    source.mkdir()
    rows = pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)
    categories = {"artist one": "artist", "<b>": "[red]"}
    write_manifest(Manifest(rows, (source,), WHITE, {}, categories), tmp_path / "m.parquet")
    command = cli.Command(tmp_path / "m.parquet", tmp_path / "t.csv", top=2, weights=WEIGHTED)
    cli.run(command)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "artist 1 1 artist one 1" in lines
    assert "[red] 1 1 <b> 1" in lines
    assert any(line.startswith("general 6") and line.endswith("1girl 396, middle 99") for line in lines)
    assert any(line.startswith("100 to 999 1 ") for line in lines)
    assert load_tag_table(tmp_path / "t.csv").categories["artist one"] == "artist"
    with pytest.raises(ConfigError, match="perhaps edited"):
        cli.run(command)
    (tmp_path / "typed.csv").write_text("tag,weight\nartist_one,3\nartist_two,3\n")
    cli.run(cli.Command(tmp_path / "m.parquet", weights=TagWeightConfig(table=tmp_path / "typed.csv")))
    printed = capsys.readouterr().out
    assert f"1 of the 2 rows of {tmp_path}/typed.csv have no effect: no picture has such a tag (artist two)" in printed
    cli.run(cli.Command(tmp_path / "m.parquet", tmp_path / "t.csv", replace=True))
    assert "weighting is off" in capsys.readouterr().out
    for out, complaint in [(tmp_path / "t.txt", r"\.csv"), (source / "t.csv", "never written")]:
        with pytest.raises(ConfigError, match=complaint):
            cli.run(cli.Command(tmp_path / "m.parquet", out))
    assert list(source.iterdir()) == []


def test_categories_of_a_dump_reach_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_ingest import draw

    draw(tmp_path / "images" / "1.png")
    posts = write_lines(tmp_path / "p.jsonl", [{"id": 1, "tag_string_artist": "some_one", "tag_string_general": "sky"}])
    ingest_to(tmp_path / "m.parquet", [SourceConfig(tmp_path / "images", "booru", posts)], workers=0)
    cli.run(cli.Command(tmp_path / "m.parquet", tmp_path / "t.csv"))
    assert load_tag_table(tmp_path / "t.csv").categories == {"some one": "artist", "sky": "general"}
