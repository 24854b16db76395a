"""Hugging Face's metadata files: metadata.jsonl, .csv or .parquet, each row for a picture below the file's own folder.

Owns their conventions: `file_name`, relative to the folder that the file is in, and text, caption, tags or any column
of a dump. Invariant: a file name is compared with the pictures that were listed; it is never opened.
"""

import posixpath
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sumizome.data.image_rejected import ImageRejected
from sumizome.data.matching import Matches
from sumizome.data.picture_list import NameIndex, PictureList, path_names
from sumizome.data.records import Record, Row, build_record, read_rows, row_file
from sumizome.data.source_config import Columns
from sumizome.errors import ConfigError, DataError

__all__ = ["match_metadata"]


def match_metadata(
    matches: Matches, pictures: PictureList, root: Path, metadata: Sequence[str], columns: Columns, *, texts: bool
) -> None:
    """The rows of each metadata file; `matches.rejects` names the lines that cannot be used, by `metadata_*`.

    With `texts` a line without text, caption or tags is one of these.
    """
    if not metadata:
        return
    paths = NameIndex(pictures, path_names)
    for name in sorted(metadata):
        try:
            rows = read_rows(root / name, columns, _all)
            while batch := list(islice(rows, 1024)):
                _match_lines(matches, paths, posixpath.dirname(name), batch, columns, texts)
        except (ConfigError, DataError) as error:
            matches.reject(name, "metadata_invalid", f"expected a readable table: {error}")


def _all(names: Sequence[str | None]) -> NDArray[np.bool_]:
    return np.ones(len(names), bool)


def _match_lines(
    matches: Matches,
    paths: NameIndex,
    folder: str,
    batch: Sequence[tuple[str, Row | ImageRejected | int]],
    columns: Columns,
    texts: bool,
) -> None:
    named = []
    for where, row in batch:
        if isinstance(row, int):
            continue
        line = posixpath.join(folder, where)
        try:
            file, record = _read_line(row, columns, line, texts)
        except ImageRejected as error:
            matches.reject(line, "metadata_invalid", str(error))
            continue
        path = posixpath.normpath(posixpath.join(folder, file))
        if path.startswith(("/", "../")):
            matches.reject(line, "metadata_outside", f"expected a file_name in its folder, found {file[:200]!r}.")
        else:
            named.append((line, path, file, record))
    for (line, path, file, record), found in zip(named, paths.find([path for _, path, *_ in named]), strict=True):
        if not found:
            matches.reject(line, "metadata_without_image", f"expected a picture at {file[:200]!r}, found none.")
        elif matches.place[found[0]] >= 0 or found[0] in matches.failed:
            sentence = f"expected one line for {path}, found a second: the first is used."
            matches.reject(line, "metadata_twice", sentence)
        else:
            matches.add_outcome(found[0], record)


def _read_line(row: Row | ImageRejected, columns: Columns, line: str, texts: bool) -> tuple[str, Record]:
    """(file_name, record) of a row.

    Raises: ImageRejected.
    """
    if isinstance(row, ImageRejected):
        raise row
    file = row_file(row, columns)
    if file is None or (texts and not _says_something(row, columns)):
        expected = "file_name and text, caption or tags" if texts else "file_name"
        raise ImageRejected("metadata_invalid", f"expected {expected}, found another line.")
    return file, build_record(row, columns, line)


def _says_something(row: Row, columns: Columns) -> bool:
    groups = (columns.caption, columns.tags, *columns.categories.values())
    names = {part for group in groups for name in group for part in (name, name.partition(".")[0])}
    return any(row.get(name) is not None for name in names)
