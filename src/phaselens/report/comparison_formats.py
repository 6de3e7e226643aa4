"""Output formats of a comparison: tables for people, all differences for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import IO, TYPE_CHECKING

from phaselens.report.formats.csv import CsvFormat
from phaselens.report.formats.markdown import escaped, table_lines

if TYPE_CHECKING:
    from phaselens.runs import Comparison


def _write_terminal(comparison: Comparison, file: IO[str]) -> None:
    from phaselens.report.comparison_tables import print_comparison
    from phaselens.report.terminal_layout import console

    print_comparison(comparison, console(file))


def _write_json(comparison: Comparison, file: IO[str]) -> None:
    file.write(json.dumps(comparison.to_dict(), allow_nan=False) + "\n")


def _write_csv(comparison: Comparison, file: IO[str]) -> None:
    CsvFormat().write_table("differences", comparison.differences, file)


def _write_markdown(comparison: Comparison, file: IO[str]) -> None:
    from phaselens.report.comparison_tables import comparison_notes, comparison_tables

    first, second = comparison.titles
    lines = [f"### {escaped(second)} − {escaped(first)}", ""]
    for table in comparison_tables(comparison):
        lines += table_lines(replace(table, models=[""]))  # the heading names both
    lines += [f"- {escaped(note)}" for note in comparison_notes(comparison)]
    file.write("\n".join(lines) + "\n")


Writer = Callable[["Comparison", IO[str]], None]

#: What writes a comparison, by the name of the format; the first is the default.
COMPARISON_FORMATS: dict[str, Writer] = {
    "table": _write_terminal,
    "json": _write_json,
    "csv": _write_csv,
    "markdown": _write_markdown,
}
