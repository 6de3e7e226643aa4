"""Runs made by hand, to look at how they are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from phaselens.runs import Failure, MetricResult, ModelRecord, Run, TextRecord
from phaselens_plugins.sinks import Sinks
from tests.toys import toy_info

Row = tuple[float | None, float | None, float | None, float | None]
ROWS: tuple[Row, ...] = ((0.1, 0.05, 0.2, 0.02), (0.625, 0.5, 0.75, 0.02), (None, None, None, None))


def made_run(*labels: str, rows: tuple[Row, ...] = ROWS, failed: bool = False, **info: Any) -> Run:
    """A run of `sinks`: for each model, layers with (rate, low, high, null)."""
    result = MetricResult(Sinks, Sinks.Params(), "phaselens 1")
    models = []
    for label in labels or ("rope", "drope"):
        facts = replace(toy_info(n_layers=len(rows), label=label), positions=("rope",) * len(rows), **info)
        models.append(ModelRecord(facts, "auto", 0, True, 20_480))
        if not failed:
            layers = Sinks.table("layers", [(layer, *row, 0.25) for layer, row in enumerate(rows)])
            result.add(label, "layers", layers, {})
            result.add(label, "summary", Sinks.table("summary", [(0.543, 0.4123, 60)]), {})
    if failed:
        result.failures.append(
            Failure(models[0].info.label, "update", "ValueError", "no [bold]way[/]", "trace")
        )
    texts = [TextRecord("t0", "00", dict.fromkeys(labels or ("rope",), 4))]
    options = {"seed": 0}
    return Run(models, texts, {"sinks": result}, ["drope: a warning"], options, {"phaselens": "1"})
