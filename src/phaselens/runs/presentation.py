"""How a run shows itself in a notebook, and how its parts are read by name.

`phaselens.report`, which is above this package, draws figures and main tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from phaselens.errors import InputError, close_matches, require_text
from phaselens.plugin.table_html import html_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from phaselens.plugin import Table
    from phaselens.runs.comparison import Comparison
    from phaselens.runs.result import MetricResult, Run


class Presenter(Protocol):
    """Returns a run's tables as HTML, and draws its figures."""

    def html(self, run: Run) -> str:
        """Return the run's tables as HTML without scripts."""

    def plot(self, run: Run, metric: str, figure: str | None) -> Figure:
        """Return one figure of a metric."""


class PresentedRun:
    """Base of `Run` with what a notebook calls. `presenter` does the work; `phaselens.run` sets it."""

    presenter: Presenter | None

    def __getitem__(self: Any, metric: str) -> MetricResult:
        """Return one metric's result, `run["sinks"]`, whose tables are `run["sinks"]["layers"]`.

        Raises:
            InputError: for another name, with close matches.
        """
        result: MetricResult = self.result(metric)
        return result

    def __contains__(self: Any, metric: object) -> bool:
        return metric in self.metrics

    def __iter__(self: Any) -> Iterator[str]:
        return iter(self.metrics)

    def _repr_html_(self: Any) -> str | None:
        return None if self.presenter is None else self.presenter.html(self)

    def plot(self: Any, metric: str, figure: str | None = None) -> Figure:
        """Return a figure of a metric: its curve or effects, or `heads`, its heatmap of layers and heads.

        Args:
            metric: a metric of the run.
            figure: the rest of the figure's name in `--figures`, such as `heads`; None for the metric's main figure.

        Raises:
            InputError: for another metric, or a figure that it does not have.
        """
        if self.presenter is None:
            raise InputError("figures are drawn for runs of phaselens.run and phaselens.open_run")
        drawn: Figure = self.presenter.plot(self, metric, figure)
        return drawn


class PresentedResult:
    """Base of `MetricResult`: its tables by name, a short repr, and what a notebook shows."""

    def __getitem__(self: Any, table: str) -> Table:
        """Return a table as plain rows, `run["sinks"]["layers"]`; `to_arrow` and `to_pandas` convert it.

        Raises:
            InputError: for another name, with close matches.
        """
        require_text("table", table)
        if table not in self.tables:
            raise InputError(
                f"metric {self.metric.name!r} has no table {table!r}; {close_matches(table, self.tables)}"
            )
        rows: Table = self.tables[table]
        return rows

    def __contains__(self: Any, table: object) -> bool:
        return table in self.tables

    def __iter__(self: Any) -> Iterator[str]:
        return iter(self.tables)

    def __repr__(self: Any) -> str:
        tables = ", ".join(f"{name} of {len(table.rows):,} rows" for name, table in self.tables.items())
        failures = "".join(f"; failed: {failure}" for failure in self.failures)
        return f"<{self.metric.name}: {tables or 'no table'}{failures}>"

    def _repr_html_(self: Any) -> str:
        failures = "".join(f"<p><b>failed:</b> {html_text(str(failure))}</p>" for failure in self.failures)
        main = self.metric.display.table if self.metric.display is not None else next(iter(self.tables), "")
        tables = self.tables[main]._repr_html_() if main in self.tables else ""
        for name, table in self.tables.items():
            if name != main:
                summary = f"<summary>{html_text(name)}, {len(table.rows):,} rows</summary>"
                tables += f"<details>{summary}{table._repr_html_()}</details>"
        return f"<h4>{html_text(self.metric.name)}</h4><p>{html_text(self.definition)}</p>{failures}{tables}"


class PresentedComparison:
    """Base of `Comparison` with what a notebook shows; `phaselens.compare` sets `html_renderer`."""

    html_renderer: Callable[[Comparison], str] | None

    def _repr_html_(self: Any) -> str:
        shown: str
        shown = self.differences._repr_html_() if self.html_renderer is None else self.html_renderer(self)
        return shown
