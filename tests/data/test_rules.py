"""Rules: percentiles, filters and tag lists, against cases worked out by hand and properties that need no example."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ingest import draw, reasons, rows
from test_source_kinds import write_lines

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.ingest import ingest
from sumizome.data.records import Record
from sumizome.data.rules import YEAR, TagRewriter, check_rating, derive_tags, load_tag_rewriter
from sumizome.data.source_config import PictureRules, SourceConfig, TagLists
from sumizome.data.tags import MAX_TAGS, ParsedTags
from sumizome.errors import ConfigError, DataError

QUALITY = ("0=low", "50=good", "90=best")


def record(score: float | None = None, year: int | None = None, rating: str | None = None) -> Record:
    return Record("x", "", (), None, rating, score, year)


def quality(records: list[Record], thresholds: tuple[str, ...] = QUALITY) -> list[str]:
    return texts(records, PictureRules(quality=thresholds))


def texts(records: list[Record], rules: PictureRules) -> list[str]:
    scores = np.array([np.nan if each.score is None else each.score for each in records], np.float64)
    derived = derive_tags(scores, np.array([each.year or 0 for each in records], np.int16), rules)
    found = derived.texts(np.arange(len(records)))
    assert sum(derived.counts.values()) == sum(len(list(filter(None, text.split(", ")))) for text in found)
    return found


# --- quality and year -------------------------------------------------------------------------------------------------


def test_quality_is_the_percentile_within_the_year() -> None:
    # Ten pictures with scores 1 … 10: percentiles 5, 15, … 95.
    rising = [record(score, 2020) for score in range(1, 11)]
    assert quality(rising) == ["low"] * 5 + ["good"] * 4 + ["best"]
    # Another year is another population, however high its scores; equal scores lie at 50 together.
    assert quality([*rising, record(1000, 2021), record(1000, 2021)])[-2:] == ["good", "good"]
    assert quality([record(None, 2020), record(7, None)]) == ["", "good"]
    assert quality([record(1, 2020), record(2, 2020)], ("60=upper",)) == ["", "upper"]


@given(st.lists(st.tuples(st.integers(-5, 5), st.sampled_from([None, 2020, 2021])), max_size=30), st.randoms())
def test_quality_rises_with_score_and_knows_no_order(pairs: list[tuple[int, int | None]], random: object) -> None:
    records = [record(score, year) for score, year in pairs]
    tags = quality(records)
    rank = {"low": 0, "good": 1, "best": 2}
    for first, tag in zip(records, tags, strict=True):
        for second, other in zip(records, tags, strict=True):
            if first.year == second.year and (first.score or 0) <= (second.score or 0):
                assert rank[tag] <= rank[other]
    assert quality(records[::-1]) == tags[::-1]


def test_the_year_tag_is_spelt_as_told() -> None:
    rules = PictureRules(year="year {year}")
    assert texts([record(year=2021), record()], rules) == ["year 2021", ""]
    both = PictureRules(year="year {year}", quality=QUALITY)
    assert texts([record(1.0, 2021), record(2.0), record()], both) == ["good, year 2021", "good", ""]
    typed = derive_tags(np.array([1.0]), np.array([2021], np.int16), PictureRules(year="year_{year}"))
    assert typed.counts == {("year 2021", YEAR): 1}, "its category is that of the tag as it is stored"


@pytest.mark.parametrize(
    "settings",
    [
        {"quality": ("best",)},
        {"quality": ("101=best",)},
        {"quality": ("nan=best",)},
        {"quality": ("1=a", "1.0=b")},
        {"year": "2021"},
        {"min_side": -1},
    ],
)
def test_rules_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PictureRules(**settings)  # type: ignore[arg-type]


# --- filters ----------------------------------------------------------------------------------------------------------


def test_ratings_are_kept_by_word_or_first_letter() -> None:
    rules = PictureRules(ratings=("g", "Sensitive"))
    for rating, reason in [("g", ""), ("general", ""), ("sensitive", ""), ("s", "excluded"), ("safe", "excluded")]:
        if reason:
            with pytest.raises(ImageRejected) as caught:
                check_rating(record(rating=rating), rules)
            assert caught.value.reason == "rating_excluded"
        else:
            check_rating(record(rating=rating), rules)
    with pytest.raises(ImageRejected) as caught:
        check_rating(record(), rules)
    assert caught.value.reason == "rating_missing"
    check_rating(record(), PictureRules())


def test_ingest_filters_and_tags_each_source_by_its_own_rules(tmp_path: Path) -> None:
    content = []
    for number in range(1, 9):
        draw(tmp_path / "booru" / f"{number}.png", number, size=(20 + number, 40))
        content.append({"id": number, "tags": "a", "rating": "ge"[number == 8], "score": number, "created_at": "2020"})
    draw(tmp_path / "folder" / "small.png", 20, caption="mine")
    rules = PictureRules(ratings=("g",), quality=("50=good",), year="{year}", min_side=22, min_pixels=40 * 23)
    table = write_lines(tmp_path / "posts.jsonl", content)
    booru = SourceConfig(tmp_path / "booru", "booru", table, rules=rules)
    result = ingest([booru, SourceConfig(tmp_path / "folder")], workers=0)
    good = {f"{number}.png": ["a", *(["good"] if number >= 4 else []), "2020"] for number in range(3, 8)}
    assert {path: row["tags"] for path, row in rows(result).items()} == {**good, "small.png": ["mine"]}
    assert reasons(result) == {"1.png": "below_min_side", "2.png": "below_min_pixels", "8.png": "rating_excluded"}
    assert result.manifest.categories == {"good": "quality", "2020": "year"}


# --- aliases, implications, categories --------------------------------------------------------------------------------


def write_pairs(path: Path, *pairs: tuple[str, ...], header: str = "antecedent_name,consequent_name") -> Path:
    path.write_text("\n".join([header, *(",".join(pair) for pair in pairs)]))
    return path


def test_aliases_chain_and_implications_close(tmp_path: Path) -> None:
    aliases = write_pairs(tmp_path / "a.csv", ("sky_blue", "blue_sky"), ("skyblue", "sky_blue"), ("same", "same"))
    implications = write_pairs(
        tmp_path / "i.csv",
        ("skyblue", "sky"),  # under its old spelling
        ("absurdly_long_hair", "very_long_hair"),
        ("very_long_hair", "long_hair"),
        ("ring", "ring_two"),
        ("ring_two", "ring"),
    )
    rewriter = load_tag_rewriter(TagLists(aliases, implications))
    parsed = ParsedTags(("skyblue", "blue sky", "absurdly long hair", "ring", "long hair"), 2)
    assert rewriter.rewrite(parsed) == ParsedTags(
        ("blue sky", "absurdly long hair", "ring", "long hair", "sky", "very long hair", "ring two"), 1
    )


names = st.sampled_from("abcdefgh")


@given(
    st.lists(names, unique=True, max_size=8),
    st.integers(0, 8),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from("efgh")),
    st.dictionaries(names, st.lists(names, max_size=3).map(tuple)),
)
def test_rewriting_keeps_what_is_kept_and_doubles_nothing(
    tags: list[str], kept: int, aliases: dict[str, str], implied: dict[str, tuple[str, ...]]
) -> None:
    kept = min(kept, len(tags))
    found = TagRewriter(aliases, implied).rewrite(ParsedTags(tuple(tags), kept))
    assert len(set(found.tags)) == len(found.tags)
    assert set(found.tags[: found.kept]) == {aliases.get(tag, tag) for tag in tags[:kept]}
    assert {aliases.get(tag, tag) for tag in tags} <= set(found.tags)
    assert not aliases.keys() & (set(found.tags) - {more for each in implied.values() for more in each})


def test_lists_that_cannot_be_are_one_clear_error(tmp_path: Path) -> None:
    circle = write_pairs(tmp_path / "c.csv", ("a_tag", "b_tag"), ("b_tag", "a_tag"))
    with pytest.raises(DataError, match="circle"):
        load_tag_rewriter(TagLists(circle))
    nameless = write_pairs(tmp_path / "n.csv", header="alias,tag")
    with pytest.raises(DataError, match="antecedent_name"):
        load_tag_rewriter(TagLists(nameless))
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match="unreadable"):
            load_tag_rewriter(TagLists(None, path))
    statuses = write_pairs(
        tmp_path / "s.csv",
        ("aa", "bb", "active"),
        ("cc", "dd", "deleted"),
        ("ee", "ff", " active "),
        header="antecedent_name,consequent_name,status",
    )
    assert load_tag_rewriter(TagLists(statuses)).aliases == {"aa": "bb", "ee": "ff"}


def test_implied_tags_that_are_too_many_reject_the_picture() -> None:
    rewriter = TagRewriter({}, {"a": tuple(map(str, range(MAX_TAGS)))})
    with pytest.raises(ImageRejected) as caught:
        rewriter.rewrite(ParsedTags(("a",), 0))
    assert caught.value.reason == "caption_invalid"


def test_categories_follow_the_list_then_the_most_records_then_the_alias(tmp_path: Path) -> None:
    content = []
    for number in range(1, 4):
        draw(tmp_path / "images" / f"{number}.png", number)
        content.append({"id": number, "tag_string_artist": "old_name", "tag_string_character": "both_ways"})
    content[0] |= {"tag_string_artist": "both_ways", "tag_string_character": "listed_one", "tag_string_meta": "unused"}
    content[0]["tag_string_meta"] = ""
    lists = TagLists(
        aliases=write_pairs(tmp_path / "a.csv", ("old_name", "new_name")),
        categories=write_pairs(tmp_path / "k.csv", ("listed_one", "3"), ("never_seen", "1"), header="tag,category"),
    )
    booru = SourceConfig(tmp_path / "images", "booru", write_lines(tmp_path / "p.jsonl", content))
    result = ingest([booru], tag_lists=lists, workers=0)
    assert result.manifest.categories == {"new name": "artist", "both ways": "character", "listed one": "copyright"}
