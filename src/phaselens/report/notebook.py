"""Runs in notebooks: tables as small HTML without scripts, and single figures."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

from phaselens.errors import InputError, close_matches, require_text
from phaselens.report.comparison_tables import comparison_notes, comparison_tables
from phaselens.report.document import run_document
from phaselens.report.figures import metric_figures
from phaselens.report.html.table_views import TableView, table_view
from phaselens.report.strings import printable
from phaselens.runs import Comparison, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Rows of a table; a report and `run.rows` have all.
_MAX_ROWS = 40
_LEFT = ' style="text-align:left"'


def run_html(run: Run) -> str:
    """Return the run's main tables as HTML without scripts."""
    document = run_document(run, main_tables_only=True)
    parts = []
    for section in document.sections:
        parts.append(
            f"<h4>{_text(section.name)}: {_text(section.title)}</h4><p>{_text(section.definition)}</p>"
        )
        parts += [f"<p><b>failed:</b> {_text(failure)}</p>" for failure in section.failures]
        parts += ["".join(_table_lines(table_view(table, _MAX_ROWS))) for table in section.tables]
    if document.bos:
        parts.append(f"<p><small>{_text(document.bos)}</small></p>")
    parts += [f"<p><small>note: {_text(warning)}</small></p>" for warning in document.warnings]
    return f"<div>{''.join(parts)}</div>"


def comparison_html(comparison: Comparison) -> str:
    """Return the displayed differences as HTML without scripts."""
    first, second = map(_text, comparison.titles)
    tables = "".join(
        "".join(_table_lines(table_view(replace(table, models=[""]), _MAX_ROWS)))
        for table in comparison_tables(comparison)
    )
    notes = "".join(f"<p><small>{_text(note)}</small></p>" for note in comparison_notes(comparison))
    return f"<div><h4>{second} − {first}</h4>{tables}{notes}</div>"


def _text(text: str) -> str:
    return escape(printable(text))


def _table_lines(table: TableView) -> Iterator[str]:
    yield "<table>"
    if table.caption:
        yield f"<caption{_LEFT}><small>{_text(table.caption)}</small></caption>"
    yield "<thead>"
    if table.groups:
        name = "<th></th>" if table.row_title else ""
        groups = "".join(
            f'<th colspan="{table.titles_per_group}"{_LEFT}>{_text(group)}</th>' for group in table.groups
        )
        yield f"<tr>{name}{groups}</tr>"
    titles = [table.row_title] if table.row_title else []
    yield f"<tr>{''.join(f'<th>{_text(title)}</th>' for title in [*titles, *table.titles])}</tr></thead><tbody>"
    for row in table.rows:
        name = f"<th{_LEFT}>{_text(row.name)}</th>" if table.row_title else ""
        cells = "".join(f"<td{_LEFT if cell.is_left else ''}>{_text(cell.text)}</td>" for cell in row.cells)
        yield f"<tr>{name}{cells}</tr>"
    yield "</tbody></table>"
    notes = [*table.notes, *([f"{table.n_left_out:,} more rows"] if table.n_left_out else [])]
    yield from (f"<p><small>{_text(note)}</small></p>" for note in notes)


def plot(run: Run, metric: str, figure: str | None = None) -> Figure:
    """Return one figure of a metric: its main one, or the one that `--figures` writes as `METRIC-FIGURE`.

    Raises:
        InputError: for another metric or figure.
    """
    require_text("metric", metric)
    if figure is not None:
        require_text("figure", figure)
    result = run.result(metric).copy()  # a failed drawing fails this call, not the run
    n_failures = len(result.failures)
    drawn = {
        name.removeprefix(metric).removeprefix("-"): page
        for name, page in metric_figures(run, metric, result)
    }
    chosen = figure or ""
    if chosen in drawn:
        return _shown(drawn[chosen])
    if len(result.failures) > n_failures:
        raise InputError(f"metric {metric!r} cannot be drawn: {result.failures[-1]}")
    if not drawn:
        raise InputError(
            f"metric {metric!r} has no figure; it has neither a display nor a plot, or no values"
        )
    if not chosen:
        return _shown(next(iter(drawn.values())))
    names = [name for name in drawn if name]
    raise InputError(f"metric {metric!r} has no figure {chosen!r}; {close_matches(chosen, names)}")


def _shown(figure: Figure) -> Figure:
    """Return a figure that a notebook shows, whether or not the notebook has loaded matplotlib's own display."""
    vars(figure)["_repr_png_"] = functools.partial(_png, figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
