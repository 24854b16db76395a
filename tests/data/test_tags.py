"""Tags: their spelling, their counts, and loss weights held against cases that can be worked out by hand."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumizome.data import tag_codes
from sumizome.data.tags import (
    MAX_TAG_LENGTH,
    MAX_TAGS,
    ParsedTags,
    TagWeightConfig,
    load_tag_categories,
    normalise_tag,
    parse_tags,
    tag_counts,
    tag_loss_weights,
    tag_statistics,
)
from sumizome.errors import ConfigError, DataError


def table(tags: list[list[str]], repeats: list[int] | None = None) -> pa.Table:
    return pa.table(
        {"tags": pa.array(tags, pa.list_(pa.string())), "repeats": pa.array(repeats or [1] * len(tags), pa.int32())}
    )


# --- parsing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tags", "kept"),
    [
        ("1girl, blue_hair,solo", ("1girl", "blue hair", "solo"), 0),
        ("", (), 0),
        (" ,, ,\n", (), 0),
        ("a,b,a", ("a", "b"), 0),
        ("blue_hair, blue hair", ("blue hair",), 0),
        ("hatsune_miku_(cosplay), k-on!", ("hatsune miku (cosplay)", "k-on!"), 0),
        ("one tag a line\nlike_this\r\nand\tthis", ("one tag a line", "like this", "and this"), 0),
        ("1girl, miku ||| solo, sky", ("1girl", "miku", "solo", "sky"), 2),
        ("||| solo", ("solo",), 0),
        ("1girl, miku |||", ("1girl", "miku"), 2),
        ("a, a ||| a, b", ("a", "b"), 1),
        ("1girl|||solo", ("1girl", "solo"), 1),
        ('<3, "quoted", \'s, &, =1+1', ("<3", '"quoted"', "'s", "&", "=1+1"), 0),
        ("赤い_髪, été", ("赤い 髪", "été"), 0),
        ("  wide   gaps  here ", ("wide gaps here",), 0),
    ],
)
def test_a_caption_is_split_into_tags(text: str, tags: tuple[str, ...], kept: int) -> None:
    assert parse_tags(text) == ParsedTags(tags, kept)


EMOTICONS = (
    *("^_^", ">_<", "o_o", "0_0", "@_@", "+_+", "+_-", "=_=", "|_|", "x_x", "u_u", "._.", ">_>", "<_<", "||_||", "3_3"),
    *("6_9", ">_o", ";_;", "(o)_(o)", "<o>_<o>", "<|>_<|>", "-_-", "*_*", ":_"),
)


def test_emoticons_keep_their_underscores_and_words_do_not() -> None:
    assert parse_tags(", ".join(EMOTICONS)).tags == EMOTICONS
    for tag in ("blue_hair", "a_cat", "no_u", "x-ray_film", "10_b", "__init__", "tag_"):
        assert "_" not in normalise_tag(tag)


@pytest.mark.parametrize("text", ["a\0b", "a\x1b[31mb", "a\x85b", "lone \ud800", "a ||| b ||| c"])
def test_what_no_caption_holds_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="expected"):
        parse_tags(text)


def test_the_caps_on_tags_are_exact() -> None:
    assert len(parse_tags(",".join(f"tag {i}" for i in range(MAX_TAGS))).tags) == MAX_TAGS
    with pytest.raises(DataError, match="2001"):
        parse_tags(",".join(f"tag {i}" for i in range(MAX_TAGS + 1)))
    parse_tags("x" * MAX_TAG_LENGTH)
    with pytest.raises(DataError, match="257"):
        parse_tags("x" * (MAX_TAG_LENGTH + 1))


@given(st.text(alphabet=st.sampled_from("ab_,| \n\t^<(é\x00"), max_size=60) | st.text(max_size=60))
def test_parsed_tags_are_clean_and_parse_to_themselves(text: str) -> None:
    try:
        tags, kept = parse_tags(text)
    except DataError:
        return
    assert 0 <= kept <= len(tags)
    assert len(set(tags)) == len(tags)
    for tag in tags:
        assert tag == " ".join(tag.split()) != ""
        assert not set(",\n\r") & set(tag)
        assert "|||" not in tag
    assert parse_tags(", ".join(tags[:kept]) + " ||| " + ", ".join(tags[kept:])) == (tags, kept)


# --- counts -----------------------------------------------------------------------------------------------------------


def test_tags_are_counted_by_image_or_by_showing() -> None:
    rows = table([["b", "a"], ["a"], [], ["a", "c"]], repeats=[1, 2, 5, 10])
    assert tag_counts(rows).to_pydict() == {"tag": ["a", "b", "c"], "count": [3, 1, 1]}
    assert tag_counts(rows, weigh_repeats=True).to_pydict() == {"tag": ["a", "c", "b"], "count": [13, 10, 1]}
    assert len(tag_counts(table([]))) == 0
    assert len(tag_counts(table([[], []]))) == 0


def test_counts_and_weights_do_not_see_how_the_table_is_chunked() -> None:
    random = np.random.default_rng(0)
    tags = [[f"t{i}" for i in random.choice(30, random.integers(0, 6), replace=False)] for _ in range(200)]
    repeats = random.integers(1, 4, 200).tolist()
    whole = table(tags, repeats)
    pieces = pa.concat_tables([whole.slice(0, 7), whole.slice(7, 0), whole.slice(7, 100), whole.slice(107)])
    config = TagWeightConfig(strength=0.5, min_count=2)
    assert tag_counts(pieces).equals(tag_counts(whole))
    np.testing.assert_allclose(tag_loss_weights(pieces, config), tag_loss_weights(whole, config), rtol=1e-12)


# --- categories -------------------------------------------------------------------------------------------------------


def test_categories_come_from_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "tags.csv"
    path.write_text("category,tag,count\n4,hatsune_miku,9\nartist,someone,1\n0,1girl,5\n5,highres,2\n,odd,1\n", "utf-8")
    assert load_tag_categories(path) == {
        "hatsune miku": "character",
        "someone": "artist",
        "1girl": "general",
        "highres": "meta",
        "odd": "general",
    }
    path.write_text("tag,category\nsomeone, artist\nhatsune_miku, 4\nodd, \n", "utf-8")  # as people type it
    assert load_tag_categories(path) == {"someone": "artist", "hatsune miku": "character", "odd": "general"}
    path.write_text("name,category\n", "utf-8")
    with pytest.raises(DataError, match="'tag'"):
        load_tag_categories(path)
    path.write_bytes(b"tag,category\n\xff,1\n")
    with pytest.raises(DataError, match="unreadable"):
        load_tag_categories(path)
    with pytest.raises(DataError, match="unreadable"):
        load_tag_categories(tmp_path / "none.csv")


# --- loss weights -----------------------------------------------------------------------------------------------------

WIDE = {"min_weight": 1e-6, "max_weight": 1e6, "min_count": 1}


def test_strength_zero_is_off() -> None:
    np.testing.assert_array_equal(tag_loss_weights(table([["a"], ["a"], ["b"]]), TagWeightConfig()), [1, 1, 1])
    assert tag_loss_weights(table([]), TagWeightConfig(strength=1.0)).shape == (0,)


def test_in_inverse_proportion_every_tag_gets_the_same_share() -> None:
    """With strength 1 and one tag an image, a tag's images share one total: 3/4 of 4 images → 2/3 each, the other 2."""
    weights = tag_loss_weights(table([["a"], ["a"], ["a"], ["b"]]), TagWeightConfig(strength=1.0, **WIDE))
    np.testing.assert_allclose(weights, [2 / 3, 2 / 3, 2 / 3, 2], rtol=1e-9)


