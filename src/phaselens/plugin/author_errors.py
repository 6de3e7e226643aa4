"""Errors that a plugin's author must fix: how they are worded, and where in the author's files they arose."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable
from types import FrameType

from phaselens.errors import InputError, repr_of
from phaselens.lens.points import in_layer, layer_and_point


def is_of_plugin(error: BaseException) -> bool:
    """Return whether an exception may come from a plugin and must not end the run: all but Ctrl-C, and but the
    GeneratorExit by which Python closes a generator of PhaseLens.

    `sys.exit`, a panic in Rust and `asyncio.CancelledError` are no subclasses of Exception.
    """
    if isinstance(error, GeneratorExit):
        modules = [
            str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        return bool(modules) and modules[-1].partition(".")[0] not in ("phaselens", "contextlib")
    return not isinstance(error, KeyboardInterrupt)


def message_of(error: BaseException) -> str:
    """Return an exception's message on one line; a placeholder if its `__str__` fails."""
    try:
        return " ".join(str(error).split())
    except BaseException as failed:  # a class of the plugin may raise anything
        if isinstance(failed, KeyboardInterrupt):
            raise
        return f"its message cannot be read ({type(failed).__name__})"


def author_error(
    message: str, location: str | None = None, error_class: type[Exception] = TypeError
) -> Exception:
    """Create an error about something that a plugin's author must change: what was received, and what is expected.

    `location` is `file:line` in the author's file, kept as an attribute, if the traceback alone would not lead there.
    """
    error = error_class(message)
    vars(error)["location"] = location
    return error


def finding_error(message: str) -> InputError:
    """Create an error that states a finding about the run, which the author of the metric need not change."""
    error = InputError(message)
    vars(error)["is_finding"] = True
    return error


class UnknownName(KeyError):  # noqa: N818 - its message is a sentence
    """A name that a mapping does not hold, with a message in words."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownPoint(UnknownName):
    """A hook point that `update` reads but `hooks()` does not name."""

    def __init__(self, name: str, layer: int | None, hooked: list[str]) -> None:
        scope = "outside of the layers" if layer is None else f"in layer {layer}"
        name_layer, point = layer_and_point(name)
        if name_layer is not None and name_layer == layer and point in hooked:
            advice = f"write {point!r}: a layer's points have their names inside the layer"
        else:
            full_name = name if layer is None or name.startswith("blocks.") else in_layer("{layer}", name)
            advice = f"add {full_name!r} to hooks()"
        listed = ", ".join(hooked) or "nothing"
        super().__init__(f"update reads {name!r} {scope}, where hooks() asks for {listed}; {advice}")


def describe_value(value: object) -> str:
    """Describe a value for messages: its type, and the value itself if it is short.

    >>> describe_value(0), describe_value(None), describe_value([1, 2])
    ('the int 0', 'None', 'the list [1, 2]')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__module__.split('.')[0]} {type(value).__name__} of shape {list(shape)}"
    text = repr_of(value)
    name = type(value).__name__
    return f"the {name} {text}" if len(text) <= 60 and not text.startswith("<") else f"a {name}"


def describe_error(error: BaseException) -> str:
    """Return an exception's type and message on one line: `ModuleNotFoundError: No module named 'x'`."""
    return f"{type(error).__name__}: {message_of(error)}".strip()


def source_location(definition: object) -> str | None:
    """Return `file:line` where a function or class is defined; None if Python cannot tell.

    A class that was made by a call of `type` is in no file; from Python 3.13 on, its location is that of the class that
    it extends, where an author wrote that.
    """
    code = getattr(inspect.unwrap(definition), "__code__", None) if callable(definition) else None
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    bases = definition.__mro__ if isinstance(definition, type) else (definition,)
    for candidate in bases:
        if isinstance(candidate, type) and candidate.__module__.startswith("phaselens."):
            return None
        try:
            return f"{inspect.getsourcefile(candidate)}:{inspect.getsourcelines(candidate)[1]}"  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return None


def location_in_class(error: BaseException, author_class: type) -> str | None:
    """Return `file:line` of the innermost call in the files of `author_class`; None if the error arose elsewhere."""
    files = set(_source_files(author_class))
    return innermost_location(error, lambda frame: frame.f_code.co_filename in files)


def innermost_location(error: BaseException, accepts: Callable[[FrameType], bool]) -> str | None:
    """Return `file:line` of the innermost call in the traceback whose frame is accepted; None without one."""
    locations = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if accepts(frame)
    ]
    return locations[-1] if locations else None


def _source_files(author_class: type) -> Iterable[str]:
    """Yield the files that define methods of the class, without those of base classes that PhaseLens provides."""
    for base in author_class.__mro__:
        if base.__module__.partition(".")[0] in ("phaselens", "builtins", "abc", "typing"):
            continue
        for member in vars(base).values():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            function = function.fget if isinstance(function, property) else function
            code = getattr(function, "__code__", None)
            if code is not None:
                yield code.co_filename
