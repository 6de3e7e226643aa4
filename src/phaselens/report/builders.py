"""Display tables from a metric's result: one row per layer, one row per model, or the records of a result table.

`phaselens.report.condition_tables` builds the tables with one row per condition.
"""

from __future__ import annotations

from collections.abc import Mapping

from phaselens.plugin import CellValue, Column, Display, Table
from phaselens.report.numbers import NumberFormat, condition_format, layer_format
from phaselens.report.table import DisplayCell, DisplayColumn, DisplayRow, DisplayTable, Record, mark_notes
from phaselens.runs import MetricResult, Run


def model_labels(run: Run) -> list[str]:
    """Return the labels of the run's models."""
    return [model.info.label for model in run.models]


def model_records(result: MetricResult, table: str, label: str) -> list[Record]:
    """Return one model's rows of a result table; none where the table is missing."""
    if table not in result.tables:
        return []
    return [record for record in result.tables[table].records() if record["model"] == label]


def column_specs(result: MetricResult, table: str) -> dict[str, Column]:
    """Return the columns of a result table by name; none where the table is missing."""
    if table not in result.tables:
        return {}
    return {column.name: column for column in result.tables[table].spec.columns}


def main_column(display: Display, spec: Column | None, number_format: NumberFormat) -> DisplayColumn:
    """Return the column of the display's value, with its interval and its null."""
    return DisplayColumn(
        display.value,
        display.title,
        number_format,
        spec.unit if spec is not None else None,
        low=display.low,
        high=display.high,
        null=display.null,
        is_main=True,
    )


#: What a column of adjusted p-values means.
ADJUSTED = "p: adjusted for the number of rows (Holm)"


def legend(display: Display, specs: Mapping[str, Column]) -> str:
    """Return what the display's interval and null mean, from the help texts of their columns; empty without either."""
    meanings = []
    if display.low and display.low in specs:
        meaning = specs[display.low].help.partition(":")[0].replace("95 % interval, ", "")
        meanings.append(f"95 % interval: {meaning}")
    if display.null and display.null in specs and specs[display.null].help:
        meanings.append(f"null: {specs[display.null].help}")
    if any(name == "p_holm" for name, _ in display.also):
        meanings.append(ADJUSTED)
    return "; ".join(meanings)


def reaches_mark(record: Record, display: Display) -> bool:
    """Return whether a value is at least the display's `strong`, and above its null."""
    value, null = record[display.value], record[display.null] if display.null else None
    if not isinstance(value, int | float) or display.strong is None or value < display.strong:
        return False
    return not isinstance(null, int | float) or value > null


def layer_table(run: Run, result: MetricResult, display: Display) -> DisplayTable:
    """Return the table that `display` describes, with one row per layer."""
    number_format = layer_format(display)
    columns = (
        main_column(display, column_specs(result, display.table).get(display.value), number_format),
        *(DisplayColumn(name, title, number_format) for name, title in display.also),
    )
    labels = model_labels(run)
    cells: dict[tuple[str, int], list[DisplayCell]] = {}
    for label in labels:
        for record in model_records(result, display.table, label):
            is_marked = reaches_mark(record, display)
            cells[label, _layer(record)] = [column.cell(record, is_marked=is_marked) for column in columns]
    rows = [
        DisplayRow(str(layer), [cells.get((label, layer)) for label in labels], layer=layer)
        for layer in sorted({layer for _, layer in cells})
    ]
    notes = mark_notes(rows, display.strong_means)
    caption = legend(display, column_specs(result, display.table))
    return DisplayTable(columns, rows, "layers", labels, "layer", caption=caption, notes=notes)


def _layer(record: Record) -> int:
    layer = record["layer"]
    if not isinstance(layer, int):
        raise TypeError(f"expected column `layer` as whole numbers for a display, received {layer!r}")
    return layer


def model_table(run: Run, result: MetricResult, display: Display) -> DisplayTable:
    """Return one row per model: the display's summary, numbers of texts and tokens, positions and dtype."""
    by_condition = display.rows == "condition"
    counts_predicted = by_condition and "conditions" in result.tables
    specs = column_specs(result, "summary")
    columns = []
    for name, title in display.summary:
        number_format = NumberFormat(
            "percent" if display.percent and name == display.value else "decimal", display.digits
        )
        if by_condition and name in specs:
            number_format = condition_format(specs[name], display)
        columns.append(DisplayColumn(name, title, number_format))
    columns += [
        DisplayColumn("n_texts", "texts"),
        DisplayColumn("n_tokens", "predicted tokens" if counts_predicted else "tokens"),
        DisplayColumn("positions", "positions", align="left"),
        DisplayColumn("dtype", "dtype", align="left"),
    ]
    rows = []
    for model in run.models:
        label = model.info.label
        averages = next(iter(model_records(result, "summary", label)), {})
        values: dict[str, CellValue] = {name: averages.get(name) for name, _ in display.summary}
        if counts_predicted:
            baseline = next(iter(model_records(result, "conditions", label)), {})
            values |= {"n_texts": baseline.get("n_texts"), "n_tokens": baseline.get("n_predicted")}
        else:
            values |= {"n_texts": averages.get("n_texts", len(run.texts)), "n_tokens": model.n_tokens}
        values |= {"positions": model.info.positions_summary, "dtype": model.info.dtype}
        rows.append(DisplayRow(label, [[column.cell(values) for column in columns]]))
    return DisplayTable(columns, rows, "models", row_title="model")


def result_table(name: str, table: Table) -> DisplayTable:
    """Return a table with all records of a result table."""
    columns = [
        DisplayColumn(
            column.name, column.name, NumberFormat(digits=4), column.unit, align="right" if index else "left"
        )
        for index, column in enumerate(table.spec.columns)
    ]
    rows = [DisplayRow("", [[DisplayCell(value) for value in row]]) for row in table.rows]
    return DisplayTable(columns, rows, "records", name=name)
