"""What the documentation names exists: files behind links, functions of the paper map, commands and their flags."""

import dataclasses
import importlib
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from sumizome.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_paper_map_names_what_there_is() -> None:
    text = (ROOT / "docs/paper_map.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+/[\w]+\.py): ([\w, .]+)`", text)
    assert len(named) > 10
    for path, names in named:
        source = (ROOT / "sumizome" / path).read_text(encoding="utf-8")
        for name in names.split(","):
            assert re.search(rf"\b{name.strip().split('.')[-1]}\b", source), f"{path}: {name}"
    tests = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert not [test for test in tests if not (ROOT / test).exists()]


def flags_of(settings: type, prefix: str = "") -> Iterator[str]:
    """The flags that a command's dataclass has, nested ones with a dot, underscores for hyphens."""
    hints, annotated = typing.get_type_hints(settings), typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        kind = hints[field.name]
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        yield prefix + field.name
        for extra in getattr(annotated[field.name], "__metadata__", ()):
            yield from (alias.lstrip("-") for alias in getattr(extra, "aliases", None) or ())
        yield f"{prefix}no_{field.name}"
        for option in options:
            if dataclasses.is_dataclass(option):
                assert isinstance(option, type)
                yield from flags_of(option, f"{prefix}{field.name}.")


def commands_in(page: Path) -> Iterator[list[str]]:
    """The words of each `sumizome …` line in the page's fenced blocks and inline code, continued lines joined."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(sumizome [^`\n]+)`", text)
    for line in lines:
        line = re.sub(r"^(\$ |[A-Z_]+=\S+ |torchrun .*?-m (?=sumizome))+", "", line.strip())
        if line.startswith("sumizome "):
            try:
                yield shlex.split(line, comments=True)[1:]
            except ValueError:  # an apostrophe in prose
                continue


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_flags_exist(page: Path) -> None:
    for words in commands_in(page):
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
        if name is None:
            group = any(known.startswith(f"{words[0]} ") for known in COMMANDS)
            assert group or words[0] == "COMMAND" or not words[0].isalpha(), words
            continue
        module = importlib.import_module(f"sumizome.cli.{name.replace(' ', '_')}")
        known = set(flags_of(module.Command)) | {"help"}
        used = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--") and len(word) > 2]
        assert not [flag for flag in used if flag not in known], (name, words)


def unknown_keys(table: dict[str, object], known: set[str], prefix: str = "") -> Iterator[str]:
    """The keys of a settings file that a command with the flags `known` does not have, nested ones with a dot."""
    for key, value in table.items():
        name = prefix + key
        if name not in known:
            yield name
        elif isinstance(value, dict) and any(flag.startswith(f"{name}.") for flag in known):
            yield from unknown_keys(value, known, f"{name}.")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_settings_files_fit_a_command(page: Path) -> None:
    blocks = re.findall(r"^```toml[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    flags = [
        set(flags_of(importlib.import_module(f"sumizome.cli.{name.replace(' ', '_')}").Command)) for name in COMMANDS
    ]
    for block in blocks:
        settings = tomllib.loads(block)
        if "source" not in settings:  # a list of folders for `ingest` is no settings file
            unknown = [list(unknown_keys(settings, known)) for known in flags]
            assert [] in unknown, (min(unknown, key=len), block)
