"""Errors that users can meet, each with its exit code on the command line.

    PhaseLensError             2  usage or bad input; base of the errors below
    ├── InputError             2  texts, parameters, names
    ├── ModelError             3  a model could not be loaded
    │   └── RefusedModel       3  a model loaded, but cannot be served exactly
    └── MetricError            1  a metric failed; the others are written

A message is one line: what was requested, what was found, and what to do. The `require_…` functions check arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FloatArray: TypeAlias = "NDArray[np.float64]"

#: Whole numbers beyond it fit neither into a tensor nor into a table.
LARGEST_WHOLE = 2**63 - 1


class PhaseLensError(Exception):
    """Base of all errors that PhaseLens raises on purpose.

    `run` holds the finished models of a `phaselens.run` that ended with this error; None if no model was finished.
    """

    exit_code = 2
    run: Any = None


class InputError(PhaseLensError, ValueError):
    """A text, a parameter or a name that cannot be used."""


class ModelError(PhaseLensError):
    """A model that could not be loaded."""

    exit_code = 3


class RefusedModel(ModelError):  # noqa: N818 - named after the verdict on the model
    """A model that loaded but cannot be served exactly; the message names what does not fit."""


class MetricError(PhaseLensError):
    """A metric that failed while it ran."""

    exit_code = 1


def close_matches(
    name: str, candidates: Iterable[str], *, otherwise: str = "", full_stop: bool = False
) -> str:
    """Return the end of a message about an unknown name: close matches; else `otherwise`, by default all candidates.

    Close matches form a question; `full_stop` ends a list of all candidates, for a message that goes on after it.

    >>> close_matches("sink", ["sinks", "compression"])
    'did you mean sinks?'
    """
    names = sorted(set(candidates))
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.6) if isinstance(name, str) else []
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    if otherwise:
        return otherwise
    return (f"known: {', '.join(names)}" if names else "none is known") + ("." if full_stop else "")


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether `value` is a whole number of Python or numpy; True and False are not."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is one Python or numpy number, or a tensor without axes; True and False are not."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return False
    return getattr(value, "shape", ()) == ()


def is_list_like(value: object, required_type: type = Iterable) -> TypeGuard[Iterable[Any]]:
    """Return whether `value` is an Iterable (or a Collection, as `required_type`) but not text, bytes or a mapping."""
    return isinstance(value, required_type) and not isinstance(value, str | bytes | Mapping)


def short_form(value: object) -> str:
    """Return the `repr` of `value` if it is one short line, else the name of its type; for arrays also the shape.

    >>> short_form("x"), short_form([0.5]), short_form(list(range(99)))
    ("'x'", '[0.5]', 'list')
    """
    shape = getattr(value, "shape", ())
    if shape != ():
        return f"{type(value).__name__} of shape {tuple(shape)}"
    text = repr_of(value)
    return text if len(text) <= 80 and "\n" not in text else type(value).__name__


def repr_of(value: object) -> str:
    """Return the `repr` of `value`; the name of its type where that fails, as for numbers of 5,000 digits."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - a class of the user may raise anything
        return type(value).__name__


def require_whole(name: str, value: object, minimum: int | None = None) -> None:
    """Raise InputError unless `value` is a whole number of at least `minimum`; True and False are not.

    >>> require_whole("width", 2.5, 1)
    Traceback (most recent call last):
    phaselens.errors.InputError: expected width as a whole number of at least 1, received 2.5
    """
    if not is_whole(value) or (minimum is not None and value < minimum) or abs(value) > LARGEST_WHOLE:
        bound = "" if minimum is None else f" of at least {minimum}"
        if is_whole(value) and abs(value) > LARGEST_WHOLE:
            bound = f" of at most {LARGEST_WHOLE}"
        raise InputError(f"expected {name} as a whole number{bound}, received {short_form(value)}")


