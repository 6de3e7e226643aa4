"""CSV for spreadsheets and data frames."""

from __future__ import annotations

import csv
from typing import IO, TYPE_CHECKING, ClassVar

from phaselens.report.formats.base import TableFormat

if TYPE_CHECKING:
    from phaselens.plugin import Table


class CsvFormat(TableFormat):
    """CSV of one result table with a header line and unrounded numbers; a missing value is an empty field."""

    help: ClassVar[str] = "one table"

    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.name for column in table.spec.columns])
        writer.writerows(table.rows)
