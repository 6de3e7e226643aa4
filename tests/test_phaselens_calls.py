"""Every public callable refuses unusable arguments, which it names, and unknown keywords."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

from phaselens import data, patching, plugin, runs
from tests.public_calls import CALLS, EXEMPT, call

PACKAGES = (
    "phaselens", "phaselens.attention", "phaselens.spectrum", "phaselens.uncertainty", "phaselens.patching",
    "phaselens.plugin", "phaselens.runs", "phaselens.data", "phaselens.testing",
)  # fmt: skip

#: Arguments that accept any value: their type is known only later, from an annotation.
ANYTHING = {(plugin.param, "default")}

#: Text in a message that replaces the name of the argument.
MESSAGES = {
    (patching.logit_diff, "b"): "expected a token as a text or an id",
    (plugin.require_metric, "candidate"): "not a subclass of phaselens.plugin.Metric",
    (runs.select_metrics, "requests"): "metrics",
    (data.texts_from, "source"): "texts",
    (data.corpus_from, "source"): "texts",
}

#: Messages of Python, numpy and torch for a value that was not checked at the boundary.
RAW_ERROR = re.compile(
    r"has no attribute|is not iterable|not subscriptable|unsupported operand|missing \d|not supported between"
    r"|has no len\(\)|object of type|could not convert|cannot be interpreted|no attribute|unhashable|'\w+' object"
    r"|must be (real number|str|Tensor)|argument '|argument must be|expected str, bytes|inhomogeneous"
)


class Unusable:
    """A value that no argument accepts."""

    def __repr__(self) -> str:
        return "<unusable>"


def name_of(function: Any) -> str:
    return getattr(function, "__name__", None) or str(function.name)


def refusal(function: Any, arguments: dict[str, Any]) -> str:
    """Return the message with which `function` refuses the arguments."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call(function, arguments)
    return str(caught.value)


def test_each_public_callable_has_a_call_or_is_exempt() -> None:
    exempt = [id(public) for group in EXEMPT.values() for public in group]
    assert not set(exempt) & set(map(id, CALLS))
    covered = {*exempt, *map(id, CALLS)}
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            member = getattr(package, name)
            assert not callable(member) or id(member) in covered, f"{package.__name__}.{name}"


@pytest.mark.parametrize("function", CALLS, ids=name_of)
def test_each_argument_refuses_an_unusable_value(function: Any) -> None:
    arguments = CALLS[function]()
    parameters = inspect.signature(function).parameters.values()
    assert {
        parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD
    } <= arguments.keys()
    for name in arguments:
        if (function, name) in ANYTHING:
            continue
        message = refusal(function, arguments | {name: Unusable()})
        assert not RAW_ERROR.search(message), (name, message)
        assert MESSAGES.get((function, name), name) in message, (name, message)


@pytest.mark.parametrize("function", CALLS, ids=name_of)
def test_an_unknown_keyword_is_refused(function: Any) -> None:
    message = refusal(function, CALLS[function]() | {"no_such_keyword": 1})
    assert "no_such_keyword" in message or "takes no" in message
