"""`phaselens.run`: `phaselens.runs.run`, with a result that prints its tables.

`phaselens.runs` is below `phaselens.report` and cannot print tables itself, so that this module connects the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from phaselens import runs
from phaselens.runs import Run

P = ParamSpec("P")


def tables_text(run: Run) -> str:
    """Return the run's tables as plain text; `str(run)` calls it for runs of `phaselens.run`."""
    from phaselens.report.terminal_layout import as_text

    return as_text(run)


def with_tables(measure: Callable[P, Run]) -> Callable[P, Run]:
    """Set `tables_text` as the renderer of the run that `measure` returns, or that its error carries as `run`."""

    @wraps(measure)
    def run(*args: P.args, **kwargs: P.kwargs) -> Run:
        try:
            finished_run = measure(*args, **kwargs)
        except BaseException as error:
            partial_run = getattr(error, "run", None)
            if isinstance(partial_run, Run):
                partial_run.renderer = tables_text
            raise
        finished_run.renderer = tables_text
        return finished_run

    return run


run = with_tables(runs.run)
