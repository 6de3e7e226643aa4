"""Plugins, PhaseLens' own among them, use the public modules and no private door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
FILES = sorted(path for path in PLUGINS.rglob("*.py") if "tests" not in path.relative_to(PLUGINS).parts)

#: The public plugin API, and the pure functions, which anybody may call.
PUBLIC = {
    "phaselens.plugin",
    "phaselens.attention",
    "phaselens.spectrum",
    "phaselens.uncertainty",
}


def imported(source: str) -> Iterator[tuple[str, str]]:
    """Each (module, name) that a file imports, wherever in it, `importlib.import_module` with a text included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield (str(node.args[0].value), "")


def private_doors(source: str) -> list[str]:
    """What of PhaseLens a file imports, and is not public."""
    doors = []
    for module, name in imported(source):
        if module.split(".")[0] != "phaselens":
            continue
        if module == "phaselens" and f"phaselens.{name}" in PUBLIC:
            continue
        if module not in PUBLIC or name.startswith("_"):
            doors.append(f"{module}:{name}")
    return doors


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_public_modules_are_imported(path: Path) -> None:
    assert private_doors(path.read_text()) == []


def test_both_packages_are_looked_at() -> None:
    assert {path.parent.name for path in FILES} == {"phaselens_plugins", "phaselens-example"}


@pytest.mark.parametrize(
    "source",
    [
        "from phaselens.runs import Run",
        "import phaselens",
        "from phaselens import run",
        "def f():\n    from phaselens.plugin.manager import Plugins",
        "from phaselens.plugin import _hidden",
        "import importlib\nimportlib.import_module('phaselens.lens')",
    ],
)
def test_a_private_door_would_be_seen(source: str) -> None:
    assert len(private_doors(source)) == 1
