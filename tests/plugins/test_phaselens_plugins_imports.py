"""Plugins, built-in ones included, import only the public modules of PhaseLens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
FILES = sorted(path for path in PLUGINS.rglob("*.py") if "tests" not in path.relative_to(PLUGINS).parts)

#: The public plugin API, and the pure functions.
PUBLIC_MODULES = {
    "phaselens.plugin",
    "phaselens.attention",
    "phaselens.spectrum",
    "phaselens.uncertainty",
}


def imported_names(source: str) -> Iterator[tuple[str, str]]:
    """Yield pairs (module, name) imported anywhere in a file, by `importlib.import_module("…")` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__"):
                yield (str(node.args[0].value), "")


def private_imports(source: str) -> list[str]:
    """Return the imports of PhaseLens in a file that are not public."""
    private = []
    for module, name in imported_names(source):
        if module.split(".")[0] != "phaselens":
            continue
        if module == "phaselens" and f"phaselens.{name}" in PUBLIC_MODULES:
            continue
        if module not in PUBLIC_MODULES or name.startswith("_"):
            private.append(f"{module}:{name}")
    return private


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_public_modules_are_imported(path: Path) -> None:
    assert private_imports(path.read_text()) == []


def test_both_packages_are_checked() -> None:
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
def test_a_private_import_is_detected(source: str) -> None:
    assert len(private_imports(source)) == 1
