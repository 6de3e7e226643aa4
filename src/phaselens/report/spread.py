"""Models side by side on a terminal where every column counts: each column is as wide as what is in it.

Only the names on the left are broken into lines.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from phaselens.report import words
from phaselens.report.conditions import ConditionGrid, Entry, Row

_MOST_NAME = 80
_MOST_LINES = 4
_BAR = " │ "


@dataclass(frozen=True)
class _Block:
    """Some models of a grid as they are written: `gap` blanks between columns, names broken at `name_width`."""

    grid: ConditionGrid
    first: int
    last: int
    gap: int
    name_width: int

    @property
    def columns(self) -> list[list[int]]:
        """Width of every column of every model."""
        return [
            [max(map(cell_len, column)) for column in zip(*self._cells(model), strict=True)]
            for model in range(self.first, self.last)
        ]

    def _cells(self, model: int) -> list[tuple[str, ...]]:
        rows = [row[model] for row in self.grid.entries]
        return [self.grid.briefly, *(self.grid.written(entry) for entry in rows)]

    @property
    def models_width(self) -> int:
        """What the models take, without the names."""
        return sum(len(_BAR) + sum(widths) + self.gap * (len(widths) - 1) for widths in self.columns)

    def lines(self, strong: str) -> Iterator[Text]:
        """Headings, a rule, and the rows."""
        columns, grid = self.columns, self.grid
        yield self._heading(columns)
        titles = [_justified(grid.briefly, widths, self.gap) for widths in columns]
        stub = grid.stub[: self.name_width].ljust(self.name_width)
        yield Text(_BAR.join([stub, *titles]).rstrip(), style="bold")
        yield Text("─" * (self.name_width + self.models_width))
        for row, entries in zip(grid.rows, grid.entries, strict=True):
            yield from self._row(row, entries[self.first : self.last], columns, strong)

    def _heading(self, columns: list[list[int]]) -> Text:
        parts = [" " * self.name_width]
        for model, widths in zip(self.grid.models[self.first : self.last], columns, strict=True):
            width = sum(widths) + self.gap * (len(widths) - 1)
            parts.append(_padded(words.shortened(model, width), width))
        return Text(_BAR.join(parts).rstrip(), style="bold")

    def _row(
        self, row: Row, entries: list[Entry | None], columns: list[list[int]], strong: str
    ) -> Iterator[Text]:
        names = broken(row, self.name_width)
        for place, name in enumerate(names):
            line = Text(style="dim" if row.control else "")
            line.append(_padded(name, self.name_width))
            for entry, widths in zip(entries, columns, strict=True):
                line.append(_BAR)
                cells = self.grid.written(entry) if place == 0 else ("",) * len(widths)
                for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
                    line.append(" " * (self.gap if at else 0) + " " * (width - cell_len(cell)))
                    marked = entry is not None and entry.strong and at == self.grid.marked
                    line.append(cell, style=strong if marked else "dim" if at == self.grid.null else "")
            line.rstrip()
            yield line


@cache
def _console() -> Console:
    """rich breaks lines by what a console can show; this one shows nothing."""
    return Console(file=io.StringIO())


def broken(row: Row, width: int) -> list[str]:
    """The lines of a row's name; what hangs below a control's first line stays indented."""
    name = words.shortened(row.brief, _MOST_NAME)
    indent = "  " if name.startswith("└ ") else ""
    lines = Text(name.removeprefix("└ ")).wrap(_console(), width - len(indent))
    texts = [line.plain.rstrip() for line in lines]
    return [("└ " if indent and not place else indent) + text for place, text in enumerate(texts)] or [""]


def spread(grid: ConditionGrid, width: int, strong: str) -> Iterator[Text]:
    """As many models side by side as fit, the rest below; narrower gaps and names in more lines before that."""
    first, n_models = 0, len(grid.models)
    while first < n_models:
        if first:
            yield Text("")
        block = _widest(grid, first, width)
        yield from block.lines(strong)
        first = block.last


def _widest(grid: ConditionGrid, first: int, width: int) -> _Block:
    for last in range(len(grid.models), first, -1):
        for gap, most_lines in ((2, 1), (2, 2), (1, 1), (1, 2), (1, 3), (1, _MOST_LINES)):
            block = _Block(grid, first, last, gap, _name_width(grid, most_lines))
            room = width - block.models_width
            if block.name_width <= room:
                return replace(block, name_width=min(room, _name_width(grid, 1)))
    return block


def _name_width(grid: ConditionGrid, most_lines: int) -> int:
    """The narrowest column in which every name takes at most `most_lines` lines, and no word is broken."""
    names = [(words.shortened(row.brief, _MOST_NAME), row) for row in grid.rows]
    least = max(
        (cell_len(word) + 2 * name.startswith("└") for name, _ in names for word in name.split()), default=0
    )
    width = max(least, cell_len(grid.stub))
    while any(len(broken(row, width)) > most_lines for _, row in names):
        width += 1
    return width


def _justified(cells: tuple[str, ...], widths: list[int], gap: int) -> str:
    return (" " * gap).join(
        " " * (width - cell_len(cell)) + cell for cell, width in zip(cells, widths, strict=True)
    )


def _padded(text: str, width: int) -> str:
    return text + " " * max(0, width - cell_len(text))
