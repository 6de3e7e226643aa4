"""What a notebook shows of a result of patching: a title, a table, and notes, as HTML without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.patching.wording import number_text
from phaselens.plugin.table_html import html_text

if TYPE_CHECKING:
    from phaselens.patching.results import Sweep
    from phaselens.plugin import Table

# Okabe and Ito's blue and vermilion, as the terminal's heatmap has them.
_UP, _DOWN = "0,114,178", "213,94,0"
_MAX_COLUMNS = 64
_N_STRONGEST = 20


def result_html(title: str, table: Table | None, notes: Iterable[str] = ()) -> str:
    """Return a title, the first rows of a table, and notes."""
    body = "" if table is None else table._repr_html_()
    return f"<div><p><b>{html_text(title)}</b></p>{body}{_notes(notes)}</div>"


def list_html(lines: Sequence[str], notes: Iterable[str] = ()) -> str:
    """Return a numbered list and notes."""
    items = "".join(f"<li>{html_text(line)}</li>" for line in lines)
    return f"<div><ol>{items}</ol>{_notes(notes)}</div>"


def sweep_html(sweep: Sweep, notes: Iterable[str] = ()) -> str:
    """Return the effects of a sweep as a coloured grid; of one over layers, positions and heads the strongest cells."""
    ends = f"{sweep.metric}: corrupt {number_text(sweep.base)}, clean {number_text(sweep.clean)}"
    title = f"<p><b>{html_text(sweep.title)}</b><br><small>{html_text(ends)}</small></p>"
    if len(sweep.axes) > 2:
        titles = [*sweep.axes, "effect"]
        rows = [
            [*(str(cell[axis]) for axis in sweep.axes), number_text(cell["effect"], signed=True)]
            for cell in sweep.strongest(_N_STRONGEST)
        ]
        body = _row(titles, "th") + "".join(map(_row, rows))
        return f"<div>{title}<table>{body}</table>{_notes(['the strongest cells; to_table() has all', *notes])}</div>"
    n_left_out = sweep.values.shape[1] - _MAX_COLUMNS
    more = [f"{n_left_out:,} more columns; to_table() has all"] if n_left_out > 0 else []
    return f"<div>{title}<table>{''.join(_grid_lines(sweep))}</table>{_notes([*more, *notes])}</div>"


def _grid_lines(sweep: Sweep) -> Iterable[str]:
    effects = sweep.effect
    largest = float(abs(effects).max()) if effects.count() else 0.0
    n_columns = min(effects.shape[1], _MAX_COLUMNS)
    words = sweep.clean_words if sweep.axes[1] == "pos" else ()
    labels = [f"{column} {words[column]}" if words else str(column) for column in range(n_columns)]
    yield _row([" \\ ".join(sweep.axes), *labels], "th")
    for layer, row in zip(sweep.layers, effects, strict=True):
        cells = "".join(_cell(row[column], largest) for column in range(n_columns))
        yield f"<tr><th>{layer}</th>{cells}</tr>"


def _cell(effect: Any, largest: float) -> str:
    import numpy as np

    if effect is np.ma.masked:
        return "<td>·</td>"
    value = float(effect)
    opacity = abs(value) / largest if largest and abs(value) <= largest else 0.0
    style = f' style="background:rgba({_UP if value > 0 else _DOWN},{opacity:.2f})"'
    return f"<td{style}>{number_text(value, signed=True)}</td>"


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{html_text(cell)}</{tag}>' for cell in cells)}</tr>"


def _notes(notes: Iterable[str]) -> str:
    return "".join(f"<p><small>{html_text(note)}</small></p>" for note in notes)
