"""What the author of a metric got wrong, in words, and where in the author's file."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any


def mistake(message: str, where: str | None = None, kind: type[Exception] = TypeError) -> Exception:
    """An error about something that a plugin's author must change: what was given, and what is expected.

    `where` is `file:line` in the author's file, kept as an attribute, if the traceback alone would not lead there.
    """
    error = kind(message)
    vars(error)["where"] = where
    return error


class UnknownName(KeyError):  # noqa: N818 - it is told by its message
    """A name that a mapping does not hold, with a message in words."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownPoint(UnknownName):
    """A hook point that `update` reads and `hooks()` does not ask for."""

    def __init__(self, name: str, layer: int | None, asked: list[str]) -> None:
        place = "outside of the layers" if layer is None else f"in layer {layer}"
        prefix = f"blocks.{layer}."
        if layer is not None and name.removeprefix(prefix) in asked:
            advice = (
                f"write {name.removeprefix(prefix)!r}: a layer's points go by their names inside the layer"
            )
        else:
            whole = name if layer is None or name.startswith("blocks.") else f"blocks.{{layer}}.{name}"
            advice = f"add {whole!r} to hooks()"
        held = ", ".join(asked) or "nothing"
        super().__init__(f"update reads {name!r} {place}, where hooks() asks for {held}; {advice}")


def kind_of(value: Any) -> str:
    """A value for messages: its type, and itself where it is short.

    >>> kind_of(0), kind_of(None), kind_of([1, 2])
    ('the int 0', 'None', 'the list [1, 2]')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__module__.split('.')[0]} {type(value).__name__} of shape {list(shape)}"
    shown = repr(value)
    name = type(value).__name__
    return f"the {name} {shown}" if len(shown) <= 60 and not shown.startswith("<") else f"a {name}"


def source_of(thing: Any) -> str | None:
    """`file:line` where a function or class is defined; None where Python does not know."""
    code = getattr(inspect.unwrap(thing), "__code__", None) if callable(thing) else None
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return None


def raised_at(error: BaseException, author: type) -> str | None:
    """`file:line` of the innermost call in the files of class `author`; None where the error arose elsewhere."""
    files = set(_files_of(author))
    return innermost_line(error, lambda frame: frame.f_code.co_filename in files)


def innermost_line(error: BaseException, accepted: Callable[[FrameType], bool]) -> str | None:
    """`file:line` of the innermost call in the traceback whose frame is `accepted`; None where none is."""
    lines = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if accepted(frame)
    ]
    return lines[-1] if lines else None


def _files_of(author: type) -> Iterable[str]:
    """Files in which methods of the class are written, without those of the base classes that PhaseLens provides."""
    for owner in author.__mro__:
        if owner.__module__.partition(".")[0] in ("phaselens", "builtins", "abc", "typing"):
            continue
        for member in vars(owner).values():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            function = function.fget if isinstance(function, property) else function
            code = getattr(function, "__code__", None)
            if code is not None:
                yield code.co_filename
