"""Makes a tagged folder of real pictures out of two Debian packages: colour emoji and what Unicode's CLDR calls them.

    apt-get install fonts-noto-color-emoji unicode-cldr-core; pip install fonttools
    python demo/emoji.py --out DIR

Owns finding the bitmap of an emoji (one glyph, or a sequence that the font joins into one) and turning annotations into
tags: the name first, then the keywords. The PNGs are the font's own bytes: palette and transparency are kept.
"""

import argparse
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BitmapFont", "annotation_tags", "load_bitmap_font", "main", "read_annotations", "write_folder"]

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
VARIATION_SELECTOR = "\ufe0f"
"""Asks for the colour form of a character; CLDR's annotations leave it out, some ligatures contain it."""
LIGATURE_SUBSTITUTION = 4


@dataclass(frozen=True)
class BitmapFont:
    """A CBDT font: PNG bytes by glyph name, and what is needed to get from text to a glyph."""

    pngs: dict[str, bytes]
    glyphs: dict[int, str]
    """Code point → glyph name."""
    ligatures: dict[tuple[str, ...], str]
    """Glyph names in sequence → the one glyph that stands for them."""

    def png(self, text: str) -> bytes | None:
        """The picture of one emoji, or None where the font has none (or would draw it as several)."""
        for spelling in (text, text + VARIATION_SELECTOR, text.replace(VARIATION_SELECTOR, "")):
            names = tuple(self.glyphs.get(ord(character), "") for character in spelling)
            glyph = names[0] if len(names) == 1 else self.ligatures.get(names)
            if glyph in self.pngs:
                return self.pngs[glyph]
        return None


def load_bitmap_font(path: Path) -> BitmapFont:
    """Reads the largest strike of a font with CBDT bitmaps. Needs fonttools, which nothing else here does."""
    from fontTools.ttLib import TTFont

    font = TTFont(path)
    strike = max(font["CBDT"].strikeData, key=len)
    pngs = {name: bytes(glyph.imageData) for name, glyph in strike.items()}
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for subtable in lookup.SubTable
        if subtable.LookupType == LIGATURE_SUBSTITUTION
        for first, joined in subtable.ligatures.items()
        for ligature in joined
    }
    return BitmapFont(pngs, font.getBestCmap(), ligatures)


def read_annotations(paths: list[Path]) -> dict[str, tuple[str, list[str]]]:
    """Emoji → (name, keywords) from CLDR annotation files, in the files' order."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for path in paths:
        for annotation in ElementTree.parse(path).iter("annotation"):
            emoji, text = annotation.get("cp", ""), annotation.text or ""
            if annotation.get("type") == "tts":
                names[emoji] = text.strip()
            else:
                keywords[emoji] = [word.strip() for word in text.split("|")]
    return {emoji: (name, keywords.get(emoji, [])) for emoji, name in names.items()}


def annotation_tags(name: str, keywords: list[str]) -> list[str]:
    """The name, then each keyword once. A comma would end a tag, so "man, woman" becomes "man and woman"."""
    tags = [tag.replace(", ", " and ").replace(",", " ").strip() for tag in (name, *keywords)]
    return list(dict.fromkeys(tag for tag in tags if tag))


def write_folder(font: BitmapFont, annotations: dict[str, tuple[str, list[str]]], out: Path) -> int:
    """Writes CODEPOINTS.png and .txt for each annotated emoji that the font can draw; returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for emoji, (name, keywords) in annotations.items():
        png = font.png(emoji)
        if png is None:
            continue
        stem = "-".join(f"{ord(character):04x}" for character in emoji)
        (out / f"{stem}.png").write_bytes(png)
        (out / f"{stem}.txt").write_text(", ".join(annotation_tags(name, keywords)) + "\n", encoding="utf-8")
        count += 1
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a tagged folder of emoji.")
    parser.add_argument("--font", type=Path, default=FONT, help=f"colour font with CBDT bitmaps (default: {FONT})")
    parser.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        default=[CLDR / "annotations/en.xml", CLDR / "annotationsDerived/en.xml"],
        help="CLDR annotation files (default: English, with the derived ones)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; created if missing")
    options = parser.parse_args()
    font, annotations = load_bitmap_font(options.font), read_annotations(options.annotations)
    count = write_folder(font, annotations, options.out)
    print(f"{count} pictures with tags in {options.out}")
    print(f"({len(annotations)} annotated characters, {len(font.pngs)} bitmaps in the font)")


if __name__ == "__main__":
    main()
