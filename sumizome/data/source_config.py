"""What a user tells ingest: a source's folder, records, columns and rules; lists of tags; what becomes of duplicates.

Owns these settings and what can be checked of them alone. Cheap to import: the command line builds its options on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from sumizome.errors import ConfigError

__all__ = ["MAX_REPEATS", "Columns", "DuplicateConfig", "PictureRules", "SourceConfig", "SourceKind", "TagLists"]

MAX_REPEATS = 1000
"""`1999_name` is a name, not a repeat count: years and serial numbers begin folder names, too"""

SourceKind: TypeAlias = Literal["folder", "booru", "gallery-dl", "kohya", "imagefolder", "webdataset"]
"""`folder`: captions beside pictures. `booru`: a table of records. `gallery-dl`: `name.ext.json` beside each picture.
`kohya`: one JSON object, picture → tags and caption. `imagefolder`: Hugging Face's metadata.jsonl, .csv or .parquet.
`webdataset`: tars of pictures, each with .txt, .caption, .tags or .json of the same name, or with a table of records"""

_CATEGORIES = {
    # In the order in which a record's tags stand in the manifest; booru dumps, gallery-dl's two spellings, e621.
    "character": ("tag_string_character", "tags_character", "tags.character"),
    "copyright": ("tag_string_copyright", "tags_copyright", "tags.copyright"),
    "artist": ("tag_string_artist", "tags_artist", "tags.artist"),
    "species": ("tag_string_species", "tags_species", "tags.species"),
    "general": ("tag_string_general", "tags_general", "tags.general"),
    "meta": ("tag_string_meta", "tags_meta", "tags.meta", "tags_metadata"),
}


@dataclass(frozen=True)
class Columns:
    """Where a table says what. Of several names the first that a row has is used; `a.b` is key b of the object a."""

    file: tuple[str, ...] = ("file_name",)
    """path of the picture below the source's folder"""
    id: tuple[str, ...] = ("id",)
    """the picture's number or name, if files are called `id.ext`"""
    md5: tuple[str, ...] = ("md5", "file.md5")
    """hex; finds files called `md5.ext`, and every file found is checked against it"""
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(_CATEGORIES))
    """category → the column of its tags"""
    tags: tuple[str, ...] = ("tag_string", "tags")
    """tags of no category, read where a row has none of `categories`"""
    caption: tuple[str, ...] = ("caption", "text")
    """text that goes before the tags"""
    separator: str = ""
    """between the tags of a string; empty = commas if it has any, else spaces (lists need none)"""
    rating: tuple[str, ...] = ("rating",)
    score: tuple[str, ...] = ("score.total", "score")
    created_at: tuple[str, ...] = ("created_at", "date")
    """a date in nearly any form, or seconds since 1970; only its year is used"""
    file_ext: tuple[str, ...] = ("file_ext", "extension", "file.ext")
    """suffix of the picture's file, which is compared with what the file holds"""
    width: tuple[str, ...] = ("image_width", "width", "file.width")
    """px, compared with the picture's, either way up"""
    height: tuple[str, ...] = ("image_height", "height", "file.height")


@dataclass(frozen=True)
class PictureRules:
    """Which pictures of a source are wanted, and what tags their records add."""

    ratings: tuple[str, ...] = ()
    """ratings to keep, as words or as first letters (g s q e); empty = all. Needs records; a picture without a rating
    is rejected then"""
    quality: tuple[str, ...] = ()
    """tags by score, as `percentile=tag`: "0=low quality" "50=good quality" "90=best quality" gives each picture the
    tag of the highest percentile that its score reaches among the source's pictures of the same year; empty = none"""
    year: str = ""
    """tag of the year in which a picture was posted, with {year} in it, such as "year {year}"; empty = none"""
    min_side: int = 0
    """px that the shorter side must have; 0 = any (16 is always asked for)"""
    min_pixels: int = 0
    """height × width that a picture must have; 0 = any"""
    mismatch: Literal["report", "reject"] = "report"
    """a picture of another size or format than its record says, such as a thumbnail: kept and listed, or left out"""

    def __post_init__(self) -> None:
        self.thresholds()
        if self.year and "{year}" not in self.year:
            raise ConfigError(f'year: expected a text such as "year {{year}}", found {self.year!r}.')
        if min(self.min_side, self.min_pixels) < 0:
            raise ConfigError(f"min_side, min_pixels: expected 0 or more, found {self.min_side}, {self.min_pixels}.")

    @property
    def needs_records(self) -> bool:
        return bool(self.ratings or self.quality or self.year)

    def thresholds(self) -> list[tuple[float, str]]:
        """(percentile, tag), rising."""
        found = []
        for text in self.quality:
            percentile, equals, tag = text.partition("=")
            try:
                bound = float(percentile)
            except ValueError:
                bound = -1.0
            if not equals or not 0 <= bound <= 100:
                raise ConfigError(f'quality: expected percentile=tag such as "90=best quality", found {text!r}.')
            found.append((bound, tag))
        if len({bound for bound, _ in found}) < len(found):
            raise ConfigError("quality: expected each percentile once, found one twice.")
        return sorted(found)


