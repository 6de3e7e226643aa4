"""The display table: a table for people, independent of the output format.

A `DisplayTable` has rows (layers, conditions, models), the same columns for each of its models, a caption above and
notes below. Its cells have numbers: output formats print them in the column's `NumberFormat`, figures draw them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from phaselens.plugin import CellValue
from phaselens.report.numbers import DECIMAL, NumberFormat

MARK = "●"
#: Precedes the name of a control that is right beneath its condition.
CONTROL_PREFIX = "└ "

Record: TypeAlias = Mapping[str, CellValue]
"""One row of a result table, by column name."""


@dataclass(frozen=True)
class DisplayCell:
    """One value, with its 95 % interval and its null if the column has them."""

    value: CellValue
    low: CellValue = None
    high: CellValue = None
    null: CellValue = None
    is_marked: bool = False


class PrintedCell(NamedTuple):
    """Text of one printed column; a terminal styles it by its `role`."""

    text: str
    role: Literal["value", "marked", "null"] = "value"


@dataclass(frozen=True)
class DisplayColumn:
    """One column: the columns of a result table that fill it, its title, and the format of its numbers.

    `name` is the value's column; `low`, `high` and `null` are those of its interval and its null, which are printed as
    further columns. `short_title` is the title if space is short. Only a column that `is_main` has marked values.
    """

    name: str
    title: str
    number_format: NumberFormat = DECIMAL
    unit: str | None = None
    low: str | None = None
    high: str | None = None
    null: str | None = None
    short_title: str = ""
    align: Literal["left", "right"] = "right"
    is_main: bool = False

    def cell(self, record: Record, *, is_marked: bool = False) -> DisplayCell:
        """Make the cell of one row of the result table; it is marked only if this is the main column."""
        low, high, null = (record[column] if column else None for column in (self.low, self.high, self.null))
        return DisplayCell(record[self.name], low, high, null, is_marked and self.is_main)

    def titles(self, *, short: bool = False) -> list[str]:
        """Return the titles of the value, of its interval and of its null."""
        interval = ["95 % CI" if short else "95 % interval"] if self.low else []
        return [(short and self.short_title) or self.title, *interval, *(["null"] if self.null else [])]

    def printed(self, cell: DisplayCell | None) -> list[PrintedCell]:
        """Return the value, its interval and its null as text, with the mark before the value."""
        cell = cell or DisplayCell(None)
        value = self.number_format.write(cell.value)
        texts = [PrintedCell(f"{MARK} {value}", "marked") if cell.is_marked else PrintedCell(value)]
        if self.low:
            texts.append(PrintedCell(self.number_format.write_interval(cell.low, cell.high)))
        if self.null:
            texts.append(PrintedCell(self.number_format.write(cell.null), "null"))
        return texts


#: The column with the layers of conditions.
LAYER_COLUMN = DisplayColumn("layer", "layer", NumberFormat("layer"), "index", short_title="at")
#: The column with the heads of conditions.
HEAD_COLUMN = DisplayColumn("head", "head", NumberFormat("layer"), "index")


@dataclass(frozen=True)
class DisplayRow:
    """One row: a name, and for each model its cells, or None where the model has no such row.

    `short_name` is the name without the part that the row above has; None for the full name. `occurrence` is the number
    of rows of the same name above. `layer` is the row's layer, if it is the same in every model. A row
    that `is_indented`, a control right beneath its condition, has `CONTROL_PREFIX` before its short name.
    """

    name: str
    cells: Sequence[Sequence[DisplayCell] | None]
    short_name: str | None = None
    occurrence: int = 0
    layer: int | None = None
    is_control: bool = False
    is_indented: bool = False


@dataclass(frozen=True)
class DisplayTable:
    """Rows down, models across, with the same `columns` for each model.

    A list, whose rows are models or the records of a result table, has no models across: `models` is empty, and each
    row has one group of cells. `row_title` heads the names of the rows; None if they have no name. `name` is that of a
    result table that is shown unchanged.
    """

    columns: Sequence[DisplayColumn]
    rows: Sequence[DisplayRow]
    rows_are: Literal["layers", "conditions", "models", "records"]
    models: Sequence[str] = ()
    row_title: str | None = None
    name: str = ""
    caption: str = ""
    notes: Sequence[str] = ()

    @property
    def is_list(self) -> bool:
        """Whether the table has no models across."""
        return self.rows_are in ("models", "records")

    def titles(self, *, short: bool = False) -> list[str]:
        """Return the titles of one model's printed columns."""
        return [title for column in self.columns for title in column.titles(short=short)]

    def printed(self, cells: Sequence[DisplayCell] | None) -> list[PrintedCell]:
        """Return one model's printed columns of one row; all are missing if the model has no such row."""
        row_cells = cells if cells is not None else [None] * len(self.columns)
        return [
            printed
            for column, cell in zip(self.columns, row_cells, strict=True)
            for printed in column.printed(cell)
        ]


def mark_notes(rows: Sequence[DisplayRow], meaning: str) -> list[str]:
    """Return the note that explains the mark, if a cell is marked."""
    cells = (cell for row in rows for group in row.cells for cell in group or ())
    return [f"{MARK} {meaning}"] if any(cell.is_marked for cell in cells) else []
