"""Result tables: long, a row per text or layer or head, every column with a type and a unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches, is_list_like, require_flag, require_text
from phaselens.plugin.mistakes import kind_of, mistake

if TYPE_CHECKING:
    import pyarrow as pa

Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """One column. `type` is str, int or float; `unit` is None for names and labels."""

    name: str
    type: type = float
    unit: str | None = None
    help: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise mistake(f"a column's name is {kind_of(self.name)}; give text")
        if self.type not in (str, int, float):
            raise mistake(f"column {self.name}: its type is {kind_of(self.type)}; give str, int or float")
        if self.unit is not None and not isinstance(self.unit, str):
            raise mistake(f"column {self.name}: its unit is {kind_of(self.unit)}; give text, or None")
        if not isinstance(self.help, str):
            raise mistake(f"column {self.name}: its help is {kind_of(self.help)}; give text")


def interval_help(over: str = "texts", *, paired: bool = False) -> str:
    """What the two ends of an interval from `phaselens.uncertainty` are, for the help of their columns.

    >>> interval_help("prompts")
    '95 % interval, percentile bootstrap over prompts: all resamples of up to 8, of more 10,000 drawn by the seed'
    """
    require_text("over", over)
    require_flag("paired", paired)
    kind = "paired percentile bootstrap" if paired else "percentile bootstrap"
    return f"95 % interval, {kind} over {over}: all resamples of up to 8, of more 10,000 drawn by the seed"


#: The column that a run puts before all others, so that the tables of several models stand together.
MODEL = Column("model", str, None, "the model's label")


@dataclass(frozen=True)
class TableSpec:
    """What a table holds. The run puts a `model` column in front; a column named `text` holds text ids, and a
    table that has one comes out in the order of the texts."""

    name: str
    columns: tuple[Column, ...]
    help: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise mistake(f"a table's name is {kind_of(self.name)}; give text")
        columns: Any = self.columns
        if not isinstance(columns, tuple | list) or not all(isinstance(each, Column) for each in columns):
            raise mistake(f"table {self.name}: its columns are {kind_of(columns)}; give a tuple of Columns")
        if not isinstance(self.help, str):
            raise mistake(f"table {self.name}: its help is {kind_of(self.help)}; give text")

    def build(self, rows: Iterable[Sequence[Any]]) -> Table:
        """A table of these columns. A number that is NaN or infinite becomes null, and is counted."""
        if not is_list_like(rows):
            raise mistake(
                f"table {self.name}: its rows are {kind_of(rows)}; give a list of rows, each a tuple of cells"
            )
        table = Table(self)
        for row in rows:
            table.append(row)
        return table

    def index(self, column: str) -> int:
        """Where `column` stands; ValueError where there is none."""
        names = [each.name for each in self.columns]
        if column not in names:
            raise InputError(f"table {self.name} has no column {column!r}; {close_matches(column, names)}")
        return names.index(column)


@dataclass
class Table:
    """Rows of plain Python values: str, int, finite float, or None for missing."""

    spec: TableSpec
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    not_finite: dict[str, int] = field(default_factory=dict)

    def append(self, row: Sequence[Any]) -> None:
        """Add a row, checked against the columns; TypeError says which cell does not fit."""
        columns = self.spec.columns
        if isinstance(row, str | Mapping) or not hasattr(row, "__len__"):
            raise mistake(
                f"table {self.spec.name}: a row is {kind_of(row)}; give a tuple of cells in the columns' order, "
                f"({', '.join(column.name for column in columns)})"
            )
        if len(row) != len(columns):
            raise mistake(
                f"table {self.spec.name}: a row of {len(row)} cells for {len(columns)} columns "
                f"({', '.join(column.name for column in columns)})"
            )
        cells: list[Cell] = []
        for column, value in zip(columns, row, strict=True):
            # What is right already, nearly every cell, is not looked at twice: large models have millions.
            kind = type(value)
            fits = kind is column.type and (kind is not float or isfinite(value))
            cells.append(value if fits or value is None else self._cell(column, value))
        self.rows.append(tuple(cells))

    def _cell(self, column: Column, value: Any) -> Cell:
        if getattr(value, "shape", ()) != () and value.shape.count(1) != len(value.shape):
            raise mistake(
                f"table {self.spec.name}, column {column.name}: a cell is {kind_of(value)}; give one "
                f"{column.type.__name__} a cell: index it, or reduce it"
            )
        value = value.item() if hasattr(value, "item") else value  # numpy's and torch's scalars
        if column.type is str and isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not isfinite(value):
                self.not_finite[column.name] = self.not_finite.get(column.name, 0) + 1
                return None
            if column.type is float:
                return float(value)
            if column.type is int and value == int(value):
                return int(value)
        raise mistake(f"table {self.spec.name}, column {column.name}: {value!r} is no {column.type.__name__}")

    def column(self, name: str) -> list[Cell]:
        """All cells of one column, top to bottom."""
        at = self.spec.index(name)
        return [row[at] for row in self.rows]

    def records(self) -> list[dict[str, Cell]]:
        """All rows, each by column name."""
        names = [column.name for column in self.spec.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def as_dict(self) -> dict[str, Any]:
        """`{"columns": [{"name", "unit"}], "rows": [[…]]}`: plain JSON values."""
        columns = [{"name": column.name, "unit": column.unit} for column in self.spec.columns]
        return {"columns": columns, "rows": [list(row) for row in self.rows]}

    def to_arrow(self) -> pa.Table:
        """The same as a pyarrow Table; a column's unit is in its field's metadata."""
        import pyarrow as pa

        types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
        fields = [
            pa.field(column.name, types[column.type], metadata={"unit": column.unit} if column.unit else None)
            for column in self.spec.columns
        ]
        arrays = [pa.array(self.column(each.name), type=each.type) for each in fields]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))
