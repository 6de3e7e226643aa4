"""Display tables as the template writes them: header groups, and cells with a text and a key to sort by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phaselens.plugin import CellValue, ReportSection
from phaselens.report.numbers import MISSING, NumberFormat
from phaselens.report.strings import printable
from phaselens.report.table import CONTROL_PREFIX, DisplayCell, DisplayColumn, DisplayTable

#: Rows of a section's own table that the page shows.
MAX_ROWS = 300
#: Cells of all tables of a page. Tables by layer are shown in full.
_MAX_CELLS = 12_000
_MIN_ROWS = 30


@dataclass(frozen=True)
class CellView:
    """A printed cell, with the number or text to sort by; `key` is empty for a missing value."""

    text: str
    key: str
    role: str = "value"
    is_left: bool = False


@dataclass(frozen=True)
class RowView:
    """A row: its name, its layer if the rows are layers, and its cells."""

    name: str
    layer: int | None
    cells: Sequence[CellView]
    is_control: bool = False


@dataclass(frozen=True)
class TableView:
    """A table: models above groups of titles, rows, a caption and notes. `n_left_out` rows are not shown."""

    caption: str
    row_title: str | None
    groups: Sequence[str]
    titles: Sequence[str]
    rows: Sequence[RowView]
    notes: Sequence[str]
    n_left_out: int = 0

    @property
    def titles_per_group(self) -> int:
        """Columns below each model."""
        return len(self.titles) // max(1, len(self.groups))


def rows_that_fit(tables: Iterable[DisplayTable]) -> int:
    """Return the number of rows that each table of a page may have, unless its rows are layers."""
    n_cells = sum(
        len(table.titles()) * max(1, len(table.models)) for table in tables if table.rows_are == "conditions"
    )
    return max(_MIN_ROWS, _MAX_CELLS // max(1, n_cells))


def table_view(table: DisplayTable, n_rows: int) -> TableView:
    """Return a display table as the template writes it, with at most `n_rows` rows unless they are layers."""
    n_rows = len(table.rows) if table.rows_are == "layers" else n_rows
    titles = list(table.titles())
    groups = [printable(label) for label in table.models]
    rows = [
        RowView(
            (CONTROL_PREFIX if row.is_indented else "") + printable(row.name),
            row.layer if table.rows_are == "layers" else None,
            [cell for cells in row.cells for cell in _cells(table, cells)],
            row.is_control,
        )
        for row in table.rows[:n_rows]
    ]
    return TableView(
        table.caption,
        table.row_title,
        groups,
        titles * max(1, len(groups)),
        rows,
        table.notes,
        max(0, len(table.rows) - n_rows),
    )


def _cells(table: DisplayTable, cells: Sequence[DisplayCell] | None) -> list[CellView]:
    row_cells = cells if cells is not None else [DisplayCell(None)] * len(table.columns)
    return [
        view for column, cell in zip(table.columns, row_cells, strict=True) for view in _views(column, cell)
    ]


def _views(column: DisplayColumn, cell: DisplayCell) -> list[CellView]:
    keys = [cell.value, *([cell.low] if column.low else []), *([cell.null] if column.null else [])]
    is_left = column.align == "left" or isinstance(cell.value, str)
    return [
        CellView(printed.text, _key(key), printed.role, is_left)
        for printed, key in zip(column.printed(cell), keys, strict=True)
    ]


def _key(value: CellValue) -> str:
    if value is None:
        return ""
    return printable(value) if isinstance(value, str) else f"{value:.6g}"


def section_view(section: ReportSection) -> TableView | None:
    """Return the table of a section that a metric adds; None without one."""
    if not section.columns:
        return None
    number_format = NumberFormat("compact", 3)
    rows = [
        RowView(
            "",
            None,
            [
                CellView(
                    MISSING if cell is None else number_format.write(cell),
                    _key(cell),
                    is_left=isinstance(cell, str),
                )
                for cell in row
            ],
        )
        for row in section.rows[:MAX_ROWS]
    ]
    titles = [printable(title) for title in section.columns]
    return TableView("", None, [], titles, rows, [], max(0, len(section.rows) - MAX_ROWS))
