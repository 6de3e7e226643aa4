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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phaselens.runs.result import Run


class PhaseLensError(Exception):
    """Base of all errors that PhaseLens raises on purpose.

    `run` is the finished part of a `phaselens.run` that ended with this error, if a model was finished by then; else
    None.
    """

    exit_code = 2
    run: Run | None = None


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


def close_matches(name: str, known: Iterable[str]) -> str:
    """A tail for a message about an unknown name: close matches, or all that is known.

    >>> close_matches("sink", ["sinks", "compression"])
    'did you mean sinks?'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(names)}" if names else "none is known"
