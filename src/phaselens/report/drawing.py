"""What all figures share: colours, markers, bare axes. matplotlib's object interface only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from phaselens.plugin import Cell
from phaselens.report import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which all common kinds of colour vision tell apart; markers and dashes say the same.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#333333"
DASHES = (0, (4, 3))
WIDE, HIGH = 6.4, 4.0
# Nats up to here are drawn on a linear axis in any case, and a quarter of the values must be this much smaller than the
# largest for another one.
_LINEAR, _SPAN = 0.01, 30.0


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """An empty figure and its axes [row, column]; no axes if `rows` is 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options) if rows else None


def bare(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """No box, and faint lines across."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def finite(cell: Cell) -> float:
    """A missing value is a gap in a line."""
    return float(cell) if isinstance(cell, int | float) else float("nan")


def lettering(text: str, width: int | None = None) -> str:
    """A label or name as matplotlib writes it, whatever is in it; `$` stays a sign and starts no formula.

    >>> lettering("a$x$"), lettering("a-very-long-name", 9)
    ('a\\\\$x\\\\$', 'a-ve…name')
    """
    shown = words.plain(text) if width is None else words.shortened(text, width)
    return shown.replace("$", r"\$")


def signed_scale(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> str:
    """Make an axis of nats logarithmic beyond ±0.01 where a few values would press the others to 0.

    Returns what to say of it, or nothing.
    """
    import numpy as np
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    sizes = np.abs([value for value in values if value == value and value != 0])
    if not sizes.size or sizes.max() < 20 * _LINEAR or sizes.max() < _SPAN * np.quantile(sizes, 0.25):
        return ""
    (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=_LINEAR, linscale=0.8)
    axes.autoscale(axis=which)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=_LINEAR))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    return f"linear to ±{_LINEAR:g}, then logarithmic"
