"""What is shown on a terminal, by rich. Texts are passed as Text, never as markup."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import IO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from phaselens.plugin import Display
from phaselens.report import words
from phaselens.report.conditions import (
    BEYOND,
    DIFFERENCES,
    condition_grid,
    condition_lines,
    contrast_grid,
)
from phaselens.report.grid import MARK, Grid, bos_line, layer_grid, plain_rows
from phaselens.report.spread import spread
from phaselens.runs import MetricResult, Run

#: Where the output is no terminal, so that has no width of its own.
WIDTH = 100
_LABEL_WIDTH = 22
_TITLE_WIDTH = 16
_MOST_ROWS = 60
# Okabe and Ito's orange, which all common kinds of colour vision tell from plain text; the mark says it too.
_STRONG = "bold #E69F00"


def console(file: IO[str], width: int | None = None) -> Console:
    """A console on `file`: coloured on a terminal (NO_COLOR is respected), plain elsewhere."""
    if width is None and not file.isatty():
        width = WIDTH
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def as_text(run: Run) -> str:
    """The run's tables as plain text, 100 columns wide."""
    file = io.StringIO()
    plain = Console(file=file, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    print_run(run, plain)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def print_run(run: Run, to: Console) -> None:
    """Every metric's table, then the BOS policy and the warnings."""
    for name, result in run.metrics.items():
        for part in _metric(run, name, result, to):
            to.print(part)
    if run.models:
        to.print(Text(bos_line(run), style="dim"))
    for warning in run.warnings:
        to.print(Text(f"note: {words.plain(warning)}", style="dim"))


def print_table(run: Run, metric: str, table: str, to: Console) -> None:
    """One result table, row by row."""
    to.print(_raw(run, metric, table, most=None))


def print_rows(
    titles: Sequence[str], rows: Iterable[Sequence[str]], to: Console, *, marked: int | None = None
) -> None:
    """A plain list; only its last column is broken into lines. `failed` is coloured in the column `marked`."""
    table = _table(titles, right_from=len(titles))
    texts = [[Text(words.plain(cell)) for cell in row] for row in rows]
    for place, column in enumerate(table.columns[:-1]):
        column.no_wrap, column.min_width = True, max((len(row[place]) for row in texts), default=0)
    for row in texts:
        if marked is not None and row[marked].plain == "failed":
            row[marked].stylize(_STRONG)
        table.add_row(*row)
    to.print(table)


def _metric(run: Run, name: str, result: MetricResult, to: Console) -> Iterable[RenderableType]:
    metric = result.metric
    yield Text(f"{name}: {metric.title or name}", style="bold")
    yield Text(words.plain(result.definition), style="dim")
    if result.tables and metric.display is not None and metric.display.rows == "condition":
        yield from _conditions(run, result, metric.display, to)
    elif result.tables and metric.display is not None:
        yield from _grid_tables(layer_grid(run, result, metric.display), metric.display, to)
    else:
        for table in _worth_showing(result):
            yield _raw(run, name, table, most=_MOST_ROWS)
    for failure in result.failures:
        yield Text(f"failed: {words.plain(str(failure))}", style=_STRONG)
    yield Text("")


def _worth_showing(result: MetricResult) -> list[str]:
    """Without a display: the tables by layer and by model, or whatever there is."""
    usual: list[str] = [name for name in ("layers", "summary") if name in result.tables]
    return usual or list(result.tables)[:1]


def _raw(run: Run, metric: str, table: str, most: int | None) -> RenderableType:
    titles, rows = plain_rows(run, metric, table)
    drawn = _table(titles, right_from=1)
    drawn.title = Text(f"{metric}.{table}")
    for row in rows[:most]:
        drawn.add_row(*(Text(cell) for cell in row))
    if most is None or len(rows) <= most:
        return drawn
    more = f"{len(rows) - most:,} more rows: --format csv --table {metric}.{table}"
    return Group(drawn, Text(more, style="dim"))


def _grid_tables(grid: Grid, display: Display, to: Console) -> Iterable[RenderableType]:
    """As many models side by side as fit; the rest below."""
    first, n_models = 0, len(grid.models)
    while first < n_models:
        last = n_models
        while last > first + 1 and _width(_grid_table(grid, first, last), to) > to.width:
            last -= 1
        yield _grid_table(grid, first, last)
        first = last
    if grid.any_strong:
        yield Text(f"{MARK} {display.strong_means}", style=_STRONG)
        yield Text("")
    yield _lines(grid.line_titles, grid.lines)


def _lines(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """A line a model, below the table."""
    table = _table(titles, right_from=1)
    for column in table.columns[-2:]:
        column.justify = "left"
    for line in lines:
        table.add_row(Text(words.shortened(line[0], _LABEL_WIDTH)), *(Text(cell) for cell in line[1:]))
    return table


def _conditions(run: Run, result: MetricResult, display: Display, to: Console) -> Iterable[RenderableType]:
    """Conditions, what they do beyond their controls, and a line a model."""
    grid, contrasts = condition_grid(run, result, display), contrast_grid(run, result)
    yield Text("")
    yield from spread(grid, to.width, _STRONG)
    if grid.any_strong:
        yield Text(f"\n{MARK} {display.strong_means or BEYOND}", style=_STRONG)
    if contrasts is not None:
        yield Text(f"\n{DIFFERENCES}", style="dim")
        yield from spread(contrasts, to.width, _STRONG)
    yield _lines(*condition_lines(run, result, display))


def _width(table: Table, to: Console) -> int:
    """What the table would like to have, however narrow the console is."""
    return Measurement.get(to, to.options.update(max_width=10_000), table).maximum


def _grid_table(grid: Grid, first: int, last: int) -> Table:
    titles = ["\nlayer"]
    for label in grid.models[first:last]:
        over = [words.shortened(label, _TITLE_WIDTH), *([""] * (len(grid.titles) - 1))]
        titles += ["│\n│", *(f"{above}\n{title}" for above, title in zip(over, grid.titles, strict=True))]
    table = _table(titles, right_from=0)
    for layer, row in zip(grid.layers, grid.entries, strict=True):
        cells = [Text(layer)]
        for entry in row[first:last]:
            cells.append(Text("│"))
            if entry is None:
                cells += [Text(words.MISSING) for _ in grid.titles]
                continue
            value, *others = entry.cells
            cells.append(Text(f"{MARK} {value}", style=_STRONG) if entry.strong else Text(value))
            for place, cell in enumerate(others, start=1):
                cells.append(Text(cell, style="dim" if place == grid.null else ""))
        table.add_row(*cells)
    return table


def _table(titles: Sequence[str], right_from: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title_justify="left"
    )
    for place, title in enumerate(titles):
        table.add_column(
            Text(title), justify="right" if place >= right_from else "left", no_wrap=place >= right_from
        )
    return table
