"""Numbers as text, alone and with their nouns, and calls as Python source, for messages and scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real


def count_phrase(number: int, noun: str) -> str:
    """Return a count with its noun.

    >>> count_phrase(1, "token"), count_phrase(6, "token")
    ('1 token', '6 tokens')
    """
    return f"{number} {noun if number == 1 else noun + 's'}"


MISSING = "–"


def number_text(value: float | None, *, digits: int = 4, signed: bool = False) -> str:
    """Format a number of a result with `digits` decimals, and its sign if `signed`; `–` for a missing one.

    >>> number_text(0.25), number_text(0.25, digits=3, signed=True), number_text(None)
    ('0.2500', '+0.250', '–')
    """
    return MISSING if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def range_phrase(numbers: Sequence[int]) -> str:
    """Format numbers as a range where they are consecutive, else as a list.

    >>> range_phrase([0, 1, 2]), range_phrase([4]), range_phrase([1, 4])
    ('0–2', '4', '1, 4')
    """
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, numbers))


def number_phrase(noun: str, numbers: Sequence[int]) -> str:
    """Return a noun followed by its numbers.

    >>> number_phrase("layer", [5]), number_phrase("layer", [0, 1, 2])
    ('layer 5', 'layers 0–2')
    """
    return f"{noun if len(numbers) == 1 else noun + 's'} {range_phrase(numbers)}"


def call_source(function: str, /, *positional: object, **arguments: object) -> str:
    """Return a call as Python source.

    >>> call_source("patch", "blocks.1.hook_z", pos=(3, -1), head=0)
    "patch('blocks.1.hook_z', pos=[3, -1], head=0)"
    """
    arguments_source = [_source(value) for value in positional]
    arguments_source += [f"{name}={_source(value)}" for name, value in arguments.items()]
    return f"{function}({', '.join(arguments_source)})"


def non_default(**arguments: object) -> dict[str, object]:
    """Return the arguments of an edit or a sweep that differ from their defaults."""
    defaults = {"pos": "all", "value": "zero"}
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and not (isinstance(value, str) and value == defaults.get(name))
    }


def _source(value: object) -> str:
    """Return a value as source: numbers of any library as Python numbers, any iterable as a list."""
    if value is None or isinstance(value, bool | str | range):
        return repr(value)
    if isinstance(value, Integral):
        return repr(int(value))
    if isinstance(value, Real):
        return repr(float(value)) if math.isfinite(value) else f"float('{float(value)}')"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_source(key)}: {_source(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, Iterable):
        return f"[{', '.join(map(_source, value))}]"
    return repr(value)
