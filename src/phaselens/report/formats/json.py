"""JSON for programs."""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING, ClassVar

from phaselens.report.formats.base import RunFormat, TableFormat

if TYPE_CHECKING:
    from phaselens.plugin import Table
    from phaselens.runs import Run


class JsonFormat(RunFormat, TableFormat):
    """JSON of the whole run, or of a table, as one strict object: no NaN, no infinity, ASCII only."""

    help: ClassVar[str] = "everything"
    shows_tracebacks: ClassVar[bool] = True

    def write_run(self, run: Run, file: IO[str]) -> None:
        file.write(json.dumps(run.to_dict(), allow_nan=False) + "\n")

    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        file.write(json.dumps({"table": name, **table.as_dict()}, allow_nan=False) + "\n")
