"""`phaselens.run` and `phaselens.compare`: those of `phaselens.runs`, with results that print their tables.

`phaselens.runs` is below `phaselens.report` and cannot print tables itself, so that this module connects the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from phaselens import runs
from phaselens.runs import Comparison, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")


def tables_text(run: Run) -> str:
    """Return the run's tables as plain text; `str(run)` calls it for runs of `phaselens.run`."""
    from phaselens.report.terminal_layout import as_text

    return as_text(run)


def comparison_text(comparison: Comparison) -> str:
    """Return the differences as plain text; `str(comparison)` calls it for comparisons of `phaselens.compare`."""
    from phaselens.report.comparison_tables import as_text

    return as_text(comparison)


def comparison_html(comparison: Comparison) -> str:
    """Return the differences as HTML without scripts, for notebooks."""
    from phaselens.report.notebook import comparison_html as html

    return html(comparison)


def with_differences(compare_models: Callable[P, Comparison]) -> Callable[P, Comparison]:
    """Set `comparison_text` and `comparison_html` as the renderers of the comparison that `compare_models` returns."""

    @wraps(compare_models)
    def compare(*args: P.args, **kwargs: P.kwargs) -> Comparison:
        comparison = compare_models(*args, **kwargs)
        comparison.renderer, comparison.html_renderer = comparison_text, comparison_html
        return comparison

    return compare


class _LatePresenter:
    """Shows runs in notebooks; imports the report when it is first asked."""

    def html(self, run: Run) -> str:
        """Return the run's tables as HTML without scripts."""
        from phaselens.report.notebook import run_html

        return run_html(run)

    def plot(self, run: Run, metric: str, figure: str | None) -> Figure:
        """Return one figure of a metric."""
        from phaselens.report.notebook import plot

        return plot(run, metric, figure)


def _present(run: Run) -> None:
    run.renderer, run.presenter = tables_text, _LatePresenter()


def with_tables(measure: Callable[P, Run], *, draws: bool = False) -> Callable[P, Run]:
    """Set `tables_text` as the renderer of the run that `measure` returns, or that its error carries as `run`.

    With `draws`, the figures of a run with a directory are drawn there.
    """

    @wraps(measure)
    def run(*args: P.args, **kwargs: P.kwargs) -> Run:
        try:
            finished_run = measure(*args, **kwargs)
        except BaseException as error:
            partial_run = getattr(error, "run", None)
            if isinstance(partial_run, Run):
                _present(partial_run)
            raise
        _present(finished_run)
        if finished_run.directory is not None and finished_run.models and draws:
            from phaselens.report.figures import draw_in_directory

            draw_in_directory(finished_run)
        return finished_run

    return run


run = with_tables(runs.run, draws=True)
merge = with_tables(runs.merge, draws=True)
compare = with_differences(runs.compare)
open_run = with_tables(runs.open_run)
