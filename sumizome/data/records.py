"""What a dump says of a picture: one row of JSONL, CSV or parquet, or one JSON object, as a `Record`.

Owns the column mapping and the reading of tables; which file a record belongs to is `matching`'s. Invariant: a record
is data. Its id, md5 and file name are compared with the files that were listed and never opened as paths.
"""

import csv
import datetime
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sumizome.data.csv_table import check_columns, read_csv
from sumizome.data.image_rejected import ImageRejected
from sumizome.data.source_config import Columns
from sumizome.data.tags import normalise_tag
from sumizome.errors import ConfigError, DataError

__all__ = [
    "MAX_LINE",
    "Known",
    "Record",
    "Row",
    "build_record",
    "parse_object",
    "read_lines",
    "read_rows",
    "row_file",
    "row_keys",
]

MAX_LINE = 2**20
"""characters of one line of metadata"""

Row: TypeAlias = Mapping[str, Any]

Known: TypeAlias = Callable[[Sequence[str | None]], NDArray[np.bool_]]
"""names → bool [names]: False where no file is called so"""


class Record(NamedTuple):
    """One picture's row, checked."""

    where: str
    """file and line, for messages"""
    text: str
    """its tags, between commas"""
    categories: tuple[tuple[str, str], ...]
    """(tag, category) of those whose category is known"""
    md5: str | None
    """32 hex digits"""
    rating: str | None
    """lower case"""
    score: float | None
    year: int | None
    height: int = 0
    """px; 0 = it does not say"""
    width: int = 0
    file_ext: str = ""
    """lower case, without a dot"""


def build_record(row: Row, columns: Columns, where: str) -> Record:
    """The record in a row.

    Raises: ImageRejected("record_invalid") for tags that are neither text nor a list of it, an md5 that is none, or
        text that UTF-8 cannot hold.
    """
    md5 = _text(_find(row, columns.md5), "md5").strip().lower()
    if md5 and not re.fullmatch("[0-9a-f]{32}", md5):
        raise ImageRejected("record_invalid", f"expected an md5 of 32 hex digits, found {md5[:40]!r}.")
    categorised = [
        (tag, category)
        for category, names in columns.categories.items()
        for tag in _tags(_find(row, names), columns.separator)
    ]
    # Where categories are nested (`tags.artist`), the column `tags` itself is an object, not a list of tags.
    loose = [] if categorised else _tags(_find(row, columns.tags), columns.separator)
    caption = _text(_find(row, columns.caption), "a caption")
    rating = _find(row, columns.rating)
    record = Record(
        where=where,
        text=", ".join([*filter(None, [caption]), *(tag for tag, _ in categorised), *loose]),
        categories=tuple(categorised),
        md5=md5 or None,
        rating=rating.strip().lower() or None if isinstance(rating, str) else None,
        score=_number(_find(row, columns.score)),
        year=_year(_find(row, columns.created_at)),
        height=_side(_find(row, columns.height)),
        width=_side(_find(row, columns.width)),
        file_ext=_suffix(_find(row, columns.file_ext)),
    )
    if _SURROGATE.search(record.text + (record.rating or "") + record.file_ext):
        raise ImageRejected("record_invalid", "expected text, found half of a character (a lone surrogate) in it.")
    return record