@dataclass(frozen=True)
class SourceConfig:
    """A folder of pictures and what is known of them."""

    folder: Path
    """the folder of the pictures or tars, or one tar; only read"""
    kind: SourceKind = "folder"
    """`folder`: captions beside pictures; `booru`: a dump of records; `gallery-dl`: name.ext.json beside each picture;
    `kohya`: its metadata JSON; `imagefolder`: metadata.jsonl, .csv or .parquet; `webdataset`: tars"""
    records: Path | None = None
    """the dump (.jsonl, .parquet, .csv) of a `booru` source, and of a `webdataset` one if it has one; the JSON of a
    `kohya` one"""
    repeats: int = 1
    """times that an epoch shows the source's pictures; multiplies what folders like 10_name ask for"""
    damaged_tars: Literal["stop", "reject"] = "stop"
    """a tar that is truncated or damaged: stop, naming it, or leave out all of its pictures and go on"""
    rules: PictureRules = field(default_factory=PictureRules)
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        if self.kind != "webdataset" and (self.records is not None) != (self.kind in ("booru", "kohya")):
            expected = "records, a file" if self.records is None else "no records"
            raise ConfigError(f"{self.folder}: expected {expected} for a source of kind {self.kind!r}.")
        if self.kind == "folder" and self.rules.needs_records:
            raise ConfigError(
                f"{self.folder}: ratings, quality and year come from records, and a source of kind 'folder' has none: "
                "give another kind, or leave them out."
            )
        if not 1 <= self.repeats <= MAX_REPEATS:
            raise ConfigError(f"{self.folder}: repeats: expected 1 to {MAX_REPEATS}, found {self.repeats}.")


@dataclass(frozen=True)
class TagLists:
    """Lists about tags, as CSV files; they hold for all sources."""

    aliases: Path | None = None
    """columns antecedent_name, consequent_name: the first is replaced by the second"""
    implications: Path | None = None
    """columns antecedent_name, consequent_name: where the first stands, the second is added at the end"""
    categories: Path | None = None
    """columns tag, category: goes before what a dump says"""

    def files(self) -> list[Path]:
        return [path for path in (self.aliases, self.implications, self.categories) if path is not None]


@dataclass(frozen=True)
class DuplicateConfig:
    """What becomes of pictures that are there more than once; all are listed in .duplicates.csv."""

    exact: Literal["report", "drop"] = "report"
    """files of the same bytes; drop keeps the first of them"""
    near: Literal["off", "report", "drop"] = "off"
    """the same picture at another size, format or quality, found by a perceptual hash; drop keeps the largest"""
    max_distance: int = 4
    """bits of 63 in which hashes of near copies may differ, 0 to 8; 4: of copies scaled to half or saved as JPEG 99 %
    differ in 0 to 4, other pictures in about 32, but variants with a changed detail in few, too: look at the report
    before you drop"""

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 8:
            raise ConfigError(f"max_distance: expected 0 to 8, found {self.max_distance}.")
        if self.near == "drop" and self.exact != "drop":
            raise ConfigError("near: drop keeps one of many, so exact must be drop too: give both.")
