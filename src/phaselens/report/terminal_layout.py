"""Runs and tables on a terminal, printed by rich. Strings are passed as Text, never as markup."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from phaselens.report.compact import compact_lines
from phaselens.report.document import MetricSection, run_document
from phaselens.report.numbers import DECIMAL
from phaselens.report.strings import aligned_columns, printable, shortened
from phaselens.report.styles import MARKED, STYLES
from phaselens.report.table import DisplayRow, DisplayTable
from phaselens.runs import Run

#: Width of output that is not a terminal.
WIDTH = 100
_MAX_NAME_WIDTH = 22
#: Widths of models' labels: where a table has room, and elsewhere.
_LABEL_WIDTHS = (40, 16)
_MAX_ROWS = 60


def console(file: IO[str], width: int | None = None) -> Console:
    """Return a console on `file`: coloured on a terminal (NO_COLOR is respected), plain elsewhere."""
    if width is None and not file.isatty():
        width = WIDTH
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def as_text(run: Run) -> str:
    """Return the run's tables as plain text, 100 columns wide."""
    return plain_text(lambda output: print_run(run, output), WIDTH)


def plain_text(print_to: Callable[[Console], None], width: int) -> str:
    """Return the text that `print_to` prints on a console without colours, `width` columns wide."""
    file = io.StringIO()
    print_to(Console(file=file, width=width, color_system=None, highlight=False, markup=False, emoji=False))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def print_run(run: Run, output: Console) -> None:
    """Print every metric's tables, then the BOS policy and the warnings."""
    document = run_document(run, main_tables_only=True)
    for section in document.sections:
        for renderable in _section(section, output):
            output.print(renderable)
    if document.bos:
        output.print(Text(document.bos, style="dim"))
    for warning in document.warnings:
        output.print(Text(f"note: {printable(warning)}", style="dim"))


def print_table(table: DisplayTable, output: Console) -> None:
    """Print one display table, all rows."""
    for renderable in _table(table, output):
        output.print(renderable)


