"""How a run shows itself in a notebook. `phaselens.report`, which is above this package, does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from phaselens.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from phaselens.runs.result import Run


class Presenter(Protocol):
    """Returns a run's tables as HTML, and draws its figures."""

    def html(self, run: Run) -> str:
        """Return the run's tables as HTML without scripts."""

    def plot(self, run: Run, metric: str, figure: str | None) -> Figure:
        """Return one figure of a metric."""


class PresentedRun:
    """Base of `Run` with what a notebook calls. `presenter` does the work; `phaselens.run` sets it."""

    presenter: Presenter | None

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
