"""CSV for spreadsheets and data frames."""

from __future__ import annotations

import csv
from typing import IO, TYPE_CHECKING, ClassVar

from phaselens.report.formats.base import TableFormat
from phaselens.report.strings import escaped

if TYPE_CHECKING:
    from phaselens.plugin import Table


def _cell(value: object) -> object:
    """Return a cell; text without control characters except line ends, and not as a formula of a spreadsheet."""
    if not isinstance(value, str):
        return value
    text = "\n".join(map(escaped, value.split("\n")))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


class CsvFormat(TableFormat):
    """CSV of one result table with a header line and unrounded numbers; a missing value is an empty field."""

    help: ClassVar[str] = "one table"

    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.name for column in table.spec.columns])
        writer.writerows([*map(_cell, row)] for row in table.rows)
