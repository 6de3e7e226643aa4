"""Tables on a terminal."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, ClassVar

from phaselens.report.formats.base import RunFormat, TableFormat

if TYPE_CHECKING:
    from phaselens.plugin import Table
    from phaselens.runs import Run


class TerminalFormat(RunFormat, TableFormat):
    """Tables with models side by side, as wide as the terminal, or 100 columns elsewhere."""

    help: ClassVar[str] = "for people"

    def write_run(self, run: Run, file: IO[str]) -> None:
        from phaselens.report.terminal_layout import console, print_run

        print_run(run, console(file))

    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        from phaselens.report.builders import result_table
        from phaselens.report.terminal_layout import console, print_table

        print_table(result_table(name, table), console(file))
