"""Errors a user can meet, each with the exit code that the command line gives it.

    PhaseLensError             2  usage or bad input; every error below is one
    ├── InputError             2  texts, parameters, names
    ├── ModelError             3  a model could not be loaded
    │   └── RefusedModel       3  it loaded, but cannot be served exactly
    └── MetricError            1  a metric failed; the others are written

A message is one line: what was asked, what was found, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class PhaseLensError(Exception):
    """Base of all errors that PhaseLens raises on purpose.

    `run` is the finished part of a `phaselens.run` that ended with this error, if a model was finished by then; else
    None.
    """

    exit_code = 2
    run: Any = None


class InputError(PhaseLensError, ValueError):
    """A text, a parameter or a name that cannot be used."""


class ModelError(PhaseLensError):
    """A model that could not be loaded."""

    exit_code = 3


class RefusedModel(ModelError):  # noqa: N818 - a verdict on the model, raised by name
    """A model that loaded but cannot be served exactly; the message names what does not fit."""


class MetricError(PhaseLensError):
    """A metric that failed while it ran."""

    exit_code = 1


def close_matches(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """A tail for a message about an unknown name: close matches; else `otherwise`, by default all that is known.

    >>> close_matches("sink", ["sinks", "compression"])
    'did you mean sinks?'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if otherwise:
        return otherwise
    return f"known: {', '.join(names)}" if names else "none is known"


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number, of Python or numpy; True and False are none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: Any) -> bool:
    """Whether `value` is one number: of Python, of numpy, or a tensor without dimensions; True and False are none."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return False
    return getattr(value, "shape", ()) == ()


def is_list_like(value: Any, kind: type = Iterable) -> bool:
    """Whether the items of `value` can be taken one by one (of a Collection: counted, and taken again); a text, bytes
    and a mapping are no lists."""
    return isinstance(value, kind) and not isinstance(value, str | bytes | Mapping)


def short_form(value: Any) -> str:
    """`value` as Python writes it, on one line; by its type where that is long, and for tensors and arrays.

    >>> short_form("x"), short_form([0.5]), short_form(list(range(99)))
    ("'x'", '[0.5]', 'list')
    """
    if getattr(value, "shape", ()) != ():
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    shown = repr(value)
    return shown if len(shown) <= 80 and "\n" not in shown else type(value).__name__


def require_whole(name: str, value: Any, least: int | None = None) -> None:
    """InputError unless `value` is a whole number, of at least `least`; True and False are none.

    >>> require_whole("width", 2.5, 1)
    Traceback (most recent call last):
    phaselens.errors.InputError: expected width as a whole number of at least 1, received 2.5
    """
    if not is_whole(value) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise InputError(f"expected {name} as a whole number{bound}, received {short_form(value)}")


def require_wholes(name: str, values: Any, least: int | None = None) -> None:
    """InputError unless `values` are a list, or the like, of whole numbers of at least `least`."""
    if not is_list_like(values, Collection):
        raise InputError(f"expected {name} as a list of whole numbers, received {short_form(values)}")
    for value in values:
        require_whole(f"each of {name}", value, least)


def kind_unless_whole(values: Any) -> str:
    """What `values` are instead of a tensor of whole numbers: the dtype or the type; empty where they are one."""
    import torch

    if not isinstance(values, torch.Tensor):
        return type(values).__name__
    return str(values.dtype) if values.is_floating_point() or values.dtype == torch.bool else ""


def require_number(name: str, value: Any, least: float | None = None, *, or_nan: bool = False) -> None:
    """InputError unless `value` is one number, as `is_number` has it, of at least `least`; NaN only where `or_nan`."""
    if not is_number(value):
        raise InputError(f"expected {name} as a number, received {short_form(value)}")
    if (value != value and not or_nan) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least:g}"
        raise InputError(f"expected {name} as a number{bound}, received {short_form(value)}")


def require_text(name: str, value: Any) -> None:
    """InputError unless `value` is a str."""
    if not isinstance(value, str):
        raise InputError(f"expected {name} as text, received {short_form(value)}")


def require_flag(name: str, value: Any) -> None:
    """InputError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"expected {name} as True or False, received {short_form(value)}")


def require_function(name: str, value: Any) -> None:
    """InputError unless `value` can be called."""
    if not callable(value):
        raise InputError(f"expected {name} as a function, received {short_form(value)}")


def require_kind(name: str, value: Any, kind: type, how: str) -> None:
    """InputError unless `value` is an instance of `kind`; `how` says where one comes from.

    >>> require_kind("sweep", 3, Exception, "made by Experiment.sweep")
    Traceback (most recent call last):
    phaselens.errors.InputError: expected sweep as an Exception made by Experiment.sweep, received 3
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InputError(f"expected {name} as {article} {kind.__name__} {how}, received {short_form(value)}")


def require_tensor(name: str, value: Any, *axes: str) -> None:
    """InputError unless `value` is a PyTorch tensor that has these axes; a first axis `…` stands for any number.

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


def as_numbers(name: str, values: Any) -> NDArray[np.float64]:
    """`values` as a float64 array of whatever shape; None among them is NaN.

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
            and all(each is None or is_number(each) for each in array.flat)
        ):
            return array.astype(np.float64, copy=False)
    except (TypeError, ValueError):  # what numpy raises for values of which it makes no array
        pass
    raise InputError(f"expected {name} as an array of numbers, received {short_form(values)}")