def test_half_strength_goes_with_the_root() -> None:
    weights = tag_loss_weights(table([["a"]] * 4 + [["b"]]), TagWeightConfig(strength=0.5, **WIDE))
    np.testing.assert_allclose(weights[4] / weights[0], 2, rtol=1e-9)  # √(4 / 1)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-9)


def test_repeats_count_as_showings() -> None:
    """One image shown four times weighs as four images would."""
    config = TagWeightConfig(strength=0.7, **WIDE)
    repeated = tag_loss_weights(table([["a"], ["b"]], repeats=[4, 1]), config)
    written_out = tag_loss_weights(table([["a"]] * 4 + [["b"]]), config)
    np.testing.assert_allclose(repeated, written_out[[0, 4]], rtol=1e-9)
    np.testing.assert_allclose((repeated * [4, 1]).sum() / 5, 1, rtol=1e-9)


def test_a_category_weighs_as_much_as_another_however_many_tags_it_has() -> None:
    """Tags of one frequency weigh 1; so the character's weight r counts half, beside one general tag or three."""
    categories = {"rare": "character", "common": "character"}
    one = table([["g", "rare"], ["g", "common"], ["g", "common"], ["g", "common"]])
    many = table([["g", "h", "i", "rare"], *[["g", "h", "i", "common"]] * 3])
    config = TagWeightConfig(strength=1.0, **WIDE)
    in_one, in_many = (tag_loss_weights(rows, config, categories) for rows in (one, many))
    np.testing.assert_allclose(in_one, in_many, rtol=1e-9)
    typical = 3**0.75  # geometric mean over the occurrences 3, 3, 3, 1
    expected = (1 + typical / 1) / (1 + typical / 3)
    np.testing.assert_allclose(in_one[0] / in_one[1], expected, rtol=1e-9)
    drowned = tag_loss_weights(many, config)  # one category: the general tags are three of four
    assert drowned[0] / drowned[1] < expected


