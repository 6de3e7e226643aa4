"""Layer × head quantities of a run as heatmaps on a terminal: `phaselens run --heatmap METRIC[.COLUMN]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from phaselens.errors import InputError, close_matches
from phaselens.plugin import Metric, TableSpec
from phaselens.report.builders import model_records
from phaselens.report.figure_data import EffectGrid
from phaselens.report.heatmap import grid_lines
from phaselens.report.strings import printable

if TYPE_CHECKING:
    from phaselens.runs import Run

_AXES = {"layer", "head"}


@dataclass(frozen=True)
class HeadQuantity:
    """A column of a metric's table with one row per layer and head, and what it means."""

    metric: str
    table: str
    column: str
    unit: str | None
    meaning: str

    @classmethod
    def find(cls, target: str, metrics: Mapping[str, type[Metric[Any]]]) -> HeadQuantity:
        """Return the quantity that `METRIC[.COLUMN]` names; by default the one that the metric's figure shows.

        Raises:
            InputError: with close matches, for a metric or column that has no value per layer and head.
        """
        metric_name, _, column = target.partition(".")
        by_head = {name: _head_columns(metric) for name, metric in metrics.items()}
        if metric_name not in by_head:
            raise InputError(
                f"--heatmap {target}: {metric_name!r} is not in this run; {close_matches(metric_name, by_head)}"
            )
        columns = by_head[metric_name]
        if not columns:
            usable = [name for name, candidates in by_head.items() if candidates]
            hint = f"; {', '.join(usable)} can be drawn" if usable else ""
            raise InputError(f"--heatmap {target}: {metric_name} has no value for each layer and head{hint}")
        display = metrics[metric_name].display
        default = (
            display.by_head if display is not None and display.by_head in columns else next(iter(columns))
        )
        chosen = column or default
        if chosen not in columns:
            raise InputError(
                f"--heatmap {target}: {metric_name} has no column {chosen!r} by head; {close_matches(chosen, columns)}"
            )
        table = columns[chosen]
        spec = table.columns[table.index(chosen)]
        return cls(metric_name, table.name, chosen, spec.unit, spec.help)


def _head_columns(metric: type[Metric[Any]]) -> dict[str, TableSpec]:
    """Return the columns of numbers of the tables whose rows are layers and heads, each with its table."""
    tables = [
        table
        for table in metric.tables
        if (names := {column.name for column in table.columns}) >= _AXES
        and "text" not in names
        and not any(column.type is str for column in table.columns)
    ]
    return {
        column.name: table
        for table in reversed(tables)
        for column in table.columns
        if column.type is float and column.name not in ("ci_low", "ci_high")
    }


def print_heatmaps(run: Run, quantity: HeadQuantity, output: Console) -> None:
    """Print one heatmap per model, all on one colour scale; heads without a value are dots."""
    import numpy as np

    grids = dict(_grids(run, quantity))
    sizes = [np.abs(grid.effects.compressed()).max(initial=0.0) for grid in grids.values()]
    largest = float(max(sizes, default=0.0))
    signed = any((grid.effects.compressed() < 0).any() for grid in grids.values())
    unit = f", {quantity.unit}" if quantity.unit else ""
    for label, grid in grids.items():
        output.print(Text(f"{quantity.metric}: {quantity.column} of {printable(label)}", style="bold"))
        output.print(Text(f"{quantity.meaning}{unit}", style="dim"))
        for line in grid_lines(grid, largest, output.width, signed=signed):
            output.print(line, no_wrap=True, crop=True)
        output.print(Text(""))


def _grids(run: Run, quantity: HeadQuantity) -> Iterator[tuple[str, EffectGrid]]:
    import numpy as np

    result = run.result(quantity.metric)
    for model in run.models:
        shape = (model.info.n_layers, model.info.n_heads)
        values = np.ma.masked_array(np.zeros(shape), mask=np.ones(shape, dtype=bool))
        for record in model_records(result, quantity.table, model.info.label):
            layer, head, value = record["layer"], record["head"], record[quantity.column]
            if isinstance(layer, int) and isinstance(head, int) and isinstance(value, int | float):
                values[layer, head] = value
        rows, columns = (list(map(str, range(size))) for size in values.shape)
        yield model.info.label, EffectGrid(values, rows, columns, "layer", "head")