_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON may hold one: a text that was cut in the middle of an emoji"""


def row_file(row: Row, columns: Columns) -> str | None:
    """The path of its file, as the row tells it; untrusted."""
    file = _find(row, columns.file)
    return file if isinstance(file, str) and file else None


def row_keys(row: Row, columns: Columns) -> tuple[str | None, set[str]]:
    """(path of its file, stems that its file may have) as the row tells them; untrusted.

    Raises: ImageRejected("record_invalid") where nothing but an id could name the file, and that is no whole number.
    """
    file, number, md5 = row_file(row, columns), _find(row, columns.id), _find(row, columns.md5)
    stems = _stems(number) | _stems(md5)
    if file is None and not stems and isinstance(number, float | Decimal):
        raise ImageRejected(
            "record_invalid",
            f"expected an id that is a whole number or text, found {number} (or a float too short for its digits): "
            'write the ids as integers (pandas: astype("Int64")) or as text.',
        )
    return file, stems


def _stems(key: Any) -> set[str]:
    """What a file may be called after an id or md5. 123.0 is 123: one missing id makes all of a column floats."""
    if isinstance(key, float | Decimal):
        return {whole} if (whole := _whole(key)) else set()
    if not isinstance(key, str | int) or isinstance(key, bool):
        return set()
    text = str(key).strip()
    return {text, text.lower(), _WHOLE_TEXT.sub(r"\1", text)} - {""}


_WHOLE = r"^([0-9]+)\.0+$"
_WHOLE_TEXT = re.compile(_WHOLE)


def _whole(number: float | Decimal) -> str | None:
    """Its digits, if it is a whole number; of a float beyond 2^53 the last ones are lost."""
    if not math.isfinite(number) or int(number) != number or (isinstance(number, float) and abs(number) >= 2**53):
        return None
    return str(int(number))


def _find(row: Row, names: tuple[str, ...]) -> Any:
    """The value of the first of the columns that the row has, else None."""
    for name in names:
        found: Any = row.get(name)
        if found is None and "." in name:
            found = row
            for key in name.split("."):
                found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def _text(value: Any, what: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise ImageRejected("record_invalid", f"expected {what} as text, found {type(value).__name__}.")


def _tags(value: Any, separator: str) -> list[str]:
    if isinstance(value, Mapping):
        return []
    if isinstance(value, str):
        separator = separator or ("," if "," in value else " ")
        value = value.split() if separator == " " else value.split(separator)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise ImageRejected("record_invalid", "expected tags as text or a list of texts, found something else.")
    return [tag for piece in value if (tag := _spelt(piece))]


@lru_cache(maxsize=2**17)  # thirty tags a row, of a vocabulary: spelling each anew took half of the time
def _spelt(tag: str) -> str:
    return normalise_tag(tag)


def _number(value: Any) -> float | None:
    try:
        is_number = isinstance(value, int | float | str | Decimal) and not isinstance(value, bool)
        number = float(value) if is_number else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _side(value: Any) -> int:
    number = _number(value) or 0.0
    return int(number) if 0 < number < 2**31 else 0


def _suffix(value: Any) -> str:
    return value.strip().lower().removeprefix(".")[:16] if isinstance(value, str) else ""


_YEAR_FIRST = re.compile(r"(?:19|20)\d\d(?=\D|$|\d{4})")
_YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")


def _year(value: Any) -> int | None:
    """2021 of "2021-05-03T…", of "Sat May 01 12:00:00 -0500 2021", of a date, of seconds or milliseconds."""
    if isinstance(value, datetime.date):
        return value.year
    if isinstance(value, str):
        text = value.strip()
        found = _YEAR_FIRST.match(text)
        years = [found.group()] if found else _YEAR.findall(text)
        return int(years[-1]) if years else None
    seconds = _number(value)
    if seconds is None or not 0 < seconds < 4e12:
        return None
    return datetime.datetime.fromtimestamp(seconds / (1000 if seconds > 1e11 else 1), datetime.UTC).year


# --- tables -----------------------------------------------------------------------------------------------------------


def read_rows(path: Path, columns: Columns, known: Known) -> Iterator[tuple[str, Row | ImageRejected | int]]:
    """(where, row or what is wrong with it, or how many rows were passed over) of a JSONL, CSV or parquet file.

    Memory does not grow with the table. `known` tells of names whether files are called so: of a parquet file only rows
    with such an id or md5 become Python objects; the others are counted.
    Raises: ConfigError: no such file, another suffix. DataError: unreadable, or no column that could name a file.
    """
    if not path.is_file():
        raise ConfigError(f"records: expected a file, found none at {path}.")
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                for number, line in read_lines(path):
                    yield f"{path.name}:{number}", parse_object(line)
            case ".parquet":
                yield from _parquet_rows(path, columns, known)
            case ".csv":
                with path.open(encoding="utf-8-sig", newline="") as file:
                    for number, row in enumerate(read_csv(file, path), start=2):
                        yield f"{path.name}:{number}", _csv_row(row)
            case suffix:
                raise ConfigError(f"records: expected a .jsonl, .parquet or .csv file, found {suffix or path.name}.")
    except (OSError, ValueError, OverflowError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"expected a readable table at {path}, found: {str(error).splitlines()[0]}.") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank; a line is cut at `MAX_LINE`."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), ""), start=1):
            if line.strip():
                yield number, line


def parse_object(text: str) -> Row | ImageRejected:
    """The JSON object in a text, or why there is none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return ImageRejected("record_invalid", "expected a JSON object, found no JSON.")
    if not isinstance(row, dict):
        return ImageRejected("record_invalid", "expected a JSON object, found another kind of JSON.")
    return row


