"""Colours, markers and axes of the figures that built-in metrics draw themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from phaselens.plugin import CellValue, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinct for all common kinds of colour vision; markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#333333"
DASHES = (0, (4, 3))

Record = Mapping[str, CellValue]


def records_by_model(table: Table) -> dict[str, list[Record]]:
    """Return the table's rows as dicts, by the label of their model, in the order of the rows."""
    by_model: dict[str, list[Record]] = {}
    for record in table.records():
        by_model.setdefault(str(record["model"]), []).append(record)
    return by_model


def numbers(records: Sequence[Record], column: str) -> list[float]:
    """Return a column of numbers, with NaN, drawn as a gap, for a missing one."""
    cells = [record[column] for record in records]
    return [float(cell) if isinstance(cell, int | float) else float("nan") for cell in cells]


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the colour and the marker of each label's line, as keyword arguments of `plot`."""
    return {
        label: {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.5}
        for label, colour, marker in zip(labels, cycle(COLOURS), cycle(MARKERS), strict=False)
    }


def draw_line(
    axes: Axes,
    x: Sequence[float],
    records: Sequence[Record],
    column: str,
    style: Mapping[str, Any],
    *,
    label: str | None = None,
    interval: tuple[str, str] | None = None,
    null: str | None = None,
) -> None:
    """Draw a column against `x`, its interval as a band, and its null dashed in the same colour."""
    text = None if label is None else escaped(label)
    axes.plot(x, numbers(records, column), label=text, **style)
    if interval is not None:
        low, high = (numbers(records, name) for name in interval)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        if len(x) == 1:  # a band without width
            axes.vlines(x, low, high, color=style["color"], linewidth=1.0)
    if null is not None:
        axes.plot(x, numbers(records, null), color=style["color"], linestyle=DASHES, linewidth=1.0, alpha=0.8)


def bare(axes: Axes) -> None:
    """Draw the axes without a box, with faint horizontal grid lines."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def escaped(text: str) -> str:
    """Return text for matplotlib: without control characters, and `$` escaped, so that it does not start a formula.

    >>> escaped("a$x$")
    'a\\\\$x\\\\$'
    """
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable.replace("$", r"\$")