def test_tags_below_the_minimum_count_are_not_raised_further() -> None:
    config = TagWeightConfig(strength=1.0, min_weight=1e-6, max_weight=1e6, min_count=10)
    weights = tag_loss_weights(table([["a"]] * 20 + [["once"]] + [["b"]] * 10), config)
    np.testing.assert_allclose(weights[20], weights[21], rtol=1e-9)


def test_an_image_without_tags_is_neutral_before_scaling() -> None:
    config = TagWeightConfig(strength=1.0, **WIDE)
    np.testing.assert_allclose(tag_loss_weights(table([["a"], ["b"], []]), config), [1, 1, 1], rtol=1e-9)


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=5), min_size=1, max_size=40),
    st.floats(0.01, 4),
    st.floats(0.01, 1),
    st.floats(1, 50),
    st.data(),
)
def test_weights_keep_their_bounds_and_mean_one(
    tags: list[list[str]], strength: float, low: float, high: float, data: st.DataObject
) -> None:
    repeats = data.draw(st.lists(st.integers(1, 9), min_size=len(tags), max_size=len(tags)))
    config = TagWeightConfig(strength=strength, min_weight=low, max_weight=high, min_count=1)
    weights = tag_loss_weights(table(tags, repeats), config, {"a": "artist", "b": "character"})
    assert weights.dtype == np.float64
    assert weights.min() >= low
    assert weights.max() <= high
    np.testing.assert_allclose(np.average(weights, weights=repeats), 1, rtol=1e-6)


def test_rarer_never_weighs_less_whatever_the_bounds() -> None:
    rows = table([[f"t{i}"] for i in range(6) for _ in range(2**i)])
    weights = tag_loss_weights(rows, TagWeightConfig(strength=1.0, min_count=1))
    of_tag = [weights[2**i - 1] for i in range(6)]
    assert of_tag == sorted(of_tag, reverse=True)
    assert of_tag[0] == pytest.approx(2.0)
    assert of_tag[-1] > 0.5


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=5), min_size=1, max_size=40),
    st.floats(0.01, 4),
    st.integers(1, 5),
)
def test_within_a_category_no_rarer_tag_weighs_less(tags: list[list[str]], strength: float, min_count: int) -> None:
    categories = {"a": "artist", "b": "artist", "c": "artist", "d": "meta"}
    rows = tag_statistics(table(tags), TagWeightConfig(strength=strength, min_count=min_count), categories).to_pylist()
    for category in ("artist", "meta", "general"):
        weights = [row["weight"] for row in rows if row["category"] == category]  # the most frequent first
        assert all(0 < weight < float("inf") for weight in weights)
        assert all(later >= earlier for earlier, later in pairwise(weights))


@given(st.lists(st.lists(st.sampled_from("abcd"), unique=True), max_size=20))
def test_strength_zero_weighs_every_picture_and_every_tag_one(tags: list[list[str]]) -> None:
    assert (tag_loss_weights(table(tags), TagWeightConfig(strength=0.0)) == 1).all()
    statistics = tag_statistics(table(tags), TagWeightConfig(strength=0.0))
    assert statistics["weight"].to_pylist() == [1.0] * len(statistics)
    assert statistics["effective"].to_pylist() == statistics["count"].to_pylist()


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "<c>", "d e", "f"]), unique=True), max_size=30),
    st.integers(1, 7),
    st.booleans(),
)
def test_coded_tags_are_the_tags_in_batches_of_any_size(tags: list[list[str]], batch: int, encoded: bool) -> None:
    column = table(tags)["tags"]
    if encoded:  # as parquet gives them when it is asked to
        column = column.cast(pa.list_(pa.dictionary(pa.int32(), pa.string())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tag_codes, "_BATCH", batch)
        coded = tag_codes.code_tags(column)
        assert coded.vocabulary.to_pylist() == list(dict.fromkeys(tag for row in tags for tag in row))
        names, found = coded.vocabulary.to_pylist(), []
        for lengths, codes in coded.batches():
            ends = np.cumsum(lengths).tolist()
            found += [[names[code] for code in codes[end - n : end]] for end, n in zip(ends, lengths, strict=True)]
        assert found == tags
        assert coded.sums().tolist() == [sum(tag in row for row in tags) for tag in names]


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": -1.0},
        {"strength": 9.0},
        {"min_weight": 0.0},
        {"min_weight": 2.0},
        {"max_weight": 0.5},
        {"min_count": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        TagWeightConfig(**settings)
