"""The base classes of output formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import IO, TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from phaselens.plugin import Table
    from phaselens.runs import Run


class OutputFormat(ABC):
    """An output format. `help` describes it in a few words for `phaselens run --help`.

    `shows_tracebacks` says whether it writes the tracebacks of metrics that failed, `is_binary` whether it writes
    bytes, which no terminal can show.
    """

    help: ClassVar[str]
    shows_tracebacks: ClassVar[bool] = False
    is_binary: ClassVar[bool] = False


class RunFormat(OutputFormat):
    """A format that can represent a whole run."""

    @abstractmethod
    def write_run(self, run: Run, file: IO[str]) -> None:
        """Write all metrics of a run."""


class TableFormat(OutputFormat):
    """A format that can represent one result table."""

    @abstractmethod
    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        """Write the result table `name` (METRIC.TABLE), all rows."""
