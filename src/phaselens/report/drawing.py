"""Colours, markers, axes and scales shared by all figures, with matplotlib's object interface only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from phaselens.report.numbers import shortest
from phaselens.report.strings import printable, shortened

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinct for all common kinds of colour vision; markers and dashes repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#333333"
DASHES = (0, (4, 3))
WIDE, HIGH = 6.4, 4.0
# An axis of nats is linear up to `_LINEAR`. Beyond that, it is logarithmic if a quarter of the values are smaller than
# the largest by the factor `_SPAN`.
_LINEAR, _SPAN = 0.01, 30.0


def empty_figure(width: float, height: float) -> Figure:
    """Return a figure without axes; sizes are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    sharey: bool = False,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes [row, column]."""
    figure = empty_figure(width, height)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey, width_ratios=width_ratios)
    return figure, axes


def bare(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Draw the axes without a box, with faint grid lines."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def hatch_missing(axes: Axes) -> None:
    """Hatch the background, which shows where an image has no value."""
    axes.set_facecolor("#eeeeee")
    axes.patch.set_hatch("///")
    axes.patch.set_edgecolor("#bbbbbb")


def whole_numbers(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def lettering(text: str, width: int | None = None) -> str:
    """Format a label or name for matplotlib on one line; `$` is escaped, so that it does not start a formula.

    >>> lettering("a$x$"), lettering("a-very-long-name", 9)
    ('a\\\\$x\\\\$', 'a-ve…name')
    """
    line = printable(text) if width is None else shortened(text, width)
    return line.replace("$", r"\$")


def signed_scale(axes: Axes, direction: Literal["x", "y"], values: Sequence[float]) -> str:
    """Make an axis of nats logarithmic beyond ±0.01 if a few large values would hide the others near 0.

    Return a note on the scale for the legend; empty for a linear axis.
    """
    import numpy as np
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    sizes = np.abs([value for value in values if value == value and value != 0])
    if not sizes.size or sizes.max() < 20 * _LINEAR or sizes.max() < _SPAN * np.quantile(sizes, 0.25):
        return ""
    (axes.set_xscale if direction == "x" else axes.set_yscale)("symlog", linthresh=_LINEAR, linscale=0.8)
    axes.autoscale(axis=direction)
    axis = axes.xaxis if direction == "x" else axes.yaxis
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=_LINEAR))
    axis.set_major_formatter(FuncFormatter(lambda value, position: shortest(value)))
    return f"linear to ±{shortest(_LINEAR)}, then logarithmic"
