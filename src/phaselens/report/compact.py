"""The terminal's compact layout for tables of conditions: each column is only as wide as its longest cell.

Only the names on the left are broken into lines.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from phaselens.report.strings import shortened
from phaselens.report.styles import STYLES
from phaselens.report.table import CONTROL_PREFIX, DisplayCell, DisplayRow, DisplayTable

_MAX_NAME_WIDTH = 80
_BAR = " │ "
#: Gaps between columns, and lines per name, to try in this order before models are printed below each other.
_FITS = ((2, 1), (2, 2), (1, 1), (1, 2), (1, 3), (1, 4))


@dataclass(frozen=True)
class _ModelBlock:
    """Models of a table printed side by side, with `gap` spaces between columns and names broken at `name_width`."""

    table: DisplayTable
    first_model: int
    end_model: int
    gap: int
    name_width: int

    @property
    def titles(self) -> list[str]:
        return self.table.titles(short=True)

    @property
    def column_widths(self) -> list[list[int]]:
        """The width of every printed column of every model."""
        return [
            [max(map(cell_len, column)) for column in zip(*self._texts(model_index), strict=True)]
            for model_index in range(self.first_model, self.end_model)
        ]

    def _texts(self, model_index: int) -> list[list[str]]:
        rows = [self.table.printed(row.cells[model_index]) for row in self.table.rows]
        return [self.titles, *([cell.text for cell in cells] for cells in rows)]

    @property
    def models_width(self) -> int:
        """The width of all models, without the names."""
        return sum(len(_BAR) + self._model_width(widths) for widths in self.column_widths)

    def _model_width(self, widths: Sequence[int]) -> int:
        return sum(widths) + self.gap * (len(widths) - 1)

    def lines(self) -> Iterator[Text]:
        """Yield the headings, a rule, and the rows."""
        column_widths = self.column_widths
        labels = self.table.models[self.first_model : self.end_model]
        models = [
            _padded(shortened(label, width), width)
            for label, width in zip(labels, map(self._model_width, column_widths), strict=True)
        ]
        yield Text(_BAR.join([" " * self.name_width, *models]).rstrip(), style="bold")
        titles = [_justified(self.titles, widths, self.gap) for widths in column_widths]
        row_title = (self.table.row_title or "")[: self.name_width].ljust(self.name_width)
        yield Text(_BAR.join([row_title, *titles]).rstrip(), style="bold")
        yield Text("─" * (self.name_width + self.models_width))
        for row in self.table.rows:
            yield from self._row(row, row.cells[self.first_model : self.end_model], column_widths)

    def _row(
        self,
        row: DisplayRow,
        models: Sequence[Sequence[DisplayCell] | None],
        column_widths: Sequence[Sequence[int]],
    ) -> Iterator[Text]:
        for line_index, name in enumerate(name_lines(row, self.name_width)):
            line = Text(style="dim" if row.is_control else "")
            line.append(_padded(name, self.name_width))
            for cells, widths in zip(models, column_widths, strict=True):
                line.append(_BAR)
                for index, (cell, width) in enumerate(zip(self.table.printed(cells), widths, strict=True)):
                    text = cell.text if line_index == 0 else ""
                    line.append(" " * (self.gap if index else 0) + " " * (width - cell_len(text)))
                    line.append(text, style=STYLES[cell.role])
            line.rstrip()
            yield line


@cache
def _wrapping_console() -> Console:
    """Return a console without output, which rich needs to break lines."""
    return Console(file=io.StringIO())


def _row_name(row: DisplayRow) -> str:
    return shortened(
        row.name if row.short_name is None else row.short_name, _MAX_NAME_WIDTH - len(_prefix(row))
    )


def _prefix(row: DisplayRow) -> str:
    return CONTROL_PREFIX if row.is_indented else ""


def name_lines(row: DisplayRow, width: int) -> list[str]:
    """Return the lines of a row's name; the further lines of an indented control's name are indented too."""
    prefix = _prefix(row)
    texts = Text(_row_name(row)).wrap(_wrapping_console(), width - len(prefix))
    lines = [(" " * len(prefix) if index else prefix) + text.plain for index, text in enumerate(texts)]
    return [line.rstrip() for line in lines] or [prefix.rstrip()]


def compact_lines(table: DisplayTable, width: int) -> Iterator[Text]:
    """Yield lines with as many models side by side as fit, and the others below them.

    Gaps become narrower and names take more lines before a model is moved below. A model that does not fit by itself
    has its columns in several blocks.
    """
    first_model, n_models = 0, len(table.models)
    while first_model < n_models:
        if first_model:
            yield Text("")
        block = _widest_block(table, first_model, width)
        for index, part in enumerate(_blocks_of_columns(block, width)):
            if index:
                yield Text("")
            yield from part.lines()
        first_model = block.end_model


def _blocks_of_columns(block: _ModelBlock, width: int) -> Iterator[_ModelBlock]:
    """Yield the block, or one model's columns in blocks that each have as many columns as fit, but at least one."""
    table, n_columns = block.table, len(block.table.columns)
    if block.name_width + block.models_width <= width or n_columns == 1:
        yield block
        return
    first_column = 0
    while first_column < n_columns:
        for end_column in range(n_columns, first_column, -1):
            part = _widest_block(_with_columns(table, first_column, end_column), block.first_model, width)
            if part.name_width + part.models_width <= width:
                break
        yield replace(part, end_model=block.end_model)
        first_column = end_column


def _with_columns(table: DisplayTable, first_column: int, end_column: int) -> DisplayTable:
    """Return the table with some of its columns."""
    columns = slice(first_column, end_column)
    rows = [
        replace(row, cells=[None if cells is None else cells[columns] for cells in row.cells])
        for row in table.rows
    ]
    return replace(table, columns=table.columns[columns], rows=rows)


def _widest_block(table: DisplayTable, first_model: int, width: int) -> _ModelBlock:
    for end_model in range(len(table.models), first_model, -1):
        for gap, max_lines in _FITS:
            block = _ModelBlock(table, first_model, end_model, gap, _name_width(table, max_lines))
            available = width - block.models_width
            if block.name_width <= available:
                return replace(block, name_width=min(available, _name_width(table, 1)))
    return block


def _name_width(table: DisplayTable, max_lines: int) -> int:
    """Return the narrowest column in which every name takes at most `max_lines` lines and no word is broken."""
    longest_word = max(
        (len(_prefix(row)) + cell_len(word) for row in table.rows for word in _row_name(row).split()),
        default=0,
    )
    width = max(longest_word, cell_len(table.row_title or ""))
    while any(len(name_lines(row, width)) > max_lines for row in table.rows):
        width += 1
    return width


def _justified(texts: Sequence[str], widths: Sequence[int], gap: int) -> str:
    return (" " * gap).join(
        " " * (width - cell_len(text)) + text for text, width in zip(texts, widths, strict=True)
    )


def _padded(text: str, width: int) -> str:
    return text + " " * max(0, width - cell_len(text))
