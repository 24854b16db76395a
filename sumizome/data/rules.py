"""What is derived by rule: which records are wanted, quality and year tags, one spelling for each tag, implied tags.

Owns the rules and their arithmetic; reads nothing but the lists of aliases and implications. Invariant: a derived tag
follows from the records of one source alone, not from the order in which files or lines stand.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sumizome.data.csv_table import read_csv
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.records import Record
from sumizome.data.source_config import PictureRules, TagLists
from sumizome.data.tags import MAX_TAGS, ParsedTags, normalise_tag
from sumizome.errors import DataError

__all__ = [
    "QUALITY",
    "YEAR",
    "DerivedTags",
    "TagRewriter",
    "check_rating",
    "check_size",
    "derive_tags",
    "load_tag_rewriter",
]

QUALITY, YEAR = "quality", "year"
"""categories of the derived tags"""


def check_rating(record: Record, rules: PictureRules) -> None:
    """Raises: ImageRejected if the rating is not one of those that are kept."""
    if not rules.ratings:
        return
    if record.rating is None:
        raise ImageRejected("rating_missing", "expected a rating to filter by, found none in the record.")
    kept = {rating.strip().lower() for rating in rules.ratings}
    if record.rating not in kept and record.rating[0] not in kept:
        raise ImageRejected("rating_excluded", f"its rating is {record.rating[:40]!r}.")


def check_size(height: int, width: int, rules: PictureRules) -> None:
    """Raises: ImageRejected if the picture, upright, is smaller than the source's pictures shall be."""
    if min(height, width) < rules.min_side:
        raise ImageRejected(
            "below_min_side", f"expected sides of at least {rules.min_side} px, found {height}×{width}."
        )
    if height * width < rules.min_pixels:
        raise ImageRejected("below_min_pixels", f"expected at least {rules.min_pixels} px, found {height}×{width}.")


@dataclass(frozen=True, eq=False)
class DerivedTags:
    """The tags that rules add to pictures, as columns."""

    quality: NDArray[np.int8]
    """[pictures]: place in `names`"""
    years: NDArray[np.int16]
    """[pictures]: 0 = none is added"""
    names: tuple[str, ...]
    """"" first"""
    year: str

    def spread(self, places: NDArray[np.int64], count: int) -> "DerivedTags":
        """The same of a list of `count` pictures, in which these stand at `places`; the others get none."""
        quality, years = np.zeros(count, np.int8), np.zeros(count, np.int16)
        quality[places], years[places] = self.quality, self.years
        return replace(self, quality=quality, years=years)

    def texts(self, places: NDArray[np.int64]) -> list[str]:
        """The tags of some pictures, between commas."""
        pairs = zip(self.quality[places].tolist(), self.years[places].tolist(), strict=True)
        return [", ".join(filter(None, [self.names[code], self._year_tag(year)])) for code, year in pairs]

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """(tag, category) → pictures that it is added to."""
        codes, years = (np.unique(each[each != 0], return_counts=True) for each in (self.quality, self.years))
        found = {(self.names[code], QUALITY): count for code, count in zip(*map(np.ndarray.tolist, codes), strict=True)}
        found |= {
            (self._year_tag(year), YEAR): count for year, count in zip(*map(np.ndarray.tolist, years), strict=True)
        }
        return Counter({pair: count for pair, count in found.items() if pair[0]})

    def _year_tag(self, year: int) -> str:
        return normalise_tag(self.year.replace("{year}", str(year))) if year else ""


def derive_tags(scores: NDArray[np.float64], years: NDArray[np.int16], rules: PictureRules) -> DerivedTags:
    """The tags of quality and year that pictures get of their scores (NaN = none) and years (0 = none).

    A score's percentile is 100·(pictures below + half of those equal) / pictures, among the pictures of its year (those
    without a year among themselves); so equal scores get equal tags, and a year of one picture lies at 50.
    """
    thresholds = rules.thresholds()
    bounds = np.array([bound for bound, _ in thresholds])
    quality = np.zeros(len(scores), np.int8)
    for year in np.unique(years) if thresholds else ():
        mine = np.flatnonzero((years == year) & ~np.isnan(scores))
        ordered = np.sort(scores[mine])
        below, through = (np.searchsorted(ordered, scores[mine], side) for side in ("left", "right"))
        quality[mine] = np.searchsorted(bounds, 50.0 * (below + through) / max(len(mine), 1), "right")
    names = ("", *(normalise_tag(tag) for _, tag in thresholds))
    return DerivedTags(quality, years if rules.year else np.zeros_like(years), names, rules.year)


# --- one spelling for each tag, and what a tag implies ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TagRewriter:
    """Aliases and implications, resolved: no alias leads to an alias, each tag knows all that it implies."""

    aliases: Mapping[str, str]
    implied: Mapping[str, tuple[str, ...]]

    def rewrite(self, parsed: ParsedTags) -> ParsedTags:
        """The tags in their right spelling, each once, implied ones last; kept tags stay the leading ones.

        Raises: ImageRejected if they become too many.
        """
        if not self.aliases and not self.implied:
            return parsed
        spelt = [self.aliases.get(tag, tag) for tag in parsed.tags]
        implied = (more for tag in spelt for more in self.implied.get(tag, ()))
        tags = tuple(dict.fromkeys([*spelt, *implied]))
        if len(tags) > MAX_TAGS:
            raise ImageRejected("caption_invalid", f"expected at most {MAX_TAGS} tags with implied ones: {len(tags)}.")
        return ParsedTags(tags, len(dict.fromkeys(spelt[: parsed.kept])))


def load_tag_rewriter(lists: TagLists) -> TagRewriter:
    """Raises: DataError: unreadable lists, aliases in a circle."""
    aliases = dict(_load_pairs(lists.aliases)) if lists.aliases else {}
    resolved = {tag: _follow(tag, aliases) for tag in aliases}
    direct: dict[str, list[str]] = {}
    for tag, implied in _load_pairs(lists.implications) if lists.implications else []:
        direct.setdefault(resolved.get(tag, tag), []).append(resolved.get(implied, implied))
    return TagRewriter(resolved, {tag: _closure(tag, direct) for tag in direct})


def _follow(tag: str, aliases: Mapping[str, str]) -> str:
    seen = {tag}
    while tag in aliases:
        tag = aliases[tag]
        if tag in seen:
            raise DataError(f"aliases: expected a spelling to end at, found a circle through {tag!r}.")
        seen.add(tag)
    return tag


def _closure(tag: str, direct: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """All that a tag implies, nearest first; circles do no harm."""
    found: dict[str, None] = {}
    ahead = list(direct.get(tag, ()))
    for each in ahead:  # grows while it is walked
        if each not in found and each != tag:
            found[each] = None
            ahead.extend(direct.get(each, ()))
    return tuple(found)


def _load_pairs(path: Path) -> list[tuple[str, str]]:
    """The (antecedent, consequent) pairs of a booru's list; where it has a status, the active ones."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = read_csv(file, path)
            if missing := {"antecedent_name", "consequent_name"} - set(rows.fieldnames or ()):
                raise DataError(f"expected a column {sorted(missing)[0]} in {path}, found {rows.fieldnames}.")
            active = [row for row in rows if (row.get("status") or "").strip() in ("", "active")]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"expected a CSV in UTF-8, found {path} unreadable: {error}.") from error
    spelt = [tuple(normalise_tag(row[name] or "") for name in ("antecedent_name", "consequent_name")) for row in active]
    return [(first, second) for first, second in spelt if first and second and first != second]
