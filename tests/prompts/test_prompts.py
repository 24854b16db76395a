"""Golden prompts of each syntax: what the programs themselves make of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumizome.prompts import Part, PromptSyntax, parse_prompt, prompts_by_step, scheduled


def _parts(text: str, syntax: PromptSyntax) -> list[list[tuple[str, float]]]:
    return [[(part.text, round(part.weight, 6)) for part in group] for group in parse_prompt(text, syntax)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (cat)", [("a ", 1), ("cat", 1.1)]),
        ("((cat))", [("cat", 1.21)]),
        ("[cat]", [("cat", 0.909091)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("((cat:1.3))", [("cat", 1.43)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("([cat])", [("cat", 1.0)]),
        (r"tree \(genshin\)", [("tree (genshin)", 1)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        ("(a", [("a", 1.1)]),
        ("a) b]", [("a) b]", 1)]),
        ("re:zero", [("re:zero", 1)]),
        ("(re:zero)", [("re:zero", 1.1)]),
        ("a:1.3) b", [("a:1.3) b", 1)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(hat:-1)", [("hat", -1)]),
        ("{a} 1.5::b::", [("{a} 1.5::b::", 1)]),
    ],
)
def test_a1111_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert _parts(text, "a1111") == [expected]


def test_a1111_breaks_begin_groups_and_brackets_reach_over_them() -> None:
    assert _parts("a BREAK b", "a1111") == [[("a", 1)], [("b", 1)]]
    assert _parts("a BREAK ", "a1111") == [[("a", 1)]]
    assert _parts(" BREAK a BREAK BREAK b", "a1111") == [[("", 1)], [("a", 1)], [("", 1)], [("b", 1)]]
    assert _parts("BREAKFAST", "a1111") == [[("BREAKFAST", 1)]]
    assert _parts("(a BREAK b:2) c", "a1111") == [[("a", 2)], [("b", 2), (" c", 1)]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("((cat))", [("cat", 1.21)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("((cat:1.3))", [("cat", 1.3)]),  # a number replaces
        ("(a (b) c:0.5)", [("a ", 0.5), ("b", 0.55), (" c", 0.5)]),
        ("[cat] {dog} BREAK", [("[cat] {dog} BREAK", 1)]),
        (r"tree \(x\) (y)", [("tree (x) ", 1), ("y", 1.1)]),
        ("(a", [("(a", 1)]),
        ("(re:zero)", [("re:zero", 1.1)]),
        ("(a:b:2)", [("a:b", 2)]),
        ("(:2)", [(":2", 1.1)]),
    ],
)
def test_comfyui_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert _parts(text, "comfyui") == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("{cat}", [("cat", 1.05)]),
        ("{{cat}}", [("cat", 1.1025)]),
        ("[cat]", [("cat", 0.952381)]),
        ("{[cat]}", [("cat", 1)]),
        ("(cat:1.3)", [("(cat:1.3)", 1)]),
        ("a, 1.5::rain, night::, b", [("a, ", 1), ("rain, night", 1.5), (", b", 1)]),
        ("1.5::{a} b", [("a", 1.575), (" b", 1.5)]),
        ("-1::hat::", [("hat", -1)]),
        ("2::a 0.5::b::", [("a ", 2), ("b", 0.5)]),
        ("std::vector", [("std::vector", 1)]),
        ("{a", [("a", 1.05)]),
        ("a}", [("a}", 1)]),
        ("v1.5::x", [("v1.5::x", 1)]),
    ],
)
def test_novelai_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert _parts(text, "novelai") == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["a"] * 4),
        ("a [b:2]", ["a ", "a ", "a b", "a b"]),
        ("a [b::2]", ["a b", "a b", "a ", "a "]),
        ("[a:b:.5] c", ["a c", "a c", "b c", "b c"]),
        ("[a:b:0.25]", ["a", "b", "b", "b"]),
        ("[a: b : 1 ]", ["a", " b ", " b ", " b "]),
        ("[a:b:99]", ["a"] * 4),
        ("[a:b:1]", ["a", "b", "b", "b"]),
        ("[a:b:1.0]", ["a"] * 4),
        ("[a:b:1.5]", ["a"] * 4),
        ("[a:[b:c:3]:1]", ["a", "b", "b", "c"]),
        ("[(a:2):3]", ["", "", "", "(a:2)"]),
        ("[fe|]male", ["female", "male"] * 2),
        ("[a|b|c]", ["a", "b", "c", "a"]),
        ("[[a]]", ["[[a]]"] * 4),
        ("[a:b]", ["[a:b]"] * 4),
        ("[a", ["[a"] * 4),
        (r"\[a:b:2]", [r"\[a:b:2]"] * 4),
        ("[[a|b]:2]", ["", "", "a", "b"]),
    ],
)
def test_a1111_schedules(text: str, expected: list[str]) -> None:
    assert prompts_by_step(text, 4) == expected


def test_only_a1111_has_schedules() -> None:
    assert scheduled("[a|b]", "a1111", 2) == ["a", "b"]
    for syntax in ("plain", "comfyui", "novelai"):
        assert scheduled("[a|b]", syntax, 2) == ["[a|b]"] * 2


@given(st.text(alphabet="ab ,:|.5()[]{}\\\n", max_size=30), st.sampled_from(["a1111", "comfyui", "novelai"]))
def test_no_prompt_is_an_error_and_no_letter_is_lost(text: str, syntax: PromptSyntax) -> None:
    for step in scheduled(text, syntax, 3):
        shown = "".join(part.text for group in parse_prompt(step, syntax) for part in group)
        assert [letter for letter in shown if letter in "ab"] == [letter for letter in step if letter in "ab"]


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "infinity", "1e400", "1e39", "9" * 400, "9" * 60])
@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_a_weight_that_is_no_finite_number_is_text(number: str, syntax: PromptSyntax) -> None:
    """Embeddings are weighted in float32: more than it holds would be infinity there, and the picture nan."""
    assert _parts(f"a (x:{number}) b", syntax) == [[("a ", 1), (f"x:{number}", 1.1), (" b", 1)]]


def test_novelai_takes_a_number_of_too_many_digits_for_text() -> None:
    long = "9" * 400
    assert _parts(f"a {long}::x", "novelai") == [[(f"a {long}::x", 1)]]
    assert _parts("a inf::x", "novelai") == [[("a inf::x", 1)]]


@pytest.mark.parametrize("syntax", ["plain", "a1111", "comfyui", "novelai"])
@pytest.mark.parametrize("brackets", ["()", "[]", "{}"])
def test_brackets_may_stand_as_deep_as_one_likes(brackets: str, syntax: PromptSyntax) -> None:
    for step in scheduled(brackets[0] * 3000 + "cat" + brackets[1] * 3000, syntax, 2):
        assert "cat" in "".join(part.text for part in parse_prompt(step, syntax)[0])


def test_brackets_beyond_the_largest_number_weigh_infinity() -> None:
    assert parse_prompt("{" * 20_000 + "cat", "novelai") == ((Part("cat", math.inf),),)


@given(st.text(alphabet="ab, -_/é墨", max_size=30), st.sampled_from(["plain", "a1111", "comfyui", "novelai"]))
def test_text_without_marks_is_itself(text: str, syntax: PromptSyntax) -> None:
    assert _parts(text, syntax) == [[(text, 1.0)]]