def require_wholes(name: str, values: object, minimum: int | None = None) -> None:
    """Raise InputError unless `values` is list-like and holds whole numbers of at least `minimum`."""
    if not is_list_like(values, Collection):
        raise InputError(f"expected {name} as a list of whole numbers, received {short_form(values)}")
    for value in values:
        require_whole(f"each of {name}", value, minimum)


def type_unless_whole(values: object) -> str:
    """Return the dtype or type of `values`; empty if they are a tensor of whole numbers."""
    import torch

    if not isinstance(values, torch.Tensor):
        return type(values).__name__
    return str(values.dtype) if values.is_floating_point() or values.dtype == torch.bool else ""


def require_number(name: str, value: object, minimum: float | None = None, *, or_nan: bool = False) -> None:
    """Raise InputError unless `value` is a number of at least `minimum`; NaN is accepted only with `or_nan`."""
    if not is_number(value):
        raise InputError(f"expected {name} as a number, received {short_form(value)}")
    if (value != value and not or_nan) or (minimum is not None and value < minimum):
        bound = "" if minimum is None else f" of at least {minimum:g}"
        raise InputError(f"expected {name} as a number{bound}, received {short_form(value)}")


def require_text(name: str, value: object) -> None:
    """Raise InputError unless `value` is a str."""
    if not isinstance(value, str):
        raise InputError(f"expected {name} as text, received {short_form(value)}")


def require_unicode(name: str, text: str) -> None:
    """Raise InputError for half of a surrogate pair, which JSON and Python can hold but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: symbol {error.start + 1} is a lone surrogate, not a character") from error


def require_flag(name: str, value: object) -> None:
    """Raise InputError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"expected {name} as True or False, received {short_form(value)}")


def require_function(name: str, value: object) -> None:
    """Raise InputError unless `value` is callable."""
    if not callable(value):
        raise InputError(f"expected {name} as a function, received {short_form(value)}")


def require_kind(name: str, value: object, required_type: type, origin: str) -> None:
    """Raise InputError unless `value` is an instance of `required_type`; `origin` says how to get one.

    >>> require_kind("sweep", 3, Exception, "made by Experiment.sweep")
    Traceback (most recent call last):
    phaselens.errors.InputError: expected sweep as an Exception made by Experiment.sweep, received 3
    """
    if not isinstance(value, required_type):
        type_name = required_type.__name__
        article = "an" if type_name[0] in "AEIOU" else "a"
        raise InputError(f"expected {name} as {article} {type_name} {origin}, received {short_form(value)}")


def require_tensor(name: str, value: object, *axes: str) -> None:
    """Raise InputError unless `value` is a tensor with these axes; a first axis `…` means any number of axes.

    >>> import torch
    >>> require_tensor("norms", torch.ones(2, 3), "pos")
    Traceback (most recent call last):
    phaselens.errors.InputError: expected norms as a tensor [pos], received one of shape (2, 3)
    """
    import torch

    shape = f" [{', '.join(axes)}]" if axes else ""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"expected {name} as a tensor{shape}, received {type(value).__name__}")
    fits = value.ndim >= len(axes) - 1 if axes[:1] == ("…",) else value.ndim == len(axes)
    if axes and not fits:
        raise InputError(f"expected {name} as a tensor{shape}, received one of shape {tuple(value.shape)}")


def as_numbers(name: str, values: object) -> FloatArray:
    """Return `values` as a float64 array of any shape, with NaN in place of None.

    Raises:
        InputError: for anything but numbers, and for lists of unequal lengths.

    >>> as_numbers("losses", ["a"])
    Traceback (most recent call last):
    phaselens.errors.InputError: expected losses as an array of numbers, received ['a']
    """
    import numpy as np

    try:
        array = np.asarray(values)
        if array.dtype.kind in "biuf" or (
            array.dtype.kind == "O"
            and array.ndim
            and all(value is None or is_number(value) for value in array.flat)
        ):
            return array.astype(np.float64, copy=False)
    except (TypeError, ValueError):  # numpy cannot make an array of the values
        pass
    raise InputError(f"expected {name} as an array of numbers, received {short_form(values)}")
