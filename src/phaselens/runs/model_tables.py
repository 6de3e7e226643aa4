"""The tables and warnings of metrics that have measured one model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from phaselens.plugin import Metric, MetricWarning, Table
from phaselens.plugin.return_checks import tables_of, warnings_of
from phaselens.runs.active_metrics import guarded
from phaselens.runs.result import MetricResult


def tables_of_metrics(
    metrics: Mapping[str, Metric[Any]],
    results: Mapping[str, MetricResult],
    without_values: Collection[str] = (),
) -> tuple[dict[str, Mapping[str, Table]], list[MetricWarning]]:
    """Return the metrics' tables by metric, and their warnings; record the failure of one that cannot make them.

    The tables of the metrics in `without_values`, whose hook points the model lacks, are empty.
    """
    tables: dict[str, Mapping[str, Table]] = {}
    warnings: list[MetricWarning] = []
    for name, metric in metrics.items():
        label = metric.model.label
        with guarded(results[name], label, "compute"):
            empty = {spec.name: spec.build([]) for spec in metric.tables}
            tables[name] = empty if name in without_values else tables_of(metric)
            for message in _non_finite_warnings(tables[name]):
                metric.warn(message)
        with guarded(results[name], label, "warn"):
            warnings.extend(warning.prefixed(f"{name}: {label}") for warning in warnings_of(metric))
    return tables, warnings


def _non_finite_warnings(tables: Mapping[str, Table]) -> list[str]:
    return [
        f"table {name}, column {column}: {count} values were NaN or infinite, shown as missing"
        for name, table in tables.items()
        for column, count in table.not_finite.items()
    ]
