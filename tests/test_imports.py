"""Every name that is imported from this package is there, in functions too, where neither import nor mypy may look."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(file: Path) -> set[tuple[str, str]]:
    """(module, name) of each `from sumizome… import name`."""
    found = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, node.names) for node in found if node.module and node.module.split(".")[0] == "sumizome"]
    return {(module, alias.name) for module, names in ours for alias in names}


@pytest.mark.parametrize("folder", ["sumizome", "benchmarks", "studies", "demo", "tests"])
def test_every_name_that_is_imported_is_there(folder: str) -> None:
    wanted = {pair: file for file in sorted((ROOT / folder).rglob("*.py")) for pair in imported(file)}
    assert wanted
    for (module, name), file in wanted.items():
        there = hasattr(importlib.import_module(module), name)
        assert there or importlib.util.find_spec(f"{module}.{name}"), f"{file}: {module} has no {name}"
