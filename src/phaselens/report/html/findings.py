"""The few findings that stand out in a run, chosen by rules that know no metric.

Candidates are differences between two models whose paired interval excludes 0, values by layer whose interval excludes
their null, and conditions whose effect differs from those of their controls. They are ranked by their relative size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phaselens.report.builders import layer_table
from phaselens.report.condition_tables import condition_table, conditions_by_control
from phaselens.report.numbers import NumberFormat
from phaselens.report.strings import heading, printable
from phaselens.report.table import DisplayCell, DisplayRow, DisplayTable, Record
from phaselens.runs import Comparison, Run

_MAX_FINDINGS = 4
_MAX_OF_A_KIND = 2
#: Differences of at least this many standard deviations over texts count fully.
_STEADY = 2.0
_EXACT = NumberFormat("compact", 3)


@dataclass(frozen=True)
class StandOut:
    """A sentence about one metric. `size` is between 0 and 1 and ranks findings of different units."""

    metric: str
    title: str
    kind: str
    text: str
    size: float


def find(run: Run, comparisons: Sequence[Comparison]) -> list[StandOut]:
    """Return up to four findings, the largest first; no two of one metric unless there is no other."""
    candidates = [
        *(finding for comparison in comparisons for finding in _differences(run, comparison)),
        *_above_null(run),
        *_effects(run),
    ]
    candidates.sort(key=lambda finding: -finding.size)
    chosen: list[StandOut] = []
    for may_repeat in (False, True):
        for finding in candidates:
            kinds = [other.kind for other in chosen]
            metrics = [other.metric for other in chosen]
            if finding in chosen or len(chosen) == _MAX_FINDINGS:
                continue
            if may_repeat or (finding.metric not in metrics and kinds.count(finding.kind) < _MAX_OF_A_KIND):
                chosen.append(finding)
    return chosen


def _differences(run: Run, comparison: Comparison) -> Iterator[StandOut]:
    """Yield the largest difference of each metric's compared column, of those whose interval excludes 0."""
    records = comparison.differences.records()
    controls = {name: set(conditions_by_control(result)) for name, result in run.metrics.items()}
    for metric, column in comparison.displayed.items():
        candidates = [
            record
            for record in records
            if record["metric"] == metric
            and record["value"] == column
            and record["excludes_zero"] == 1
            and record["condition"] not in controls.get(metric, set())
        ]
        if not candidates or metric not in run.metrics:
            continue
        record = max(candidates, key=_relative_difference)
        first, second = printable(comparison.first), printable(comparison.second)
        unit = f" ({record['unit']})" if record["unit"] and record["unit"] != column else ""
        where = _site(record)
        yield StandOut(
            metric,
            _title(run, metric),
            "difference",
            f"{heading(column)}{unit}{where}: {_EXACT.write(record['second'])} in {second}, "
            f"{_EXACT.write(record['first'])} in {first}. Difference {_EXACT.write(record['difference'])}, "
            f"95 % interval {_EXACT.write(record['ci_low'])} to {_EXACT.write(record['ci_high'])}, paired over "
            f"{record['n_texts']} texts.",
            _relative_difference(record),
        )


def _relative_difference(record: Record) -> float:
    """Return the relative size of a difference, less where texts disagree on it."""
    d_z = record["d_z"]
    steadiness = min(1.0, abs(d_z) / _STEADY) if isinstance(d_z, float) else 1.0
    return _contrast(record["second"], record["first"]) * steadiness


def _contrast(value: object, reference: object) -> float:
    """Return the difference of two numbers over the sum of their sizes, from 0 to 1."""
    if not isinstance(value, int | float) or not isinstance(reference, int | float):
        return 0.0
    total = abs(value) + abs(reference)
    return abs(value - reference) / total if total else 0.0


def _site(record: Record) -> str:
    parts = []
    for column in ("condition", "group"):
        if record[column] is not None:
            parts.append(f" {'under' if column == 'condition' else 'of'} {printable(str(record[column]))}")
    if record["layer"] is not None:
        parts.append(f" in layer {record['layer']}")
    return "".join(parts)


def _title(run: Run, metric: str) -> str:
    return printable(run.metrics[metric].metric.title or metric)


def _above_null(run: Run) -> Iterator[StandOut]:
    """Yield, for each metric with nulls, the value that is farthest from its null, if its interval excludes it."""
    for name, result in run.metrics.items():
        display = result.metric.display
        if (
            display is None
            or display.rows != "layer"
            or display.null is None
            or display.table not in result.tables
        ):
            continue
        table = layer_table(run, result, display)
        cells = [
            (_contrast(cell.value, cell.null), label, row.name, cell)
            for label, row, cell in _main_cells(table)
            if _excludes(cell, cell.null)
        ]
        if not cells:
            continue
        size, label, layer, cell = max(cells, key=lambda candidate: candidate[0])
        column = table.columns[0]
        value, interval, null = (printed.text for printed in column.printed(cell))
        yield StandOut(
            name,
            _title(run, name),
            "null",
            f"{printable(column.title)} in layer {layer} of {printable(label)}: {value.removeprefix('● ')}, "
            f"95 % interval {interval}; null {null}.",
            # A difference between models says more than the distance of one model from its null.
            0.5 * size,
        )


def _main_cells(table: DisplayTable) -> Iterator[tuple[str, DisplayRow, DisplayCell]]:
    index = next(index for index, column in enumerate(table.columns) if column.is_main)
    for row in table.rows:
        for label, cells in zip(table.models or ("",), row.cells, strict=True):
            if cells is not None:
                yield label, row, cells[index]


def _excludes(cell: DisplayCell, reference: object) -> bool:
    """Return whether the cell's interval exists and excludes a number."""
    low, high = cell.low, cell.high
    if not (
        isinstance(low, int | float) and isinstance(high, int | float) and isinstance(reference, int | float)
    ):
        return False
    return not low <= reference <= high


def _effects(run: Run) -> Iterator[StandOut]:
    """Yield the largest effect of each metric's marked conditions."""
    for name, result in run.metrics.items():
        display = result.metric.display
        if display is None or display.rows != "condition" or display.table not in result.tables:
            continue
        table = condition_table(run, result, display)
        main = next(column for column in table.columns if column.is_main)
        reference = main.number_format.reference
        if reference is None:
            continue
        cells = [
            (_contrast(cell.value, reference) if reference else _bounded(cell.value), label, row, cell)
            for label, row, cell in _main_cells(table)
            if cell.is_marked and _excludes(cell, reference)
        ]
        if not cells:
            continue
        size, label, row, cell = max(cells, key=lambda candidate: candidate[0])
        texts = [printed.text for printed in main.printed(cell)]
        yield StandOut(
            name,
            _title(run, name),
            "effect",
            f"{printable(row.name)}{_layer_of(table, row, label)}: {printable(main.title)} "
            f"{texts[0].removeprefix('● ')} in {printable(label)}, 95 % interval {texts[1]}; beyond its controls.",
            size,
        )


def _bounded(value: object) -> float:
    size = abs(value) if isinstance(value, int | float) else 0.0
    return size / (1 + size)


def _layer_of(table: DisplayTable, row: DisplayRow, label: str) -> str:
    cells = row.cells[table.models.index(label)] or ()
    for column, cell in zip(table.columns, cells, strict=False):
        if column.name == "layer" and cell.value is not None:
            return f" at layer {cell.value}"
    return ""
