"""The page as a browser's parser sees it: data is text, whatever it holds, and nothing is fetched or run."""

import base64
import hashlib
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest
from hostile_text import HOSTILE, HTML, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from sumizome.errors import ConfigError
from sumizome.report import charts
from sumizome.report.page import check_page_path, render_page, visible, write_page


def skeleton(root: Element) -> list[tuple[str, tuple[str, ...]]]:
    """Elements and the names of their attributes, in order: what data must not change."""
    return [(str(element.tag), tuple(sorted(element.attrib))) for element in root.iter()]


def page_of(values: list[str]) -> str:
    template = Path(__file__).with_name("listing.html.j2").read_text(encoding="utf-8")
    from sumizome.report import page

    environment = page._environment()
    rendered = environment.from_string(template).render(values=values, title="t", css="", policy="p", version="v")
    return str(rendered)


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_text_is_one_text_node_and_one_attribute_value(value: str) -> None:
    harmless, hostile = parse(page_of(["x"])), parse(page_of([value]))
    assert skeleton(hostile) == skeleton(harmless)
    found = [element for element in hostile.iter() if element.get("id") == "value"]
    assert [element.text for element in found] == [visible(value)]
    assert [element.get("title") for element in found] == [visible(value)]


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_any_text_keeps_the_page_as_it_is(value: str) -> None:
    root = parse(page_of([value]))
    assert skeleton(root) == skeleton(parse(page_of(["x"])))
    (element,) = (element for element in root.iter() if element.get("id") == "value")
    assert (element.text or "") == visible(value)


@given(st.text(max_size=40))
def test_what_is_made_visible_is_seen(value: str) -> None:
    shown = visible(value)
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")
    shown.encode("utf-8")
    assert visible(shown) == shown


def test_control_characters_have_pictures() -> None:
    assert visible("a\0b\x1b\x7f\n") == "a␀b␛␡␊"
    assert visible("\u202egnp") == "⟨U+202E⟩gnp"


def test_the_policy_allows_this_style_and_nothing_else() -> None:
    root = parse(str(_frame()))
    policy = next(m.get("content") for m in root.iter(f"{HTML}meta") if m.get("http-equiv"))
    (style,) = root.iter(f"{HTML}style")
    digest = base64.b64encode(hashlib.sha256((style.text or "").encode()).digest()).decode()
    assert policy is not None
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "url(" not in (style.text or "") and "@import" not in (style.text or "")


def _frame() -> str:
    return render_page("frame.html.j2", {"title": "t"})


def test_a_page_takes_the_place_of_a_page_only(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    check_page_path(page)
    write_page(page, _frame())
    check_page_path(page)
    (tmp_path / "mine.html").write_text("<html>")
    with pytest.raises(ConfigError, match=r"no page of sumizome"):
        check_page_path(tmp_path / "mine.html")
    with pytest.raises(ConfigError, match=r"\.html"):
        check_page_path(tmp_path / "a.txt")


# --- drawings ---------------------------------------------------------------------------------------------------------


def test_bars_are_as_high_as_their_counts() -> None:
    chart = charts.histogram("t", [1, 0, 4], [0, 1, 2, 3], "x")
    assert [round(rect.height / chart.rects[0].height, 6) for rect in chart.rects] == [1, 4]
    assert all(chart.left <= r.x and r.x + r.width <= chart.right and r.y >= chart.top for r in chart.rects)
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2", "3"]


def test_every_point_of_a_density_is_in_a_cell() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    width, height = random.integers(16, 4000, (2, 500))
    chart = charts.density("t", width, height, "x", "y", ticks=(64, 512))
    counts = [int(rect.title.rsplit(": ", 1)[1]) for rect in chart.rects]
    assert sum(counts) == 500
    one = charts.density("t", width[:1], height[:1], "x", "y", ticks=())
    assert len(one.rects) == 1


def test_a_line_of_frequencies_falls_and_stays_inside() -> None:
    import numpy as np

    counts = np.sort(np.random.default_rng(0).zipf(1.5, 5000).clip(max=10**6))[::-1].astype(np.float64)
    chart = charts.rank_frequency("t", [("a", counts), ("b", counts / 2)])
    for line in chart.lines:
        points = [tuple(map(float, point.split(","))) for point in line.points.split()]
        assert all(chart.left <= x <= chart.right and chart.top - 1 <= y <= chart.bottom + 1 for x, y in points)
        assert points == sorted(points)  # to the right and down
    assert len(charts.rank_frequency("t", [("a", np.ones(1))]).lines) == 1
