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
from collections.abc import Iterable
from numbers import Integral
from typing import Any


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


def require_whole(name: str, value: Any, least: int) -> None:
    """InputError unless `value` is a whole number of at least `least`; True and False are none.

    >>> require_whole("width", 2.5, 1)
    Traceback (most recent call last):
    phaselens.errors.InputError: expected width as a whole number of at least 1, received 2.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"expected {name} as a whole number of at least {least}, received {value!r}")


def require_tensor(name: str, value: Any) -> None:
    """InputError unless `value` is a PyTorch tensor."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"expected {name} as a tensor, received {type(value).__name__}")


def kind_unless_whole(values: Any) -> str:
    """What `values` are instead of a tensor of whole numbers: the dtype or the type; empty where they are one."""
    import torch

    if not isinstance(values, torch.Tensor):
        return type(values).__name__
    return str(values.dtype) if values.is_floating_point() or values.dtype == torch.bool else ""


def require_number(name: str, value: Any, least: float | None = None) -> None:
    """InputError unless `value` is one number (of Python or numpy, or a tensor without dimensions) and not NaN."""
    is_number = not isinstance(value, bool | str | bytes) and hasattr(value, "__float__")
    if not is_number or getattr(value, "shape", ()) != ():
        raise InputError(f"expected {name} as a number, received {value!r}")
    if value != value or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least:g}"
        raise InputError(f"expected {name} as a number{bound}, received {value!r}")


def require_flag(name: str, value: Any) -> None:
    """InputError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"expected {name} as True or False, received {value!r}")
