"""The table of tags as a CSV that people read and edit and training reads back, and what weighting does by frequency.

Owns the file and the summary; counts and weights are `tags`'. Invariant: a table that is written and loaded gives back
its weights to the last bit and its tags to the last sign, also those that a spreadsheet would take for formulas. A tag
may be typed with underscores: it is spelt as ingest spells it.
"""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sumizome.data.csv_table import read_csv, unguard, write_csv
from sumizome.data.listing import printable
from sumizome.data.tags import MAX_TAG_LENGTH, normalise_tag
from sumizome.errors import DataError

__all__ = [
    "FrequencyClass",
    "TagTable",
    "frequency_classes",
    "load_tag_table",
    "unused_rows",
    "with_tag_table",
    "write_tag_table",
]

_COLUMNS = ["tag", "category", "count", "weight", "effective"]
_NAMED = 3
"""tags of rows without effect that are named"""


@dataclass(frozen=True)
class TagTable:
    """What training takes from the file."""

    weights: Mapping[str, float]
    categories: Mapping[str, str]


def write_tag_table(statistics: pa.Table, path: Path) -> None:
    """Writes what `tags.tag_statistics` found. Raises: DataError if the disk refuses."""

    rows = (row for batch in statistics.to_batches(65_536) for row in batch.to_pylist())
    lines = ([r["tag"], r["category"], r["count"], repr(r["weight"]), f"{r['effective']:.6g}"] for r in rows)
    write_csv(path, _COLUMNS, lines)


def with_tag_table(
    categories: Mapping[str, str], path: Path | None
) -> tuple[Mapping[str, str], Mapping[str, float] | None]:
    """(categories, weights) of tags once the table at `path` has its say; without one there are no weights.

    Raises: DataError as `load_tag_table`.
    """
    if path is None:
        return categories, None
    edited = load_tag_table(path)
    return {**categories, **edited.categories}, edited.weights


def load_tag_table(path: Path) -> TagTable:
    """The tags' weights and categories, spelt as in a manifest; of the columns, `tag` and `weight` must be there.

    Raises: DataError naming the line: a weight that is not positive and finite, a tag twice (in either spelling).
    """
    weights: dict[str, float] = {}
    categories: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = read_csv(file, path)
            if missing := {"tag", "weight"} - set(rows.fieldnames or ()):
                raise DataError(f"expected a column {sorted(missing)[0]} in {path}, found {rows.fieldnames}.")
            for row in rows:
                tag, where = normalise_tag(unguard(row["tag"] or "")), f"{path}, line {rows.line_num}"
                if not tag or len(tag) > MAX_TAG_LENGTH or tag in weights:
                    raise DataError(f"{where}: expected each tag once, found {tag[:80]!r}.")
                weights[tag] = _weight(row["weight"] or "", where)
                if category := unguard(row.get("category") or ""):
                    categories[tag] = category
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"expected a CSV of tags in UTF-8, found {path} unreadable: {error}.") from error
    return TagTable(weights, categories)


def unused_rows(path: Path | None, given: Mapping[str, float] | None, vocabulary: Iterable[str]) -> list[str]:
    """One line on the rows at `path` that name no tag of a data set, and so have no effect; none if all name one."""
    if not given or not (unused := given.keys() - set(vocabulary)):
        return []
    named = [printable(tag) for tag in given if tag in unused][:_NAMED]
    more = ", …" if len(unused) > _NAMED else ""
    return [
        f"{len(unused):,} of the {len(given):,} rows of {path} have no effect: no picture has such a tag "
        f"({', '.join(named)}{more})"
    ]


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{where}: expected a weight above 0, found {text[:40]!r}.")
    return weight


class FrequencyClass(NamedTuple):
    """Tags of like frequency."""

    least: int
    """showings an epoch; the class goes up to the next class's least"""
    tags: int
    share: float
    """of all showings of tags in an epoch"""
    effective_share: float
    """the same with every showing counted by its image's loss weight"""
    ratio: float
    """effective count / count of the class: above 1 where weighting raises it"""


def frequency_classes(statistics: pa.Table) -> list[FrequencyClass]:
    """The head, the middle and the tail, by powers of ten of the count, most frequent first."""
    counts, effective = statistics["count"].to_numpy(), statistics["effective"].to_numpy()
    powers = np.floor(np.log10(np.maximum(counts, 1))).astype(np.int64)
    classes = []
    for power in np.unique(powers)[::-1].tolist():
        mine = powers == power
        shown, felt = int(counts[mine].sum()), float(effective[mine].sum())
        share, felt_share = shown / counts.sum(), felt / effective.sum()
        classes.append(FrequencyClass(10**power, int(mine.sum()), float(share), float(felt_share), felt / shown))
    return classes
