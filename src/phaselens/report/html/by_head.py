"""Values by layer and head for heatmaps: any column of any table with one row per layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.plugin import CellValue, Column, TableSpec
from phaselens.report.builders import model_records
from phaselens.runs import MetricResult, Run

if TYPE_CHECKING:
    from phaselens.report.html.payload import Budget

_AXES = {"layer", "head"}
_ENDS = ("ci_low", "ci_high")


def head_data(
    run: Run, metrics: Mapping[str, MetricResult], budget: Budget
) -> dict[str, list[dict[str, Any]]]:
    """Return the quantities by head of each metric; those that the metrics' displays name take their share first."""
    candidates = [
        (name, quantity, position)
        for name, result in metrics.items()
        for position, quantity in enumerate(_quantities(result))
    ]
    chosen: dict[str, list[dict[str, Any]]] = {}
    for name, (table, column, null), _ in sorted(candidates, key=lambda entry: entry[2]):
        entry = _encoded(run, metrics[name], table, column, null)
        if entry is not None and budget.takes(f"{name}.{column.name} by head", entry):
            chosen.setdefault(name, []).append(entry)
    return chosen


def _quantities(result: MetricResult) -> list[tuple[str, Column, str | None]]:
    """Return (table, column, its null's column) of each quantity by head, the one that the display names first."""
    quantities = []
    for table in result.metric.tables:
        names = [column.name for column in table.columns]
        if (
            table.name not in result.tables
            or not set(names) >= _AXES
            or any(column.type is str for column in table.columns)
        ):
            continue
        nulls = {column.name: _null_of(column, table) for column in table.columns}
        quantities += [
            (table.name, column, nulls[column.name])
            for column in table.columns
            if column.type is float and not is_companion(column.name)
        ]
    display = result.metric.display
    by_head = display.by_head if display is not None else None
    return sorted(quantities, key=lambda quantity: quantity[1].name != by_head)


def is_companion(name: str) -> bool:
    """Return whether a column is the null or an end of the interval of another one.

    >>> is_companion("score"), is_companion("score_null"), is_companion("ci_low")
    (False, True, True)
    """
    return (
        name in _ENDS
        or name == "null"
        or name.startswith("null_")
        or name.endswith(("_null", "_low", "_high"))
    )


def _null_of(column: Column, table: TableSpec) -> str | None:
    """Return the column with a column's null: `NAME_null`, `null_NAME`, or `null` after the value it belongs to."""
    names = [candidate.name for candidate in table.columns]
    for name in (f"{column.name}_null", f"null_{column.name}"):
        if name in names:
            return name
    if "null" not in names:
        return None
    before = table.columns[: names.index("null")]
    values = [c.name for c in before if c.type is float and not is_companion(c.name)]
    return "null" if values and values[-1] == column.name else None


def _encoded(
    run: Run, result: MetricResult, table: str, column: Column, null: str | None
) -> dict[str, Any] | None:
    """Return one quantity: per model its values and nulls, row by row.

    None where no head has a value, or where a head has several (the table distinguishes something else too).
    """
    models = []
    is_empty = True
    for model in run.models:
        n_layers, n_heads = model.info.n_layers, model.info.n_heads
        grids: list[list[CellValue]] = [[None] * (n_layers * n_heads) for _ in range(2)]
        cells: set[tuple[int, int]] = set()
        for record in model_records(result, table, model.info.label):
            layer, head = record["layer"], record["head"]
            if isinstance(layer, int) and isinstance(head, int) and layer < n_layers and head < n_heads:
                if (layer, head) in cells:
                    return None
                cells.add((layer, head))
                grids[0][layer * n_heads + head] = _short(record[column.name])
                grids[1][layer * n_heads + head] = _short(record[null]) if null else None
        is_empty &= all(value is None for value in grids[0])
        models.append({"values": grids[0], "null": _compact(grids[1])})
    if is_empty:
        return None
    return {"table": table, "column": column.name, "unit": column.unit, "help": column.help, "models": models}


def _short(value: CellValue) -> CellValue:
    return float(f"{value:.3g}") if isinstance(value, int | float) else None


def _compact(nulls: Sequence[CellValue]) -> CellValue | list[CellValue]:
    """Return one number for nulls that are all the same."""
    return nulls[0] if nulls and all(value == nulls[0] for value in nulls) else list(nulls)
