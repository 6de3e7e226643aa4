"""Source of a function that was typed into a session, for a script."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Collection
from types import FunctionType, ModuleType


def source_of(
    function: Callable[..., object], reserved: Collection[str] = ()
) -> tuple[list[str], str] | None:
    """Return lines that define `function`, and the expression for it afterwards; None if a script cannot define it.

    A script can define a `def` or a lambda that uses its arguments, modules, and numbers or texts of the session. It
    cannot define a function that uses other values, has a closure or a decorator, or has one of the `reserved` names.

    >>> source_of(len) is None
    True
    """
    if not isinstance(function, FunctionType) or function.__closure__:
        return None
    node, text = _definition(function)
    if node is None or text is None:
        return None
    lines = []
    for name in sorted(_free_names(node) - set(dir(builtins))):
        if name == function.__name__ or name not in function.__globals__ or name in reserved:
            return None
        value = function.__globals__[name]
        if isinstance(value, ModuleType):
            renamed = "" if name == value.__name__ else f" as {name}"
            lines.append(f"import {value.__name__}{renamed}")
        elif (
            value is None
            or isinstance(value, bool | int | str)
            or (isinstance(value, float) and value == value)
        ):
            lines.append(f"{name} = {value!r}")
        else:
            return None
    if isinstance(node, ast.Lambda):
        return lines, text
    if node.name in reserved:
        return None
    return [*lines, text], node.name


def _definition(function: FunctionType) -> tuple[ast.FunctionDef | ast.Lambda | None, str | None]:
    """Return the only definition in the source that the function was compiled from, and its text."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError):
        return None, None
    definitions: list[ast.FunctionDef | ast.Lambda]
    if function.__name__ == "<lambda>":
        definitions = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    else:
        definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if len(definitions) != 1 or getattr(definitions[0], "decorator_list", None):
        return None, None
    return definitions[0], ast.get_source_segment(text, definitions[0])


def _free_names(node: ast.AST) -> set[str]:
    """Return the names that a definition reads and does not bind."""
    loaded: set[str] = set()
    bound: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            (loaded if isinstance(child.ctx, ast.Load) else bound).add(child.id)
        elif isinstance(child, ast.arg):
            bound.add(child.arg)
        elif isinstance(child, ast.alias):
            bound.add((child.asname or child.name).split(".")[0])
        elif isinstance(child, ast.FunctionDef | ast.ClassDef) and child is not node:
            bound.add(child.name)
    return loaded - bound
