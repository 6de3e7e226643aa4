"""Numbers of display tables, tables by head, and sweeps as figures and heatmaps draw them.

Numbers are floats, shares in percent, and missing values NaN; cells of a sweep that were not measured are masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from phaselens.plugin import CellValue
from phaselens.report.builders import model_records
from phaselens.report.strings import shortened
from phaselens.report.table import LAYER_COLUMN, DisplayColumn, DisplayTable

if TYPE_CHECKING:
    import numpy as np

    from phaselens.errors import FloatArray
    from phaselens.patching import Sweep
    from phaselens.runs import MetricResult, Run

_MAX_TOKEN_WIDTH = 14


@dataclass(frozen=True)
class FigurePoint:
    """One cell: its layer, value, interval and null. `row` is its row's index in the table."""

    row: int
    layer: float
    value: float
    low: float
    high: float
    null: float


def finite(value: CellValue, factor: float = 1.0) -> float:
    """Return a number times `factor`, or NaN, drawn as a gap, for a missing one."""
    return factor * value if isinstance(value, int | float) else float("nan")


def model_points(table: DisplayTable, model_index: int, column: DisplayColumn) -> list[FigurePoint]:
    """Return one column of one model, top to bottom, without rows that the model lacks."""
    factor = column.number_format.factor
    index = table.columns.index(column)
    layer_index = table.columns.index(LAYER_COLUMN) if LAYER_COLUMN in table.columns else None
    points = []
    for row_index, row in enumerate(table.rows):
        cells = row.cells[model_index]
        if cells is None:
            continue
        cell = cells[index]
        value, low, high, null = (
            finite(number, factor) for number in (cell.value, cell.low, cell.high, cell.null)
        )
        layer = row.layer if layer_index is None else cells[layer_index].value
        points.append(FigurePoint(row_index, finite(layer), value, low, high, null))
    return points


def head_grids(run: Run, result: MetricResult, column: str) -> list[FloatArray]:
    """Return one column of the table by head, [layer, head] for each model."""
    import numpy as np

    grids = []
    for model in run.models:
        grid = np.full((model.info.n_layers, model.info.n_heads), np.nan)
        for record in model_records(result, "heads", model.info.label):
            grid[int(finite(record["layer"])), int(finite(record["head"]))] = finite(record[column])
        grids.append(grid)
    return grids


class EffectGrid(NamedTuple):
    """Effects [row, column] of a sweep, with labels and the names of the two axes."""

    effects: np.ma.MaskedArray[Any, Any]
    row_labels: list[str]
    column_labels: list[str]
    row_axis: str
    column_axis: str


def effect_grid(sweep: Sweep) -> EffectGrid:
    """Return the effects as a terminal prints them: positions, layers, or layers and heads down."""
    effects = sweep.grid()
    layers = [str(layer) for layer in sweep.layers]
    if sweep.axes == ("layer", "pos"):
        return EffectGrid(effects.T, _position_labels(sweep), layers, "pos", "layer")
    heads = [str(head) for head in range(effects.shape[-1])]
    if sweep.axes == ("layer", "head"):
        return EffectGrid(effects, layers, heads, "layer", "head")
    n_positions = effects.shape[1]
    by_head = effects.transpose(0, 2, 1).reshape(-1, n_positions)
    row_labels = [f"{layer}.{head}" for layer in layers for head in heads]
    return EffectGrid(by_head, row_labels, [str(pos) for pos in range(n_positions)], "layer.head", "pos")


def effect_grid_by_layer(sweep: Sweep) -> EffectGrid:
    """Return the effects as a figure draws them: layers, or layers and heads, down."""
    grid = effect_grid(sweep)
    if sweep.axes == ("layer", "pos"):
        return EffectGrid(grid.effects.T, grid.column_labels, grid.row_labels, "layer", "position")
    if sweep.axes == ("layer", "head"):
        return grid
    return grid._replace(column_labels=_position_labels(sweep), column_axis="position")


def _position_labels(sweep: Sweep) -> list[str]:
    """Label each position with its token, `5 ' Paris'`, or with both prompts' tokens where they differ."""
    labels = []
    for pos, (clean, corrupt) in enumerate(zip(sweep.clean_words, sweep.corrupt_words, strict=True)):
        label = f"{pos} {shortened(clean, _MAX_TOKEN_WIDTH)}"
        labels.append(label if clean == corrupt else f"{label}≠{shortened(corrupt, _MAX_TOKEN_WIDTH)}")
    return labels
