"""Display tables of a run that is grouped by label: the labels side by side, one table per model."""

from __future__ import annotations

from phaselens.report.builders import model_labels, model_records
from phaselens.report.numbers import NumberFormat
from phaselens.report.strings import printable
from phaselens.report.table import DisplayCell, DisplayColumn, DisplayRow, DisplayTable
from phaselens.runs import BY_LABEL, MetricResult, Run
from phaselens.runs.paired_values import displayed_value

_NUMBERS = NumberFormat("compact", 4, 0.0)
_COLUMNS = (
    DisplayColumn("mean", "mean", _NUMBERS, low="ci_low", high="ci_high", is_main=True),
    DisplayColumn("n_texts", "texts"),
)


def label_name(label: object) -> str:
    """Return a label for display; texts without one have a name too."""
    return "without a label" if label is None else printable(str(label))


def label_tables(run: Run, name: str, result: MetricResult) -> list[DisplayTable]:
    """Return a table per model of the displayed value by layer or condition; none for a run that is not grouped."""
    if BY_LABEL not in result.tables:
        return []
    values = list(dict.fromkeys(map(str, result.tables[BY_LABEL].column("value"))))
    value = displayed_value(result, values)
    return [_model_table(result, name, value, label) for label in model_labels(run)]


def _model_table(result: MetricResult, metric: str, value: str, model: str) -> DisplayTable:
    records = [record for record in model_records(result, BY_LABEL, model) if record["value"] == value]
    labels = list(dict.fromkeys(record["label"] for record in records))
    cells: dict[tuple[object, ...], dict[object, list[DisplayCell]]] = {}
    for record in records:
        key = (record["condition"], record["group"], record["layer"])
        cells.setdefault(key, {})[record["label"]] = [column.cell(record) for column in _COLUMNS]
    rows = [
        DisplayRow(row_name(*key), [by_label.get(label) for label in labels])
        for key, by_label in cells.items()
    ]
    has_conditions = any(record["condition"] is not None for record in records)
    unit = next((record["unit"] for record in records), None)
    return DisplayTable(
        _COLUMNS,
        rows,
        "conditions" if has_conditions else "layers",
        [label_name(label) for label in labels],
        "condition" if has_conditions else "layer",
        caption=printable(
            f"{metric} by label, {model}: {value}{f', {unit}' if unit else ''}; mean over the label's texts"
        ),
    )


def row_name(condition: object, group: object, layer: object) -> str:
    """Return the condition, the group and the layer of a row, as far as it has them."""
    parts = [printable(str(part)) for part in (condition, group) if part is not None]
    if layer is not None:
        parts.append(f"L{layer}" if parts else str(layer))
    return " ".join(parts) or "all"
