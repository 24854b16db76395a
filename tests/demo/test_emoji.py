"""Emoji: annotations become tags, and a font's ligatures lead to the right bitmap."""

from pathlib import Path

import pytest
from emoji import BitmapFont, annotation_tags, load_bitmap_font, read_annotations, write_folder

XML = """<?xml version="1.0" encoding="UTF-8" ?>
<ldml><annotations>
<annotation cp="👪">family | mother</annotation>
<annotation cp="👪" type="tts">family: man, woman</annotation>
<annotation cp="❤">heart | red heart</annotation>
<annotation cp="❤" type="tts">red heart</annotation>
<annotation cp="∑" type="tts">sum</annotation>
</annotations></ldml>
"""
FONT = BitmapFont(
    pngs={"heart": b"heart", "family": b"family", "man": b"man"},
    glyphs={ord("❤"): "heart", ord("👨"): "man", 0x200D: "joiner", ord("👩"): "woman", ord("👪"): "family"},
    ligatures={("man", "joiner", "woman"): "family"},
)


def test_name_comes_first_keywords_once_and_commas_do_not_split_a_tag() -> None:
    assert annotation_tags("family: man, woman", ["family", "mother", "family"]) == [
        "family: man and woman",
        "family",
        "mother",
    ]


def test_sequences_are_looked_up_as_ligatures() -> None:
    assert FONT.png("👨\u200d👩") == b"family"
    assert FONT.png("❤\ufe0f") == b"heart"  # the variation selector asks for what the font has anyway
    assert FONT.png("👩") is None  # in the font, but without a bitmap
    assert FONT.png("👨👩") is None  # two pictures, not one


def test_folder_holds_what_the_font_can_draw(tmp_path: Path) -> None:
    source = tmp_path / "en.xml"
    source.write_text(XML, encoding="utf-8")
    annotations = read_annotations([source])
    assert annotations["❤"] == ("red heart", ["heart", "red heart"])
    assert write_folder(FONT, annotations, tmp_path / "out") == 2
    assert (tmp_path / "out" / "2764.png").read_bytes() == b"heart"
    assert (tmp_path / "out" / "2764.txt").read_text(encoding="utf-8") == "red heart, heart\n"
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_debian_font_where_it_is_installed() -> None:
    pytest.importorskip("fontTools")
    path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    if not path.exists():
        pytest.skip("fonts-noto-color-emoji is not installed")
    font = load_bitmap_font(path)
    pictures = [font.png(text) for text in ("😀", "❤", "👨\u200d🌾", "🇯🇵", "👍🏽", "1\u20e3")]
    assert all(picture and picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == len(pictures)
