"""Display tables with one row per condition, controls beneath their condition, and a mark at effects beyond controls.

They rely on the tables that every causal metric has (`CAUSAL_TABLES`): the columns of `conditions`, and `contrasts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from phaselens.plugin import BASELINE, CellValue, Display
from phaselens.report.builders import (
    ADJUSTED,
    column_specs,
    legend,
    main_column,
    model_labels,
    model_records,
    reaches_mark,
)
from phaselens.report.numbers import DECIMAL, NumberFormat, condition_format, shortest
from phaselens.report.table import (
    HEAD_COLUMN,
    LAYER_COLUMN,
    DisplayCell,
    DisplayColumn,
    DisplayRow,
    DisplayTable,
    Record,
    mark_notes,
)
from phaselens.runs import MetricResult, Run
from phaselens.uncertainty import adjust_p_values

RowKey: TypeAlias = tuple[str, int]
"""A row's name, and the number of rows of that name above it in its model."""

#: The joint significance level of all differences from controls in one model.
LEVEL = 0.05
BEYOND_CONTROLS = (
    "the ratio's interval excludes 1, and the difference from each of its controls lies on the same side, with "
    f"p ≤ {shortest(LEVEL)}, adjusted for the number of differences"
)
CONTRASTS_CAPTION = (
    "condition − control, text by text; repeats of a control are averaged first; 95 % interval: paired percentile "
    f"bootstrap over texts; {ADJUSTED}"
)

_PUNCTUATION = " :,;–—-()"
_NATS = NumberFormat("compact", reference=0.0)
_CONTRAST_COLUMNS = (
    DisplayColumn("delta_nats", "Δ nats", _NATS, "nats/token", low="ci_low", high="ci_high"),
    DisplayColumn("p_holm", "p", NumberFormat("p_value"), "probability"),
    DisplayColumn("d_z", "d_z", NumberFormat("compact", digits=2), "sd"),
    DisplayColumn("n_seeds", "seeds", NumberFormat("compact"), "seeds"),
)
_REQUIRED_OF_CONTRASTS = {
    "condition", "control", "layer", "delta_nats", "ci_low", "ci_high", "p_holm", "d_z", "n_seeds",
}  # fmt: skip


def condition_table(run: Run, result: MetricResult, display: Display) -> DisplayTable:
    """Return the table that `display` describes, with one row per condition."""
    labels = model_labels(run)
    records = {label: adjusted_records(model_records(result, display.table, label)) for label in labels}
    contrasts = {label: adjusted_records(model_records(result, "contrasts", label)) for label in labels}
    columns = with_layer_column(condition_columns(result, display), records)
    rows = aligned_rows(
        records,
        recorded_condition,
        columns,
        lambda label, record: reaches_mark(record, display) or beyond_controls(record, contrasts[label]),
    )
    notes = mark_notes(rows, display.strong_means or BEYOND_CONTROLS)
    return DisplayTable(
        columns,
        name_rows(rows, conditions_by_control(result)),
        "conditions",
        labels,
        display.row_title or "condition",
        caption=legend(display, column_specs(result, display.table)),
        notes=notes,
    )


def condition_columns(result: MetricResult, display: Display) -> list[DisplayColumn]:
    """Return the columns that a display of conditions names."""
    specs = column_specs(result, display.table)
    formats = {name: condition_format(spec, display) for name, spec in specs.items()}

    formats.setdefault("p_holm", NumberFormat("p_value"))

    def columns(pairs: Iterable[tuple[str, str]]) -> list[DisplayColumn]:
        return [DisplayColumn(name, title, formats.get(name, DECIMAL)) for name, title in pairs]

    main = main_column(display, specs.get(display.value), formats.get(display.value, DECIMAL))
    return [*columns(display.before), main, *columns(display.also)]


def adjusted_records(records: Sequence[Record]) -> Sequence[Record]:
    """Return one model's rows with `p_holm`, which runs stored by earlier versions lack."""
    if not records or "p_holm" in records[0] or "p_value" not in records[0]:
        return records
    p_values = [p if isinstance(p := record["p_value"], float) else None for record in records]
    return [
        {**record, "p_holm": p_holm}
        for record, p_holm in zip(records, adjust_p_values(p_values), strict=True)
    ]


def contrast_table(run: Run, result: MetricResult) -> DisplayTable | None:
    """Return the table of differences between conditions and controls; None if no condition has a control."""
    labels = model_labels(run)
    records = {label: adjusted_records(model_records(result, "contrasts", label)) for label in labels}
    sample = next((record for label in labels for record in records[label]), None)
    if sample is None or not _REQUIRED_OF_CONTRASTS.issubset(sample):
        return None
    columns = with_layer_column(_CONTRAST_COLUMNS, records)
    rows = aligned_rows(records, _contrast_name, columns)
    return DisplayTable(
        columns, name_rows(rows, {}), "conditions", labels, "difference", caption=CONTRASTS_CAPTION
    )


def with_layer_column(
    columns: Sequence[DisplayColumn], records: Mapping[str, Sequence[Record]]
) -> list[DisplayColumn]:
    """Return `columns`, preceded by the layer and the head, each if a row of any model has one."""
    site_columns = [
        column
        for column in (LAYER_COLUMN, HEAD_COLUMN)
        if any(record.get(column.name) is not None for rows in records.values() for record in rows)
    ]
    return [*site_columns, *columns]


