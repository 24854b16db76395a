"""Captions: a function of (tags, config, seed, epoch, id, repeat), with the frequencies that its settings promise."""

from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sumizome.data.captions import CaptionConfig, build_caption, plain_caption, unknown_groups
from sumizome.errors import ConfigError

PLAIN = CaptionConfig(shuffle=False, caption_dropout=0.0, order=())
TAGS = ("sky", "1girl", "hatsune miku", "vocaloid", "smile")
CATEGORIES = {"hatsune miku": "character", "vocaloid": "copyright", "someone": "artist"}


def caption(config: CaptionConfig, tags: tuple[str, ...] = TAGS, kept: int = 0, **showing: int) -> str:
    where = {"seed": 7, "epoch": 0, "repeat": 0} | showing
    return build_caption(tags, kept, config, sample_id="0123456789abcdef", categories=CATEGORIES, **where)


def split(text: str) -> list[str]:
    return text.split(", ") if text else []


def test_with_everything_off_the_caption_is_the_file() -> None:
    assert caption(PLAIN) == "sky, 1girl, hatsune miku, vocaloid, smile"
    assert plain_caption(TAGS, 0, PLAIN) == caption(PLAIN)
    assert plain_caption((), 0, PLAIN) == ""
    assert caption(replace(PLAIN, separator=" , ")).count(" , ") == 4


def test_groups_come_in_the_order_named_the_rest_after_them() -> None:
    config = CaptionConfig(shuffle=False, caption_dropout=0.0)
    assert split(caption(config)) == ["1girl", "hatsune miku", "vocaloid", "sky", "smile"]
    assert split(plain_caption(TAGS, 0, config)) == ["1girl", "sky", "hatsune miku", "vocaloid", "smile"]
    backwards = replace(config, order=("copyright", "artist", "people"))
    assert split(caption(backwards)) == ["vocaloid", "1girl", "sky", "hatsune miku", "smile"]
    for people in ("2girls", "1boy", "6+girls", "multiple boys", "no humans", "1other"):
        assert split(plain_caption(("sky", people), 0, config))[0] == people
    for thing in ("girl on top", "1girls night", "20boyz"):
        assert split(plain_caption(("sky", thing), 0, config))[0] == "sky"


def test_tags_of_no_category_are_general_in_an_order_too() -> None:
    config = replace(PLAIN, order=("people", "general", "character"))
    assert split(caption(config)) == ["1girl", "sky", "smile", "hatsune miku", "vocaloid"]


def test_a_group_that_no_tag_is_in_is_told() -> None:
    config = CaptionConfig(
        protect=("charactor", "people"), leave_out=("general",), group_dropout=("character=0.1", "art\x1bist=0.2")
    )
    protect, dropout = unknown_groups(config, ["character", "copyright"])
    assert protect.startswith("captions.protect names 'charactor', which has no effect")
    assert protect.endswith("(there are character, copyright, general, people)")
    assert "captions.group_dropout" in dropout and "\x1b" not in dropout
    assert unknown_groups(CaptionConfig(), []) == []  # the default order is for any pictures
    assert len(unknown_groups(CaptionConfig(order=("people", "meta")), [])) == 1


def test_kept_tags_stand_first_in_every_showing() -> None:
    config = CaptionConfig(tag_dropout=0.9, caption_dropout=0.0)
    for repeat in range(50):
        assert split(caption(config, kept=2, repeat=repeat))[:2] == ["sky", "1girl"]
        assert split(caption(replace(config, keep_tokens=1), repeat=repeat))[0] == "sky"
    marked_wins = replace(config, tag_dropout=1.0, keep_tokens=3)
    assert split(caption(marked_wins, kept=1)) == ["sky"]
    assert split(caption(replace(config, tag_dropout=1.0, keep_tokens=9))) == list(TAGS)


def test_protected_groups_are_spared_by_tag_dropout_and_nothing_else_changes() -> None:
    config = replace(PLAIN, tag_dropout=1.0, protect=("character", "people"))
    assert split(caption(config)) == ["1girl", "hatsune miku"]
    half = CaptionConfig(tag_dropout=0.5, caption_dropout=0.0)
    for repeat in range(50):
        free = split(caption(half, repeat=repeat))
        spared = split(caption(replace(half, protect=("copyright",)), repeat=repeat))
        assert [tag for tag in spared if tag in free] == free
        assert set(spared) == {*free, "vocaloid"}


def test_groups_left_out_are_in_no_caption_unless_kept() -> None:
    config = replace(PLAIN, leave_out=("general", "copyright"), protect=("general",))
    assert split(caption(config)) == ["hatsune miku"]  # 1girl is of both groups: people and general
    assert split(plain_caption(TAGS, 0, config, categories=CATEGORIES)) == ["hatsune miku"]
    assert split(caption(config, kept=1)) == ["sky", "hatsune miku"]
    assert split(plain_caption(TAGS, 1, config, categories=CATEGORIES)) == ["sky", "hatsune miku"]


