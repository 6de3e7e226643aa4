"""Runs made by hand, their output in each format, and a stream that is a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from phaselens.report.formats import FORMATS, RunFormat, TableFormat
from phaselens.report.table_names import default_table, find_table
from phaselens.runs import Failure, MetricResult, ModelRecord, Run, TextRecord
from phaselens_plugins.sinks import Sinks
from tests.toys import toy_info

Row = tuple[float | None, float | None, float | None, float | None]
ROWS: tuple[Row, ...] = ((0.1, 0.05, 0.2, 0.02), (0.625, 0.5, 0.75, 0.02), (None, None, None, None))


class TerminalStream(io.StringIO):
    """A stream in memory that reports being a terminal."""

    def isatty(self) -> bool:
        return True


def made_run(*labels: str, rows: tuple[Row, ...] = ROWS, failed: bool = False, **info: Any) -> Run:
    """Return a run of `sinks`: for each model, layers with (rate, low, high, null)."""
    result = MetricResult(Sinks, Sinks.Params(), "phaselens 1")
    models = []
    for label in labels or ("rope", "drope"):
        facts = replace(toy_info(n_layers=len(rows), label=label), positions=("rope",) * len(rows), **info)
        models.append(ModelRecord(facts, "auto", 0, True, 20_480))
        if not failed:
            layers = Sinks.table("layers", [(layer, *row, 0.25, 0.0) for layer, row in enumerate(rows)])
            result.add(label, "layers", layers, {})
            result.add(label, "summary", Sinks.table("summary", [(0.543, 0.4123, 0.0, 60)]), {})
    if failed:
        result.failures.append(
            Failure(models[0].info.label, "update", "ValueError", "no [bold]way[/]", "trace")
        )
    texts = [TextRecord("t0", "00", dict.fromkeys(labels or ("rope",), 4))]
    options = {"seed": 0}
    return Run(models, texts, {"sinks": result}, ["drope: a warning"], options, {"phaselens": "1"})


def written(run: Run, format_name: str) -> str:
    """Write the whole run in a format of the registry."""
    output_format, file = FORMATS[format_name](), io.StringIO()
    assert isinstance(output_format, RunFormat)
    output_format.write_run(run, file)
    return file.getvalue()


def written_table(run: Run, format_name: str, name: str | None = None) -> str:
    """Write a result table of the run, or the default table."""
    declared = {metric: list(result.tables) for metric, result in run.metrics.items()}
    default = default_table(result.metric for result in run.metrics.values())
    metric, table = find_table(declared, name or default)
    output_format, file = FORMATS[format_name](), io.StringIO()
    assert isinstance(output_format, TableFormat)
    output_format.write_table(f"{metric}.{table}", run.rows(metric, table), file)
    return file.getvalue()
