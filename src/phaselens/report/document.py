"""A run as a document: a section with display tables for each metric, the BOS policy, the warnings.

The terminal and Markdown formats print it; they decide only layout and style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from phaselens.data import BOS_POLICIES
from phaselens.report.builders import layer_table, model_table, result_table
from phaselens.report.condition_tables import condition_table, contrast_table
from phaselens.report.label_tables import label_tables
from phaselens.report.strings import printable
from phaselens.report.table import DisplayTable
from phaselens.runs import BY_LABEL, MetricResult, Run


@dataclass(frozen=True)
class MetricSection:
    """One metric: its title, the definition under its parameters, its tables, and its failures."""

    name: str
    title: str
    definition: str
    tables: Sequence[DisplayTable]
    failures: Sequence[str]


@dataclass(frozen=True)
class RunDocument:
    """All metrics of a run. `bos` describes the BOS policy; empty if no model was measured."""

    sections: Sequence[MetricSection]
    bos: str
    warnings: Sequence[str]


def run_document(run: Run, *, main_tables_only: bool = False) -> RunDocument:
    """Build all tables of the metrics that printed runs show.

    `main_tables_only` shortens metrics without a display to their tables by layer and model.
    """
    sections = [
        MetricSection(
            name,
            result.metric.title or name,
            result.definition,
            _tables(run, name, result, main_tables_only),
            [str(failure) for failure in result.failures],
        )
        for name, result in printed_run(run).metrics.items()
    ]
    return RunDocument(sections, bos_line(run) if run.models else "", list(run.warnings))


def printed_run(run: Run) -> Run:
    """Return the run without the metrics that only supply details, unless they failed or there is no other metric."""
    metrics = {
        name: result for name, result in run.metrics.items() if result.metric.prints or result.failures
    }
    return replace(run, metrics=metrics) if any(result.metric.prints for result in metrics.values()) else run


def _tables(run: Run, name: str, result: MetricResult, main_tables_only: bool) -> list[DisplayTable]:
    if not result.tables:
        return []
    return [*_own_tables(run, name, result, main_tables_only), *label_tables(run, name, result)]


def _own_tables(run: Run, name: str, result: MetricResult, main_tables_only: bool) -> list[DisplayTable]:
    display = result.metric.display
    if display is None:
        tables = _main_tables(result) if main_tables_only else [t for t in result.tables if t != BY_LABEL]
        return [result_table(f"{name}.{table}", result.tables[table]) for table in tables]
    if display.rows == "layer":
        return [_captioned(layer_table(run, result, display), run), model_table(run, result, display)]
    contrasts = contrast_table(run, result)
    return [
        _captioned(condition_table(run, result, display), run),
        *([contrasts] if contrasts is not None else []),
        model_table(run, result, display),
    ]


def _captioned(table: DisplayTable, run: Run) -> DisplayTable:
    """Add the models' protocols to a table's caption; models with one protocol share a sentence."""
    labels: dict[str, list[str]] = {}
    for model in run.models:
        if model.info.protocol is not None:
            labels.setdefault(model.info.protocol, []).append(printable(model.info.label))
    sentences = [f"{', '.join(names)}: {protocol}" for protocol, names in labels.items()]
    return replace(table, caption="; ".join([*filter(None, [table.caption]), *sentences]))


def _main_tables(result: MetricResult) -> list[str]:
    """Return the names of the tables by layer and by model; the first table's if there is neither."""
    return [name for name in ("layers", "summary") if name in result.tables] or list(result.tables)[:1]


def bos_line(run: Run) -> str:
    """Describe the run's BOS policy; name it by model where models differ, `bos: rope auto, drope never`."""
    policies = {model.info.label: model.bos for model in run.models}
    if len(set(policies.values())) == 1:
        policy = next(iter(policies.values()))
        return f"bos: {policy} ({BOS_POLICIES[policy]})"
    return "bos: " + ", ".join(f"{printable(label)} {policy}" for label, policy in policies.items())