def test_a_group_goes_as_a_whole_as_often_as_told_and_moves_nothing() -> None:
    tags = ("someone", "vocaloid", "one", "two", "sky")
    categories = {"one": "character", "two": "character"}
    config = CaptionConfig(caption_dropout=0.0, group_dropout=("character=0.3", "artist=1"))

    def build(config: CaptionConfig, repeat: int) -> list[str]:
        text = build_caption(
            tags, 0, config, seed=7, epoch=0, sample_id="x", repeat=repeat, categories=CATEGORIES | categories
        )
        return split(text)

    gone = 0
    for repeat in range(500):
        whole, found = build(replace(config, group_dropout=()), repeat), build(config, repeat)
        assert "someone" not in found
        assert ("one" in found) == ("two" in found)
        gone += "one" not in found
        assert found == [tag for tag in whole if tag in found]
        assert len(found) in (2, 4)
    assert abs(gone - 150) < 5 * (500 * 0.3 * 0.7) ** 0.5
    assert "someone" in plain_caption(tags, 0, config, categories=CATEGORIES)


@pytest.mark.parametrize("text", ["artist", "artist=", "artist=2", "artist=nan", "=0.5"])
def test_group_dropouts_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="group_dropout"):
        CaptionConfig(group_dropout=(text,))
    with pytest.raises(ConfigError, match="group_dropout"):
        CaptionConfig(group_dropout=("artist=0.1", "artist=0.2"))


def test_every_part_of_the_seed_makes_another_showing() -> None:
    tags = tuple(f"tag {i}" for i in range(20))
    config = CaptionConfig(caption_dropout=0.0)
    showings = [caption(config, tags), *(caption(config, tags, **{part: 1}) for part in ("seed", "epoch", "repeat"))]
    showings.append(build_caption(tags, 0, config, seed=7, epoch=0, sample_id="another", repeat=0))
    assert len(set(showings)) == 5
    assert all(sorted(split(text)) == sorted(tags) for text in showings)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("abcdef123 ", min_size=1, max_size=5), unique=True, max_size=12),
    st.integers(0, 5),
    st.floats(0, 1),
    st.integers(0, 2**62),
    st.integers(0, 100),
)
def test_a_caption_is_a_function_and_dropouts_are_nested(
    tags: list[str], kept: int, dropout: float, seed: int, epoch: int
) -> None:
    kept = min(kept, len(tags))
    config = CaptionConfig(tag_dropout=dropout, caption_dropout=0.0, separator="|")

    def build(config: CaptionConfig) -> list[str]:
        text = build_caption(tags, kept, config, seed=seed, epoch=epoch, sample_id="x", repeat=0)
        return text.split("|") if text else []

    found = build(config)
    assert found == build(config)
    assert found[:kept] == tags[:kept]
    whole = build(replace(config, tag_dropout=0.0))
    assert sorted(whole) == sorted(tags)
    assert found == [tag for tag in whole if tag in found]  # dropping reorders nothing
    more = build(replace(config, tag_dropout=min(1.0, dropout + 0.2)))
    assert set(more) <= set(found)
    assert build(replace(config, caption_dropout=1.0)) == []


def test_all_orders_come_up_equally_often() -> None:
    config = CaptionConfig(caption_dropout=0.0, order=())
    counts = Counter(caption(config, ("a", "b", "c"), repeat=repeat) for repeat in range(600))
    assert set(counts) == {", ".join(order) for order in permutations("abc")}
    assert all(abs(count - 100) < 5 * (600 * 1 / 6 * 5 / 6) ** 0.5 for count in counts.values())  # five sigma


def test_dropouts_happen_as_often_as_they_say() -> None:
    config = CaptionConfig(tag_dropout=0.3, caption_dropout=0.2)
    tags = tuple(f"tag {i}" for i in range(10))
    captions = [split(caption(config, tags, repeat=repeat)) for repeat in range(500)]
    empty = sum(not found for found in captions)
    assert abs(empty - 100) < 5 * (500 * 0.2 * 0.8) ** 0.5
    left = sum(len(found) for found in captions) / (500 - empty) / 10
    assert abs(left - 0.7) < 5 * (0.3 * 0.7 / 4_000) ** 0.5


def test_the_numbers_drawn_are_the_same_everywhere() -> None:
    """Golden: resuming elsewhere must give the same words."""
    config = CaptionConfig(tag_dropout=0.2, caption_dropout=0.0)
    assert [caption(config, repeat=repeat) for repeat in range(3)] == GOLDEN


GOLDEN = [
    "1girl, hatsune miku, vocaloid, smile, sky",
    "1girl, vocaloid, sky, smile",
    "1girl, hatsune miku, sky, smile",
]


@pytest.mark.parametrize("wrong", [{"tag_dropout": -0.1}, {"caption_dropout": 1.1}, {"keep_tokens": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CaptionConfig(**wrong)