def print_rows(
    titles: Sequence[str], rows: Sequence[Sequence[str]], output: Console, *, status_column: int | None = None
) -> None:
    """Print a list in aligned columns; rows with `failed` in the column `status_column` are coloured."""
    heading, *lines = aligned_columns(titles, rows, width=output.width)
    output.print(Text(heading, style="bold"), soft_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        has_failed = status_column is not None and row[status_column] == "failed"
        output.print(Text(line, style=MARKED if has_failed else ""), soft_wrap=True)


def _section(section: MetricSection, output: Console) -> Iterator[RenderableType]:
    yield Text(f"{section.name}: {printable(section.title)}", style="bold")
    yield Text(printable(section.definition), style="dim")
    for table in section.tables:
        yield from _table(table, output, _MAX_ROWS)
    for failure in section.failures:
        yield Text(f"failed: {printable(failure)}", style=MARKED)
    yield Text("")


def _table(table: DisplayTable, output: Console, max_rows: int | None = None) -> Iterator[RenderableType]:
    """Yield layers as a grid, conditions, whose names are long, in the compact layout, and lists as a list."""
    is_compact = table.rows_are == "conditions"
    if is_compact:
        yield Text("")
    if table.caption:
        yield Text(table.caption, style="dim")
    if is_compact:
        yield from compact_lines(table, output.width)
    elif table.rows_are == "layers":
        yield from _grid(table, output)
    else:
        yield from _list(table, output, max_rows)
    for note in table.notes:
        blank, marked = Text(""), Text(note, style=MARKED)
        yield from (blank, marked) if is_compact else (marked, blank)


def _list(table: DisplayTable, output: Console, max_rows: int | None) -> Iterator[RenderableType]:
    """Yield a table without models across; one that is too wide has its cells stacked below each row's name."""
    names = [table.row_title] if table.row_title is not None else []
    rich_table = _rich_table([*names, *table.titles()], right_from=1)
    for column, rich_column in zip(table.columns, rich_table.columns[len(names) :], strict=True):
        rich_column.justify = column.align
    if table.name:
        rich_table.title = Text(table.name)
    rows = table.rows[:max_rows]
    for row in rows:
        name = [Text(shortened(row.name, _MAX_NAME_WIDTH))] if names else []
        rich_table.add_row(*name, *(Text(cell.text) for cell in table.printed(row.cells[0])))
    if _width(rich_table, output) <= output.width:
        yield rich_table
    else:
        yield from _stacked(table, rows, output)
    if max_rows is not None and len(table.rows) > max_rows:
        n_more = len(table.rows) - max_rows
        yield Text(f"{DECIMAL.write(n_more)} more rows: --table {table.name}", style="dim")


def _stacked(table: DisplayTable, rows: Sequence[DisplayRow], output: Console) -> Iterator[RenderableType]:
    """Yield each row as its name and, below it, titles with their cells, as many on a line as fit."""
    if table.name:
        yield Text(table.name, style="bold")
    titles = table.titles()
    for row in rows:
        if table.row_title is not None:
            yield Text(printable(row.name), style="bold")
        pairs = [
            f"{title} {cell.text}" for title, cell in zip(titles, table.printed(row.cells[0]), strict=True)
        ]
        line = ""
        for pair in pairs:
            joined = f"{line}, {pair}" if line else f"  {pair}"
            if line and cell_len(joined) + 1 > output.width:
                yield Text(f"{line},")
                joined = f"  {pair}"
            line = joined
        yield Text(line)
    yield Text("")


def _grid(table: DisplayTable, output: Console) -> Iterator[RenderableType]:
    """Yield lines with as many models side by side as fit, and the others below them.

    A model that does not fit by itself has its columns in several grids.
    """
    first_model, n_models = 0, len(table.models)
    every_column = range(len(table.titles()))
    while first_model < n_models:
        end_model = n_models
        grid = _fitting_grid(table, first_model, end_model, every_column, output)
        while end_model > first_model + 1 and _width(grid, output) > output.width:
            end_model -= 1
            grid = _fitting_grid(table, first_model, end_model, every_column, output)
        if _width(grid, output) <= output.width:
            yield grid
        else:
            yield from _grids_of_columns(table, first_model, output)
        first_model = end_model


def _grids_of_columns(table: DisplayTable, model_index: int, output: Console) -> Iterator[RenderableType]:
    """Yield one model's columns in grids that each have as many columns as fit, but at least one."""
    first_column, n_columns = 0, len(table.titles())
    while first_column < n_columns:
        end_column = n_columns
        while end_column > first_column:
            columns = range(first_column, end_column)
            grid = _fitting_grid(table, model_index, model_index + 1, columns, output)
            if _width(grid, output) <= output.width:
                break
            end_column -= 1
        yield grid
        first_column = max(end_column, first_column + 1)


def _fitting_grid(
    table: DisplayTable, first_model: int, end_model: int, columns: range, output: Console
) -> RichTable:
    """Return the grid with whole labels where these fit, else with shortened ones."""
    for label_width in _LABEL_WIDTHS:
        grid = _model_grid(table, first_model, end_model, columns, label_width)
        if _width(grid, output) <= output.width:
            break
    return grid


def _width(table: RichTable, output: Console) -> int:
    """Return the width that a table needs, however narrow the console is."""
    return Measurement.get(output, output.options.update(max_width=10_000), table).maximum


def _model_grid(
    table: DisplayTable, first_model: int, end_model: int, columns: range, label_width: int
) -> RichTable:
    """Return the grid of some models and, of each, some printed columns."""
    titles = [table.titles()[index] for index in columns]
    headings = [f"\n{table.row_title}"]
    for label in table.models[first_model:end_model]:
        labels = [shortened(label, label_width), *([""] * (len(titles) - 1))]
        headings += ["│\n│", *(f"{line}\n{title}" for line, title in zip(labels, titles, strict=True))]
    rich_table = _rich_table(headings, right_from=0)
    for row in table.rows:
        texts = [Text(row.name)]
        for cells in row.cells[first_model:end_model]:
            printed = table.printed(cells)
            texts.append(Text("│"))
            texts += [Text(printed[index].text, style=STYLES[printed[index].role]) for index in columns]
        rich_table.add_row(*texts)
    return rich_table


def _rich_table(titles: Sequence[str], right_from: int) -> RichTable:
    table = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title_justify="left"
    )
    for index, title in enumerate(titles):
        is_right = index >= right_from
        table.add_column(Text(title), justify="right" if is_right else "left", no_wrap=is_right)
    return table
