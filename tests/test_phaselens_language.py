"""Names say what they hold, a class name means one thing, and packages have no import circles."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "plugins", "tools", "tests")
#: Words that hide the noun that a variable or argument stands for.
FILLERS = {
    "alone", "another", "anything", "apart", "asked", "both", "each", "either", "every", "everything",
    "few", "found", "given", "here", "its", "kept", "known", "made", "many", "meant", "met", "mine", "much",
    "neither", "nobody", "none", "nothing", "one", "ones", "other", "others", "ours", "own", "place",
    "places", "ran", "rest", "said", "seen", "shown", "some", "somebody", "something", "stuff", "such",
    "taken", "that", "theirs", "them", "there", "these", "they", "thing", "things", "this", "those",
    "together", "told", "tried", "wanted", "whatever", "which", "who", "whole", "whose", "within", "wrong",
    "yours",
}  # fmt: skip
#: First words of a docstring that refer to something the reader of a tooltip does not see.
OPENINGS = (
    "The same", "That of", "Those", "Of the", "Of a", "Also", "It", "Its", "They", "Both", "Else", "Handed",
)  # fmt: skip


@cache
def trees() -> dict[Path, ast.Module]:
    """The syntax tree of every Python file of the project."""
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def assigned_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield every assigned name, attribute and argument, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


@pytest.mark.slow
def test_fewer_than_one_name_in_two_hundred_is_a_filler() -> None:
    names = [(name, path, line) for path, tree in trees().items() for name, line in assigned_names(tree)]
    fillers = [f"{path}:{line} {name}" for name, path, line in names if name.strip("_") in FILLERS]
    assert len(names) > 20_000
    assert len(fillers) < len(names) / 200, fillers


@pytest.mark.slow
def test_no_two_classes_share_a_name() -> None:
    lines_by_class: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                lines_by_class[node.name].append(f"{path}:{node.lineno}")
    assert {name: lines for name, lines in lines_by_class.items() if len(lines) > 1} == {}


@pytest.mark.slow
def test_docstrings_open_with_a_word_that_stands_alone() -> None:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = {
        f"{path}: {text.splitlines()[0]}"
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, documented) and (text := ast.get_docstring(node))
    }
    assert len(texts) > 2_000
    assert [
        text
        for text in sorted(texts)
        if any(text.split(": ", 1)[1].startswith(f"{word} ") for word in OPENINGS)
    ] == []


def modules() -> dict[str, Path]:
    """The path of each module of the packages, by dotted name."""
    paths = {}
    for path in trees():
        if path.parts[0] == "src" or path.parts[:2] == ("plugins", "phaselens_plugins"):
            name = ".".join(path.parts[1:]).removesuffix(".py").removesuffix(".__init__")
            paths[name] = path
    return paths


def run_time_imports(tree: ast.AST, module_paths: dict[str, Path]) -> Iterator[str]:
    """Yield the project's modules that a module imports, inside functions too, but not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in module_paths else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        yield from run_time_imports(node, module_paths)


@pytest.mark.slow
def test_no_module_imports_itself_by_way_of_others() -> None:
    module_paths = modules()
    graph = {
        name: {target for target in run_time_imports(trees()[path], module_paths) if target in module_paths}
        - {name}
        for name, path in module_paths.items()
    }
    assert sum(map(len, graph.values())) > 500
    importers = Counter(target for targets in graph.values() for target in targets)
    waiting = {name: importers[name] for name in graph}
    free = [name for name, n_importers in waiting.items() if n_importers == 0]
    while free:  # Kahn's algorithm: what is never free is on a circle, or imported by one
        name = free.pop()
        del waiting[name]
        for target in graph[name]:
            waiting[target] -= 1
            if waiting[target] == 0:
                free.append(target)
    assert sorted(waiting) == []
