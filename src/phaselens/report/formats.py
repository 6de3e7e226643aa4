"""A run for machines and for pages: JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phaselens.errors import InputError, close_matches
from phaselens.plugin import Display, Metric
from phaselens.report import words
from phaselens.report.conditions import (
    BEYOND,
    DIFFERENCES,
    ConditionGrid,
    condition_grid,
    condition_lines,
    contrast_grid,
)
from phaselens.report.grid import MARK, bos_line, layer_grid, plain_rows
from phaselens.runs import MetricResult, Run

FORMATS = ("table", "json", "csv", "markdown")


def as_json(run: Run) -> str:
    """One strict JSON object: no NaN, no infinity, ASCII only."""
    return json.dumps(run.to_dict(), allow_nan=False)


def which_table(declared: Mapping[str, Sequence[str]], name: str) -> tuple[str, str]:
    """`NAME` or `METRIC.NAME` as (metric, table), of the tables that each metric declares.

    >>> which_table({"sinks": ["texts", "layers"]}, "layers")
    ('sinks', 'layers')
    """
    metric, dot, table = name.rpartition(".")
    if dot and metric not in declared:
        raise InputError(f"--table {name}: {metric!r} is not in this run; {close_matches(metric, declared)}")
    holders = [each for each, tables in declared.items() if table in tables and metric in ("", each)]
    if not holders:
        known = {each for tables in declared.values() for each in tables}
        raise InputError(f"no table {name!r}; {close_matches(table, known)}")
    if len(holders) > 1:
        raise InputError(
            f"{', '.join(holders)} each have a table {name!r}; write --table {holders[0]}.{name}"
        )
    return holders[0], table


def usual_table(metrics: Iterable[type[Metric[Any]]]) -> str:
    """The table that is meant where none is named: `layers`, or else the one that the first metric displays."""
    chosen = list(metrics)
    names = {spec.name for metric in chosen for spec in metric.tables}
    if "layers" in names or not chosen:
        return "layers"
    first = chosen[0]
    return first.display.table if first.display is not None else first.tables[0].name


def _find(run: Run, name: str) -> tuple[str, str]:
    return which_table({metric: list(result.tables) for metric, result in run.metrics.items()}, name)


def as_csv(run: Run, name: str | None = None) -> str:
    """One result table with a header line; what is missing is an empty field. None: see `usual_table`."""
    usual = usual_table(result.metric for result in run.metrics.values())
    table = run.rows(*_find(run, name or usual))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([column.name for column in table.spec.columns])
    writer.writerows(table.rows)
    return file.getvalue().rstrip("\n")


def as_markdown(run: Run, name: str | None = None) -> str:
    """The tables that a terminal shows, as GitHub reads them; or one whole result table."""
    if name is not None:
        return "\n".join(_markdown_table(*plain_rows(run, *_find(run, name))))
    lines: list[str] = []
    for metric, result in run.metrics.items():
        lines += [f"### {metric}: {_cell(result.metric.title or metric)}", "", _cell(result.definition), ""]
        lines += _markdown_metric(run, metric, result)
        lines += [f"failed: {_cell(str(failure))}" for failure in result.failures]
    if run.models:
        lines += [_cell(bos_line(run)), ""]
    lines += [f"- {_cell(warning)}" for warning in run.warnings]
    return "\n".join(lines).rstrip()


def _markdown_metric(run: Run, metric: str, result: MetricResult) -> list[str]:
    display = result.metric.display
    if display is None or not result.tables:
        lines = []
        for table in result.tables:
            lines += [f"`{metric}.{table}`", "", *_markdown_table(*plain_rows(run, metric, table)), ""]
        return lines
    if display.rows == "condition":
        return _markdown_conditions(run, result, display)
    grid = layer_grid(run, result, display)
    titles = ["layer", *(f"{label} {title}" for label in grid.models for title in grid.titles)]
    rows = []
    for layer, entries in zip(grid.layers, grid.entries, strict=True):
        row = [layer]
        for entry in entries:
            if entry is None:
                row += [words.MISSING] * len(grid.titles)
            else:
                value, *others = entry.cells
                row += [f"{MARK} {value}" if entry.strong else value, *others]
        rows.append(row)
    marks = [f"{MARK} {_cell(display.strong_means)}", ""] if grid.any_strong else []
    return [*_markdown_table(titles, rows), "", *marks, *_markdown_table(grid.line_titles, grid.lines), ""]


def _markdown_conditions(run: Run, result: MetricResult, display: Display) -> list[str]:
    grid, contrasts = condition_grid(run, result, display), contrast_grid(run, result)
    lines = [*_markdown_grid(grid), ""]
    if grid.any_strong:
        lines += [f"{MARK} {_cell(display.strong_means or BEYOND)}", ""]
    if contrasts is not None:
        lines += [_cell(DIFFERENCES), "", *_markdown_grid(contrasts), ""]
    return [*lines, *_markdown_table(*condition_lines(run, result, display)), ""]


def _markdown_grid(grid: ConditionGrid) -> list[str]:
    titles = [grid.stub, *(f"{label} {title}" for label in grid.models for title in grid.titles)]
    rows = [
        [row.name, *(cell for entry in entries for cell in grid.written(entry))]
        for row, entries in zip(grid.rows, grid.entries, strict=True)
    ]
    return _markdown_table(titles, rows)


def _markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    ruler = ["---", *(["---:"] * (len(titles) - 1))]
    return [
        _row(_cell(title) for title in titles),
        _row(ruler),
        *(_row(_cell(cell) for cell in row) for row in rows),
    ]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """`text` on one line, with what Markdown or HTML would take for its own spelled out."""
    text = words.plain(text).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for sign in "|*_`[]":
        text = text.replace(sign, "\\" + sign)
    return text
