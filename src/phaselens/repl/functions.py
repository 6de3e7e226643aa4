"""A function that was typed into a session, as source that a script can hold."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Collection
from types import FunctionType, ModuleType
from typing import Any


def source_of(function: Callable[..., Any], reserved: Collection[str] = ()) -> tuple[list[str], str] | None:
    """Lines that define `function`, and the expression for it afterwards; None where a script cannot have it.

    It can have a `def` or a lambda that uses its arguments, modules, and numbers or texts of the session; it cannot
    have one that closes over something else, is decorated, or takes one of the names `reserved`.

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
    """The one definition at the place where the function was compiled, and its text."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError):
        return None, None
    kind = ast.Lambda if function.__name__ == "<lambda>" else ast.FunctionDef
    definitions = [node for node in ast.walk(tree) if isinstance(node, kind)]
    if kind is ast.FunctionDef:
        definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if len(definitions) != 1 or getattr(definitions[0], "decorator_list", None):
        return None, None
    return definitions[0], ast.get_source_segment(text, definitions[0])


def _free_names(node: ast.AST) -> set[str]:
    """Names that a definition reads and does not bind itself."""
    loaded: set[str] = set()
    bound: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            (loaded if isinstance(part.ctx, ast.Load) else bound).add(part.id)
        elif isinstance(part, ast.arg):
            bound.add(part.arg)
        elif isinstance(part, ast.alias):
            bound.add((part.asname or part.name).split(".")[0])
        elif isinstance(part, ast.FunctionDef | ast.ClassDef) and part is not node:
            bound.add(part.name)
    return loaded - bound
