"""Names of the verbs, and one-line explanations of calls that do not fit a verb's signature."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import ParamSpec, TypeVar

from phaselens.errors import InputError, close_matches, short_form

#: Verbs by purpose, as `guide()` lists them.
VERBS: dict[str, tuple[str, ...]] = {
    "measure": ("logit_diff", "metric"),
    "edit": ("patch", "ablate", "condition", "null_rope", "restore_rope", "undo", "patched"),
    "look": ("run", "sweep", "attribution", "logit_lens", "direct_logit_attribution"),
    "help": ("guide",),
}
#: Former names of verbs, which still work.
FORMER_NAMES = ("nope",)
VERB_NAMES = (*(verb for group in VERBS.values() for verb in group), *FORMER_NAMES)

# Common names for an argument that are not similar to its real name.
_SYNONYMS = {
    "to": "value",
    "with_": "value",
    "val": "value",
    "token": "pos",
    "at": "pos",
    "index": "pos",
    "keys": "key",
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


def explain_misuse(verb: Callable[P, R]) -> Callable[P, R]:
    """Decorate a method: a call that does not fit its signature raises an InputError that says how to write it.

    Only the binding of arguments is checked; a TypeError inside the method stays a TypeError.

    >>> class Session:
    ...     @explain_misuse
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
            raise InputError(_misuse_message(verb, signature, args[1:], kwargs)) from None
        return verb(*args, **kwargs)

    return call


def verb_as_argument(name: str, arguments: Sequence[object] = ()) -> str:
    """Return the message for a call that has a verb's name as its first argument."""
    return f"{name} is a command; write {name}({', '.join(map(short_form, arguments)) or '…'})"


def _misuse_message(
    verb: Callable[..., object], signature: Signature, args: Sequence[object], kwargs: Mapping[str, object]
) -> str:
    """Return the first error of a call, in words."""
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
        return verb_as_argument(args[0], args[1:])
    unknown = [] if Parameter.VAR_KEYWORD in kinds else [key for key in kwargs if key not in named]
    if unknown:
        key = unknown[0]
        suggestion = _suggest_argument(key, kwargs[key], named)
        return f"{name} has no argument {key!r}; {suggestion} {example[0].upper()}{example[1:]}"
    if len(args) > len(positional) and Parameter.VAR_POSITIONAL not in kinds:
        keyword_only = [key for key in named if key not in positional]
        by_name = f", and by name {', '.join(keyword_only)}" if keyword_only else ""
        return f"{name} takes ({', '.join(positional)}){by_name}, received {len(args)} positional arguments; {example}"
    for key in positional[: len(args)]:
        if key in kwargs:
            values = f"as {short_form(args[positional.index(key)])} and as {short_form(kwargs[key])}"
            return f"{name}: {key} is given twice, {values}"
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is Parameter.empty
        and parameter.kind in (*_POSITIONAL, Parameter.KEYWORD_ONLY)
        and parameter.name not in (*positional[: len(args)], *kwargs)
    ]
    return f"{name} needs {' and '.join(missing)}; {example}"


def _suggest_argument(key: str, value: object, named: Sequence[str]) -> str:
    """Suggest the argument that a wrong keyword probably means, or list all arguments."""
    synonym = _SYNONYMS.get(key)
    # Plurals and abbreviations count as similar, like typing errors.
    similar = [name for name in named if name.startswith(key) or key.startswith(name)]
    candidates = [synonym] if synonym in named else similar
    if len(candidates) == 1:
        if key == "prepend_bos":
            value = "always" if value else "never"
        return f"did you mean {candidates[0]}={short_form(value)}?"
    return close_matches(key, named, full_stop=True)


def _example(verb: Callable[..., object]) -> str:
    """Return the first call with arguments in the verb's docstring; without one, a bare call."""
    calls = re.findall(rf"(?:m\.)?\b{verb.__name__}\((?:[^()]|\([^()]*\))+\)", inspect.getdoc(verb) or "")
    return calls[0] if calls else f"{verb.__name__}()"
