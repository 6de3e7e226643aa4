"""The HTML that a notebook shows for a result table: its first rows, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phaselens.plugin.tables import Table

_MAX_ROWS = 20


def table_html(table: Table) -> str:
    """Return the first rows of a table as HTML; units are beneath the columns' names."""
    columns = table.spec.columns
    titles = [
        f"{html_text(column.name)}<br><small>{html_text(column.unit)}</small>"
        if column.unit
        else html_text(column.name)
        for column in columns
    ]
    rows = [[_cell(value) for value in row] for row in table.rows[:_MAX_ROWS]]
    n_left = len(table.rows) - len(rows)
    more = f"<p><small>{n_left:,} more rows</small></p>" if n_left > 0 else ""
    caption = f'<caption style="text-align:left">{html_text(table.spec.name)}</caption>'
    body = "".join(_row(row, "td") for row in rows)
    return (
        f"<div><table>{caption}<thead>{_row(titles, 'th')}</thead><tbody>{body}</tbody></table>{more}</div>"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else html_text(str(value))


def html_text(text: str) -> str:
    """Return text for HTML, with control characters escaped."""
    return escape(
        "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    )
