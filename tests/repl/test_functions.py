"""The source of a function that a script can define: run, it computes the same; what it cannot define is None."""

from __future__ import annotations

import functools
import math
import math as mathematics
from collections.abc import Callable
from typing import Any

import pytest

from phaselens.repl.functions import source_of

FACTOR, NOTHING, LABEL = 2.5, None, "a 'quoted' text"
MISSING = float("nan")
VALUES = [1, 2]


def scaled(x: float) -> float:
    import os.path

    def inner(y: float) -> float:
        return y * FACTOR

    class Shift:
        amount = len(os.path.sep)

    return inner(x) + Shift.amount + sum(n for n in range(3)) + mathematics.floor(0.5)


def with_modules(x: float) -> tuple[float, str | None, str]:
    return math.sqrt(x), NOTHING, LABEL


def with_list(x: int) -> int:
    return VALUES[x]


def with_nan(x: float) -> float:
    return x * MISSING


def recursive(n: int) -> int:
    return n and recursive(n - 1)


@functools.cache
def cached(x: int) -> int:
    return x


def decorate(function: Callable[..., object]) -> Callable[..., object]:
    return function


@decorate
def decorated(x: int) -> int:
    return x


shifted = lambda x: x + FACTOR  # noqa: E731
first, second = (lambda x: x), (lambda x: -x)


def closure() -> Callable[[int], int]:
    n = 3
    return lambda x: x + n


def restored(function: Any) -> Any:
    """Return the function that a script with its source defines."""
    source = source_of(function)
    assert source is not None
    lines, expression = source
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return eval(expression, names)


@pytest.mark.parametrize(("function", "argument"), [(scaled, 4.0), (with_modules, 9.0), (shifted, 1.0)])
def test_a_script_defines_the_same_function(function: Any, argument: float) -> None:
    assert restored(function)(argument) == function(argument)


@pytest.mark.parametrize(
    "function",
    [len, cached, decorated, with_list, with_nan, recursive, first, closure(), eval("lambda x: x")],
    ids=["built-in", "wrapper", "decorator", "list", "nan", "itself", "two lambdas", "closure", "no source"],
)
def test_what_a_script_cannot_define_has_no_source(function: Any) -> None:
    assert source_of(function) is None


def test_reserved_names_are_not_defined_or_overwritten() -> None:
    assert source_of(scaled, {"lens"}) is not None
    for name in ("scaled", "FACTOR"):
        assert source_of(scaled, {name}) is None
