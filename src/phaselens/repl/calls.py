"""Calls that do not fit a verb, explained in one line instead of Python's TypeError."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any, ParamSpec, TypeVar

from phaselens.errors import InputError, close_matches
from phaselens.patching.points import brief

#: Verbs by what they are for, as `guide()` lists them.
VERBS: dict[str, tuple[str, ...]] = {
    "judge": ("logit_diff", "metric"),
    "edit": ("patch", "ablate", "condition", "nope", "rope", "undo", "patched"),
    "look": ("run", "sweep", "attribution"),
    "help": ("guide",),
}
VERB_NAMES = tuple(verb for group in VERBS.values() for verb in group)

# What people write for an argument whose name is not similar to it.
_SYNONYMS = {
    "to": "value",
    "with_": "value",
    "val": "value",
    "token": "pos",
    "at": "pos",
    "index": "pos",
    "kind": "what",
    "kinds": "what",
    "type": "what",
    "component": "what",
    "name": "point",
    "hook": "point",
    "hook_name": "point",
    "axis": "by",
    "axes": "by",
    "over": "by",
    "path": "file",
    "figure": "file",
    "save": "file",
    "k": "top",
    "n": "top",
    "condition": "which",
    "prepend_bos": "bos",
}
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)

P = ParamSpec("P")
R = TypeVar("R")


def in_words(verb: Callable[P, R]) -> Callable[P, R]:
    """A method that refuses calls which do not fit its signature with an InputError that says how to write them.

    Only the binding of arguments is checked; a TypeError raised inside the method stays one.

    >>> class Session:
    ...     @in_words
    ...     def undo(self):
    ...         ...
    >>> Session().undo(2)
    Traceback (most recent call last):
        ...
    phaselens.errors.InputError: undo takes no arguments; write undo()
    """
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            raise InputError(_misuse(verb, signature, args[1:], kwargs)) from None
        return verb(*args, **kwargs)

    return call


def is_another_verb(name: str, arguments: Sequence[Any] = ()) -> str:
    """What to say where a verb's name was given as a value."""
    return f"{name} is a verb of its own; write {name}({', '.join(map(brief, arguments)) or '…'})"


def _misuse(
    verb: Callable[..., Any], signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    """The first thing that is wrong with a call, in words."""
    name = verb.__name__
    parameters = list(signature.parameters.values())[1:]  # without self
    if not parameters:
        return f"{name} takes no arguments; write {name}()"
    named = [
        parameter.name for parameter in parameters if parameter.kind in (*_POSITIONAL, Parameter.KEYWORD_ONLY)
    ]
    positional = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL]
    kinds = {parameter.kind for parameter in parameters}
    example = f"for example {_example(verb)}"
    if args and isinstance(args[0], str) and args[0] in VERB_NAMES:
        return is_another_verb(args[0], args[1:])
    unknown = [] if Parameter.VAR_KEYWORD in kinds else [key for key in kwargs if key not in named]
    if unknown:
        key = unknown[0]
        return f"{name} has no argument {key!r}; {_meant(key, kwargs[key], named)} {example[0].upper()}{example[1:]}"
    if len(args) > len(positional) and Parameter.VAR_POSITIONAL not in kinds:
        others = [key for key in named if key not in positional]
        by_name = f", and by name {', '.join(others)}" if others else ""
        return f"{name} takes ({', '.join(positional)}){by_name}, got {len(args)} values without a name; {example}"
    for key in positional[: len(args)]:
        if key in kwargs:
            values = f"as {brief(args[positional.index(key)])} and as {brief(kwargs[key])}"
            return f"{name}: {key} is given twice, {values}"
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is Parameter.empty
        and parameter.kind in (*_POSITIONAL, Parameter.KEYWORD_ONLY)
        and parameter.name not in (*positional[: len(args)], *kwargs)
    ]
    return f"{name} needs {' and '.join(missing)}; {example}"


def _meant(key: str, value: Any, named: Sequence[str]) -> str:
    """What a wrong keyword was probably meant to be."""
    synonym = _SYNONYMS.get(key)
    # Plurals and abbreviations are as close as typing errors.
    similar = [name for name in named if name.startswith(key) or key.startswith(name)]
    candidates = [synonym] if synonym in named else similar
    if len(candidates) == 1:
        if key == "prepend_bos":
            value = "always" if value else "never"
        return f"did you mean {candidates[0]}={brief(value)}?"
    hint = close_matches(key, named)
    return hint if hint.endswith("?") else f"{hint}."


def _example(verb: Callable[..., Any]) -> str:
    """The first call of the verb in its docstring that has arguments, or its name."""
    calls = re.findall(rf"(?:m\.)?\b{verb.__name__}\((?:[^()]|\([^()]*\))+\)", inspect.getdoc(verb) or "")
    return calls[0] if calls else f"{verb.__name__}()"
