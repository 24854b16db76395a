"""A config dataclass from TOML files and command-line flags: the same keys, one parser, and a flag wins.

A file is turned into flags that stand before the user's own, so there is one parser, one set of types and one set of
messages. Nested tables are dotted flags: `[loss] gamma = 5` is `--loss.gamma 5`. To set nothing, leave the key out. A
table of free keys is one flag with pairs behind it, an array of tables one flag with a JSON object for each (`table`).
"""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sumizome.errors import ConfigError

__all__ = ["as_mapping", "parse", "read_toml", "table", "to_toml"]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def parse(command_type: type, arguments: Sequence[str], prog: str, description: str | None) -> Any:
    """The command as its dataclass: from TOML files among the arguments first, then from the flags, which win.

    Raises: ConfigError in one line for an unknown or malformed option. SystemExit(0) after printing `--help`.
    """
    import tyro

    from_files: list[str] = []
    flags: list[str] = []
    for index, argument in enumerate(arguments):
        # A TOML file stands alone: as the value of a flag it is that flag's.
        before = arguments[index - 1] if index else ""
        if argument.endswith(".toml") and (not before.startswith("--") or "=" in before):
            from_files += _flags_from_toml(Path(argument), command_type)
        else:
            flags.append(argument)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), _arrays_of_tables():
            return tyro.cli(command_type, args=_merged(from_files, flags), prog=prog, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(f"{_one_line(captured.getvalue())}; see `{prog} --help`") from None


@contextlib.contextmanager
def _arrays_of_tables() -> Iterator[None]:
    """Within, the parser takes a dataclass with `array_of_tables` (its key) as one JSON object."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        item: Any = info.type
        where = getattr(item, "array_of_tables", None)
        if where is None:
            return None

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: table(words[0], item, where),
            is_instance=lambda value: isinstance(value, item),
            str_from_instance=lambda value: [json.dumps(as_mapping(value))],
        )

    with registry:
        yield


def _merged(from_files: list[str], flags: list[str]) -> list[str]:
    """File flags, then the user's: the last one wins. Positionals lead, the user's instead of the files'."""
    mine, file = _leading_positionals(flags), _leading_positionals(from_files)
    return (flags[:mine] or from_files[:file]) + from_files[file:] + flags[mine:]


def _leading_positionals(arguments: list[str]) -> int:
    return next((index for index, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))


def _one_line(box: str) -> str:
    """The message of the parser's boxed, many-line error; its help texts and borders left out."""
    kept: list[str] = []
    for raw in box.splitlines():
        line = raw.strip().strip("│╭╮╰╯").strip()
        if line.startswith(("For full helptext", "Argument helptext")):
            break
        if line and not set(line) <= set("─ ") and not raw.startswith("╭"):
            kept.append(line)
    return " ".join(kept) or "the options could not be read"


def read_toml(path: Path, config_type: type) -> Any:
    """The config that a TOML file alone describes.

    Raises: ConfigError as `parse` does.
    """
    return parse(config_type, [str(path)], prog=str(path), description=None)


def _flags_from_toml(path: Path, config_type: type) -> list[str]:
    """The command-line flags that say what the TOML file says.

    Raises: ConfigError for a file that cannot be read, or a key that `config_type` does not have; it names the nearest.
    """
    try:
        mapping = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    flags = list(_flags(mapping, config_type, prefix="", path=path))
    positional = [name for name in _positionals(config_type) if name in mapping]
    values = [str(item) for name in positional for item in _as_list(mapping[name])]
    return values + flags


def _positionals(config_type: type) -> list[str]:
    """The fields that the command line takes without a flag: those marked with the parser's `Positional`."""
    import tyro

    hints = typing.get_type_hints(config_type, include_extras=True)
    return [name for name, hint in hints.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ())]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _flags(mapping: Mapping[str, Any], config_type: type, prefix: str, path: Path) -> Iterator[str]:
    types = typing.get_type_hints(config_type)
    known = [field.name for field in dataclasses.fields(config_type) if field.init]
    positional = _positionals(config_type)
    for key, value in mapping.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{prefix}{key}'{_nearest(key, prefix, known)}")
        if key in positional:
            continue
        flag = "--" + (prefix + key).replace("_", "-")
        if isinstance(value, Mapping) and typing.get_origin(types[key]) is dict:
            yield flag
            yield from (str(part) for pair in value.items() for part in pair)
        elif isinstance(value, Mapping):
            if not dataclasses.is_dataclass(types[key]):
                raise ConfigError(f"{path}: '{prefix}{key}' is a table, but it takes a single value")
            yield from _flags(value, typing.cast(type, types[key]), f"{prefix}{key}.", path)
        elif dataclasses.is_dataclass(types[key]):
            raise ConfigError(f"{path}: '{prefix}{key}' takes a table ([{prefix}{key}]), found {value!r}")
        elif isinstance(value, bool):
            yield flag if value else _negated(flag)
        elif isinstance(value, list):
            yield flag
            yield from (json.dumps(item) if isinstance(item, Mapping) else str(item) for item in value)
        else:
            yield f"{flag}={value}"


def _negated(flag: str) -> str:
    """`--loss.fast` → `--loss.no-fast`, the parser's form of a switch that is off."""
    *tables, name = flag.removeprefix("--").split(".")
    return "--" + ".".join([*tables, f"no-{name}"])


def _nearest(key: str, prefix: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{close[0]}'?" if close else f"; known keys: {', '.join(known)}"


def as_mapping(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values (paths as strings, tuples as lists), as JSON and TOML can hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_mapping(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


T = TypeVar("T")


def table(text: str, table_type: type[T], where: str) -> T:
    """A frozen dataclass of plain fields from a JSON object: one table of an array of them, such as `[[stage]]`.

    Raises: ConfigError naming a key that it does not have and the nearest, or a value of another type.
    """
    try:
        mapping = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} takes a JSON object, found {text!r} ({error})") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where} takes a JSON object, found {text!r}")
    hints = typing.get_type_hints(table_type)
    types = {field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, table_type))}
    for key, value in mapping.items():
        if key not in types:
            raise ConfigError(f"unknown key '{where}.{key}'{_nearest(key, where + '.', list(types))}")
        wanted = types[key]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            mapping[key] = float(value)
        elif wanted in (int, float, str) and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise ConfigError(f"{where}.{key} takes {wanted.__name__}, found {value!r}")
    return table_type(**mapping)


def to_toml(config: Any) -> str:
    """The config as a TOML document that `flags_from_toml` reads back to the same config."""
    return "\n".join(_toml_lines(as_mapping(config), prefix="")).strip() + "\n"


def _toml_lines(mapping: Mapping[str, Any], prefix: str) -> Iterator[str]:
    tables = {key: value for key, value in mapping.items() if isinstance(value, Mapping)}
    arrays = {key: value for key, value in mapping.items() if _is_array_of_tables(value)}
    for key, value in mapping.items():
        if key not in tables and key not in arrays and value is not None:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, nested in tables.items():
        if nested:
            yield f"\n[{prefix}{_toml_key(key)}]"
            yield from _toml_lines(nested, f"{prefix}{_toml_key(key)}.")
    for key, array in arrays.items():
        for nested in array:
            yield f"\n[[{prefix}{_toml_key(key)}]]"
            yield from _toml_lines(nested, f"{prefix}{_toml_key(key)}.")


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)  # TOML spells inf and nan as Python does
    # JSON's strings, numbers and booleans are TOML's too, but for one control character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
