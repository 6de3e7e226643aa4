"""Fill the template of the report: `html_report(run)` returns the page, `write_html_report(run, path)` writes it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phaselens.data.new_files import write_new
from phaselens.errors import InputError
from phaselens.report.comparison_tables import comparison_tables
from phaselens.report.document import MetricSection, run_document
from phaselens.report.html.charts import Chart, layer_chart
from phaselens.report.html.environment import asset, environment, script
from phaselens.report.html.findings import find
from phaselens.report.html.payload import report_data
from phaselens.report.html.pictures import Picture, pictures
from phaselens.report.html.provenance import provenance
from phaselens.report.html.table_views import TableView, rows_that_fit, section_view, table_view
from phaselens.report.strings import printable
from phaselens.report.table import DisplayTable
from phaselens.runs import Comparison, MetricResult, Run, compare
from phaselens.runs.report_sections import report_sections

_MORE_VALUES = re.compile(r"; \d+ more values? with --format json or csv$")
#: Models that are compared with the first one.
_MAX_COMPARED = 3


@dataclass(frozen=True)
class AddedSection:
    """A section that the metric itself adds."""

    title: str
    paragraphs: Sequence[str]
    table: TableView | None


@dataclass(frozen=True)
class MetricView:
    """One metric's part of the page."""

    name: str
    anchor: str
    title: str
    description: str
    definition: str
    citation: str
    params: Sequence[tuple[str, str]]
    failures: Sequence[str]
    chart: Chart | None
    tables: Sequence[TableView]
    pictures: Sequence[Picture]
    sections: Sequence[AddedSection]


@dataclass(frozen=True)
class ComparisonView:
    """The differences of one pair of models; `problem` says why there are none."""

    first: str
    second: str
    tables: Sequence[TableView]
    n_differences: int
    notes: Sequence[str]
    problem: str = ""


def write_html_report(
    run: Run, path: str | os.PathLike[str], *, command: Sequence[str] | None = None
) -> Path:
    """Write the report of a run to a file, which appears complete; an existing file is replaced.

    Raises:
        InputError: where Jinja2 is not installed, or the file cannot be written.
    """
    target = Path(path)
    content = html_report(run, command=command).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_new(target, content, replace=True)
    except OSError as error:
        raise InputError(f"the report cannot be written to {target}: {error.strerror or error}") from error
    return target


def html_report(run: Run, *, command: Sequence[str] | None = None) -> str:
    """Return the report of a run as one HTML page that loads nothing.

    Args:
        run: a run in memory, or one that `phaselens.open_run` returned.
        command: the command line, for a run without a directory.

    Raises:
        InputError: where Jinja2 is not installed.
    """
    template = environment().get_template("report.html.j2")
    document = run_document(run)
    n_rows = rows_that_fit(table for section in document.sections for table in section.tables)
    compared = [_compared(run, second, n_rows) for second in _others(run)]
    comparisons = [comparison for comparison, _ in compared if comparison is not None]
    images = pictures(run)
    metrics = [
        _metric_view(
            f"metric-{number}", section, run.metrics[section.name], images.get(section.name, []), n_rows
        )
        for number, section in enumerate(document.sections)
    ]
    code = script()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    data = report_data(run)
    page: str = template.render(
        labels=[printable(model.info.label) for model in run.models],
        facts=list(_facts(run)),
        findings=find(run, comparisons),
        anchors={view.name: view.anchor for view in metrics},
        metrics=metrics,
        comparisons=[view for _, view in compared],
        bos=document.bos,
        warnings=[printable(warning) for warning in document.warnings],
        errors=[printable(str(error)) for error in run.errors],
        provenance=provenance(run, command),
        n_texts=len(run.texts),
        data=_embedded(data),
        left_out=data["left_out"],
        has_tokens=bool(data["tokens"]),
        style=asset("report.css"),
        script=code,
        script_digest=digest,
    )
    return page


def _embedded(data: dict[str, Any]) -> str:
    """Return JSON that no HTML parser takes for markup."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what was measured on what, as names and values."""
    yield "models", ", ".join(printable(model.info.label) for model in run.models) or "none"
    tokens = [model.n_tokens for model in run.models]
    counts = (
        f"{min(tokens):,}"
        if len(set(tokens)) == 1
        else "–".join(f"{n:,}" for n in (min(tokens), max(tokens)))
    )
    source = run.options.get("texts")
    suffix = f" ({printable(source)})" if isinstance(source, str) and source != "given" else ""
    yield "texts", f"{len(run.texts):,}{suffix}, {counts} tokens" if tokens else f"{len(run.texts):,}{suffix}"
    yield "metrics", str(sum(result.metric.prints for result in run.metrics.values()))
    precisions = dict.fromkeys(f"{model.info.dtype} on {model.info.device}" for model in run.models)
    if precisions:
        yield "precision", ", ".join(precisions)


def _others(run: Run) -> list[str]:
    """Return the labels of the models that are compared with the first."""
    return [model.info.label for model in run.models[1 : 1 + _MAX_COMPARED]]


def _compared(run: Run, second: str, n_rows: int) -> tuple[Comparison | None, ComparisonView]:
    first = run.models[0].info.label
    names = printable(first), printable(second)
    try:
        comparison = compare(run, models=(first, second), seed=int(run.options.get("seed", 0)))
    except InputError as error:
        return None, ComparisonView(*names, (), 0, (), printable(str(error)))
    notes = [*comparison.notes, *(f"compared although {difference}" for difference in comparison.allowed)]
    tables = [table_view(_of_page(table), n_rows) for table in comparison_tables(comparison)]
    return comparison, ComparisonView(
        *names, tables, comparison.n_differences, [printable(note) for note in notes]
    )


def _of_page(table: DisplayTable) -> DisplayTable:
    """Return a table of differences whose caption names no option of the command line."""
    return replace(table, caption=_MORE_VALUES.sub("", table.caption))


def _metric_view(
    anchor: str, section: MetricSection, result: MetricResult, images: Sequence[Picture], n_rows: int
) -> MetricView:
    metric = result.metric
    by_layer = next((table for table in section.tables if table.rows_are == "layers"), None)
    return MetricView(
        printable(section.name),
        anchor,
        printable(section.title),
        printable(metric.description),
        printable(section.definition),
        printable(metric.citation),
        [(printable(name), printable(str(value))) for name, value in result.params.as_dict().items()],
        [printable(failure) for failure in section.failures],
        None if by_layer is None else layer_chart(by_layer),
        [table_view(_named(table), n_rows) for table in section.tables if table.rows_are != "records"],
        images,
        [
            AddedSection(
                printable(added.title), [printable(text) for text in added.paragraphs], section_view(added)
            )
            for added in report_sections(result)
        ],
    )


def _named(table: DisplayTable) -> DisplayTable:
    return table if table.caption or not table.name else replace(table, caption=table.name)
