"""`sources.toml`: several sources, each with its records, columns and rules, as a list of `SourceConfig`.

Owns the reading of that file into the dataclasses that describe a source; their fields are its keys. Invariant: a key
or a type that a source does not have is an error that names its place and the nearest key.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sumizome.data.source_config import SourceConfig
from sumizome.errors import ConfigError

__all__ = ["load_sources"]


def load_sources(path: Path) -> list[SourceConfig]:
    """The `[[source]]` tables of a file, in their order. Paths are as on the command line: relative to where it runs.

    Raises: ConfigError.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    tables = content.pop("source", None)
    if content:
        raise ConfigError(f"{path}: unknown key '{next(iter(content))}'; expected [[source]] tables only")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: expected one [[source]] table or more, found none")
    return [_build(SourceConfig, table, f"{path}: source {number}") for number, table in enumerate(tables, start=1)]


def _build(kind: type, table: Mapping[str, Any], where: str) -> Any:
    """The dataclass `kind` with what a table sets."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            known = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key '{key}'; {known}")
    for name, each in fields.items():
        unset = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if unset and name not in table:
            raise ConfigError(f"{where}: expected the key '{name}', found none")
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in table.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None: TOML cannot say None, a key is left out
        return _value(arguments[0], value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(typing.cast(type, kind), value, where)
    if origin is tuple:
        return tuple(_value(arguments[0], item, where) for item in (value if isinstance(value, list) else [value]))
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where}: expected {', '.join(map(repr, arguments))}, found {value!r}")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (str, int) and type(value) is kind:
        return value
    raise ConfigError(f"{where}: expected {_in_words(kind)}, found {value!r}")


def _in_words(kind: Any) -> str:
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Mapping:
        return "a table"
    return {str: "text", int: "a whole number", Path: "a path as text"}.get(kind, str(kind))