def _csv_row(row: Mapping[str | None, Any]) -> Row | ImageRejected:
    """The cells that are not empty."""
    if None in row:  # a comma that no quotes protect: what stands behind it would be lost
        return ImageRejected(
            "record_invalid", "expected as many cells as columns, found more: quote cells with commas."
        )
    return {key: value for key, value in row.items() if key is not None and value}


def _parquet_rows(path: Path, columns: Columns, known: Known) -> Iterator[tuple[str, Row | int]]:
    with pq.ParquetFile(path) as file:
        present = file.schema_arrow.names
        check_columns(present, path)
        needed = [name for name in present if name in _top_level(columns)]
        if not {name.partition(".")[0] for name in (*columns.file, *columns.id, *columns.md5)} & set(needed):
            raise DataError(f"expected a column that names files (file, id or md5) in {path}, found {present}.")
        first = 0
        for batch in map(_without_rounded_ids(columns), file.iter_batches(8192, columns=needed)):
            mask = _names_a_file(batch, columns, known)
            numbers = pc.indices_nonzero(mask).to_pylist()
            rows = _with_years(batch.filter(mask)).to_pylist()
            for number, row in zip(numbers, rows, strict=True):
                yield f"{path.name}:{first + number + 1}", row
            yield path.name, len(batch) - len(numbers)
            first += len(batch)


def _without_rounded_ids(columns: Columns) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    """Ids of short floats become NaN where their neighbours are the same float: they may be another picture's."""
    exact = {pa.float16(): 2**11, pa.float32(): 2**24}

    def checked(batch: pa.RecordBatch) -> pa.RecordBatch:
        for place, field in enumerate(batch.schema):
            if field.name in columns.id and field.type in exact:
                numbers = batch.column(place).cast(pa.float64())
                rounded = pc.greater_equal(pc.abs(numbers), float(exact[field.type]))
                batch = batch.set_column(place, field.name, pc.if_else(rounded, math.nan, numbers))
        return batch

    return checked


def _with_years(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Dates as their years: Python's have neither nanoseconds nor the year 10000, and refuse the whole batch."""
    for place, field in enumerate(batch.schema):
        if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
            batch = batch.set_column(place, field.name, pc.year(batch.column(place)).cast(pa.string()))
    return batch


def _top_level(columns: Columns) -> set[str]:
    keys = (columns.file, columns.id, columns.md5, columns.tags, columns.caption, columns.rating, columns.score)
    facts = (columns.created_at, columns.file_ext, columns.width, columns.height)
    names = (*keys, *facts, *columns.categories.values())
    return {part for group in names for name in group for part in (name, name.partition(".")[0])}


def _names_a_file(batch: pa.RecordBatch, columns: Columns, known: Known) -> pa.Array:
    """bool [rows]: the row may belong to a file that is there."""
    named = np.zeros(len(batch), bool)
    for name in (*columns.file, *columns.id, *columns.md5):
        if name.partition(".")[0] not in batch.schema.names:
            continue
        column = batch.column(name.partition(".")[0])
        if name in columns.file or not _is_key(column.type):  # a path, or nested: looked at row by row
            return pa.array([True] * len(batch))
        if _is_fractional(column.type):
            numbers = column.to_pylist()
            keys = [None if number is None else _whole(number) for number in numbers]
            # What is no whole number is told of, so it must get through.
            named |= [number is not None and key is None for number, key in zip(numbers, keys, strict=True)]
        else:
            keys = column.cast(pa.string()).to_pylist()
        named |= known(keys)
        if _is_text(column.type):
            named |= known([key and key.lower() for key in keys])
            if pc.any(pc.match_substring_regex(column, _WHOLE)).as_py():
                named |= known([key and _WHOLE_TEXT.sub(r"\1", key) for key in keys])
    return pa.array(named)


def _is_key(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or _is_fractional(kind) or _is_text(kind))


def _is_fractional(kind: pa.DataType) -> bool:
    return bool(pa.types.is_float32(kind) or pa.types.is_float64(kind) or pa.types.is_decimal(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
