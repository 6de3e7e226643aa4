"""The sections that metrics add to a report, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from phaselens.plugin import ReportSection
from phaselens.plugin.author_errors import author_error, describe_value
from phaselens.runs.active_metrics import guarded

if TYPE_CHECKING:
    from phaselens.runs.result import MetricResult


def report_sections(result: MetricResult) -> list[ReportSection]:
    """Return the sections that a metric adds to a report; an exception is recorded as the metric's failure."""
    sections: list[ReportSection] = []
    with guarded(result, "all models", "report"):
        if result.tables:
            sections = _checked(result.metric.report(dict(result.tables), result.params))
    return sections


def _checked(sections: object) -> list[ReportSection]:
    entries = list(sections) if isinstance(sections, Iterable) and not isinstance(sections, str) else None
    if entries is None or not all(isinstance(section, ReportSection) for section in entries):
        raise author_error(f"report returned {describe_value(sections)}; return a list of ReportSections")
    return entries