def aligned_rows(
    records: Mapping[str, Sequence[Record]],
    row_name: Callable[[Record], str],
    columns: Sequence[DisplayColumn],
    is_marked: Callable[[str, Record], bool] = lambda label, record: False,
) -> list[DisplayRow]:
    """Return the rows of all models, merged where name and occurrence are equal."""
    cells: dict[tuple[str, RowKey], list[DisplayCell]] = {}
    for label, model_rows in records.items():
        keys = occurrences(map(row_name, model_rows))
        for key, record in zip(keys, model_rows, strict=True):
            marked = is_marked(label, record)
            cells[label, key] = [column.cell(record, is_marked=marked) for column in columns]
    return [
        DisplayRow(key[0], [cells.get((label, key)) for label in records], occurrence=key[1])
        for key in aligned([map(row_name, model_rows) for model_rows in records.values()])
    ]


def aligned(models: Sequence[Iterable[str]]) -> list[RowKey]:
    """Merge the models' row names into one list, in which the n-th occurrence of a name is one row for all models.

    A row that only some models have comes after the row that precedes it in those models; the baseline comes first.

    >>> aligned([["baseline", "a", "b"], ["baseline", "a", "a", "b"]])
    [('baseline', 0), ('a', 0), ('a', 1), ('b', 0)]
    """
    merged: list[RowKey] = []
    for names in models:
        next_index = 0
        for key in occurrences(names):
            if key not in merged:
                merged.insert(next_index, key)
            next_index = merged.index(key) + 1
    return sorted(merged, key=lambda key: key[0] != BASELINE.name)


def occurrences(names: Iterable[str]) -> list[RowKey]:
    """Return each name with the number of its earlier occurrences."""
    counts: dict[str, int] = {}
    keys = []
    for name in names:
        keys.append((name, counts.get(name, 0)))
        counts[name] = counts.get(name, 0) + 1
    return keys


def text_cell(record: Record, column: str) -> str:
    """Return the text in a column of the record."""
    value = record[column]
    if not isinstance(value, str):
        raise TypeError(f"expected column `{column}` as text for a display, received {value!r}")
    return value


def recorded_condition(record: Record) -> str:
    """Return the condition of a row."""
    return text_cell(record, "condition")


def _contrast_name(record: Record) -> str:
    condition_name, control_name = recorded_condition(record), text_cell(record, "control")
    return f"{condition_name} − {control_name_beside(control_name, condition_name)}"


def control_name_beside(control_name: str, condition_name: str) -> str:
    """Return a control's name without the part that repeats the condition's name beside it.

    >>> control_name_beside("other position: write layer", "write layer")
    'other position'
    >>> control_name_beside("top-1-random", "top-1")
    'random'
    >>> control_name_beside("bos-mlp: other position: write layer", "bos-mlp: write layer")
    'other position'
    """
    remainder = re.sub(rf"(?<!\w){re.escape(condition_name)}(?!\w)", "", control_name)
    if remainder == control_name:
        control_words, condition_words = control_name.split(), condition_name.split()
        start = _n_shared(control_words, condition_words)
        end = _n_shared(control_words[start:][::-1], condition_words[start:][::-1])
        remainder = " ".join(control_words[start : len(control_words) - end])
    return remainder.strip(_PUNCTUATION) or control_name


def _n_shared(words: Sequence[str], other_words: Sequence[str]) -> int:
    """Return the number of words that both lists begin with."""
    pairs = enumerate(zip(words, other_words, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(words), len(other_words)))


def conditions_by_control(result: MetricResult) -> dict[str, str]:
    """Return the condition of each control, by the control's name."""
    if "contrasts" not in result.tables:
        return {}
    records = result.tables["contrasts"].records()
    return {text_cell(record, "control"): recorded_condition(record) for record in records}


def name_rows(rows: Sequence[DisplayRow], controls: Mapping[str, str]) -> list[DisplayRow]:
    """Shorten the rows' names: indent a control right beneath its condition, leave out a repeated name."""
    named: list[DisplayRow] = []
    previous: RowKey | None = None
    for row in rows:
        condition_name = controls.get(row.name)
        if condition_name is not None and previous == (condition_name, row.occurrence):
            is_only_control = list(controls.values()).count(condition_name) == 1
            is_repeated = row.occurrence > 0 and is_only_control
            short_name = "" if is_repeated else control_name_beside(row.name, condition_name)
            named.append(replace(row, short_name=short_name, is_control=True, is_indented=True))
            continue
        short_name = "" if previous is not None and previous[0] == row.name else row.name
        named.append(replace(row, short_name=short_name, is_control=condition_name is not None))
        previous = row.name, row.occurrence
    return named


def beyond_controls(record: Record, contrasts: Sequence[Record]) -> bool:
    """Return whether a condition has an effect that differs from those of all its controls (see `BEYOND_CONTROLS`).

    `contrasts` are all differences from controls in the same model.
    """
    if not {"delta_nats", "delta_low", "delta_high"} <= record.keys():
        return False
    side = _side(record["delta_low"], record["delta_high"], 0.0, 0.0)
    contrast_sides = [
        _side(contrast["ci_low"], contrast["ci_high"], contrast["p_holm"], LEVEL)
        for contrast in contrasts
        if all(contrast.get(name) == record.get(name) for name in ("condition", "layer", "head"))
    ]
    return side != 0 and bool(contrast_sides) and all(contrast == side for contrast in contrast_sides)


def _side(low: CellValue, high: CellValue, p_value: CellValue, level: float) -> int:
    """Return 1 for an interval above 0, −1 for one below it; 0 if it contains 0 or is missing, or if p is too large."""
    if not (isinstance(low, float) and isinstance(high, float) and isinstance(p_value, float)):
        return 0
    if p_value > level or low <= 0 <= high:
        return 0
    return 1 if low > 0 else -1
