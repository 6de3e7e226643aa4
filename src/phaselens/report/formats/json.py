"""JSON for programs."""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING, ClassVar

from phaselens.report.formats.base import RunFormat

if TYPE_CHECKING:
    from phaselens.runs import Run


class JsonFormat(RunFormat):
    """JSON of the whole run, as one strict object: no NaN, no infinity, ASCII only."""

    help: ClassVar[str] = "everything"
    shows_tracebacks: ClassVar[bool] = True

    def write_run(self, run: Run, file: IO[str]) -> None:
        file.write(json.dumps(run.to_dict(), allow_nan=False) + "\n")
