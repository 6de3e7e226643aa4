"""Result tables in long form: one row per text, layer or head, and a type and a unit for every column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches, is_list_like, require_flag, require_text
from phaselens.plugin.author_errors import author_error, describe_value

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

CellValue = str | int | float | None


@dataclass(frozen=True)
class Column:
    """One column of a table. `type` is str, int or float; `unit` is None for names and labels."""

    name: str
    type: type = float
    unit: str | None = None
    help: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise author_error(f"a column's name is {describe_value(self.name)}; give text")
        if self.type not in (str, int, float):
            raise author_error(
                f"column {self.name}: its type is {describe_value(self.type)}; give str, int or float"
            )
        if self.unit is not None and not isinstance(self.unit, str):
            raise author_error(
                f"column {self.name}: its unit is {describe_value(self.unit)}; give text, or None"
            )
        if not isinstance(self.help, str):
            raise author_error(f"column {self.name}: its help is {describe_value(self.help)}; give text")


def interval_help(over: str = "texts", *, paired: bool = False) -> str:
    """Return the help text for the two columns of an interval from `phaselens.uncertainty`.

    >>> interval_help("prompts")
    '95 % interval, percentile bootstrap over prompts: all resamples of up to 8, else 10,000 drawn with the seed'
    """
    require_text("over", over)
    require_flag("paired", paired)
    method = "paired percentile bootstrap" if paired else "percentile bootstrap"
    return f"95 % interval, {method} over {over}: all resamples of up to 8, else 10,000 drawn with the seed"


#: The column that a run puts before all others, so that one table holds several models.
MODEL = Column("model", str, None, "the model's label")


@dataclass(frozen=True)
class TableSpec:
    """The declaration of a table. The run adds a `model` column in front. A column named `text` holds text ids; a
    table with such a column is sorted in the order of the texts."""

    name: str
    columns: tuple[Column, ...]
    help: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise author_error(f"a table's name is {describe_value(self.name)}; give text")
        columns: object = self.columns
        if not isinstance(columns, tuple | list) or not all(isinstance(column, Column) for column in columns):
            raise author_error(
                f"table {self.name}: its columns are {describe_value(columns)}; give a tuple of Columns"
            )
        if not isinstance(self.help, str):
            raise author_error(f"table {self.name}: its help is {describe_value(self.help)}; give text")

    def build(self, rows: Iterable[Sequence[Any]]) -> Table:
        """Create a table from rows of cells. A number that is NaN or infinite becomes None and is counted."""
        if not is_list_like(rows):
            raise author_error(
                f"table {self.name}: its rows are {describe_value(rows)}; give a list of rows, each a tuple of cells"
            )
        table = Table(self)
        for row in rows:
            table.append(row)
        return table

    def index(self, column: str) -> int:
        """Return the index of `column`; InputError lists close matches for an unknown one."""
        names = [declared.name for declared in self.columns]
        if column not in names:
            raise InputError(f"table {self.name} has no column {column!r}; {close_matches(column, names)}")
        return names.index(column)


@dataclass
class Table:
    """A table of plain Python values: str, int, finite float, or None for a missing value."""

    spec: TableSpec
    rows: list[tuple[CellValue, ...]] = field(default_factory=list)
    not_finite: dict[str, int] = field(default_factory=dict)

    def append(self, row: Sequence[Any]) -> None:
        """Add a row after checking it against the columns; TypeError names the cell that does not fit."""
        columns = self.spec.columns
        if isinstance(row, str | Mapping) or not hasattr(row, "__len__"):
            raise author_error(
                f"table {self.spec.name}: a row is {describe_value(row)}; give a tuple of cells in the columns' order, "
                f"({', '.join(column.name for column in columns)})"
            )
        if len(row) != len(columns):
            raise author_error(
                f"table {self.spec.name}: a row has {len(row)} cells for {len(columns)} columns "
                f"({', '.join(column.name for column in columns)})"
            )
        cells: list[CellValue] = []
        for column, value in zip(columns, row, strict=True):
            # Nearly every cell fits already and skips the slow check: large models have millions of cells.
            cell_type = type(value)
            fits = cell_type is column.type and (cell_type is not float or isfinite(value))
            cells.append(value if fits or value is None else self._cell(column, value))
        self.rows.append(tuple(cells))

    def _cell(self, column: Column, value: Any) -> CellValue:
        if getattr(value, "shape", ()) != () and value.shape.count(1) != len(value.shape):
            raise author_error(
                f"table {self.spec.name}, column {column.name}: a cell is {describe_value(value)}; give one "
                f"{column.type.__name__} per cell: index it, or reduce it"
            )
        value = value.item() if hasattr(value, "item") else value  # scalars of numpy and torch
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
        raise author_error(
            f"table {self.spec.name}, column {column.name}: {value!r} is not of type {column.type.__name__}"
        )

    def column(self, name: str) -> list[CellValue]:
        """Return all cells of one column, top to bottom."""
        index = self.spec.index(name)
        return [row[index] for row in self.rows]

    def records(self) -> list[dict[str, CellValue]]:
        """Return all rows as dicts by column name."""
        names = [column.name for column in self.spec.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def as_dict(self) -> dict[str, Any]:
        """Return `{"columns": [{"name", "unit"}], "rows": [[…]]}`: plain JSON values."""
        columns = [{"name": column.name, "unit": column.unit} for column in self.spec.columns]
        return {"columns": columns, "rows": [list(row) for row in self.rows]}

    def _repr_html_(self) -> str:
        from phaselens.plugin.table_html import table_html

        return table_html(self)

    def to_arrow(self) -> pa.Table:
        """Convert the table to a pyarrow Table; the metadata of each field holds its unit."""
        import pyarrow as pa

        types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
        fields = [
            pa.field(column.name, types[column.type], metadata={"unit": column.unit} if column.unit else None)
            for column in self.spec.columns
        ]
        arrays = [pa.array(self.column(field.name), type=field.type) for field in fields]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def to_pandas(self) -> pd.DataFrame:
        """Convert the table to a pandas DataFrame; `frame.attrs["units"]` has the unit of each column.

        Raises:
            InputError: where pandas is not installed.
        """
        try:
            import pandas  # noqa: F401 - pyarrow imports it
        except ImportError as error:
            raise InputError(
                "pandas is not installed; install it (pip install pandas), or use to_arrow()"
            ) from error
        frame = self.to_arrow().to_pandas()
        frame.attrs["units"] = {column.name: column.unit for column in self.spec.columns}
        return frame
