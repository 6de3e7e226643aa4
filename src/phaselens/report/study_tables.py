"""A study's table on a terminal: a row per published value, with numbered reasons beneath."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from phaselens.plugin import CellValue
from phaselens.report.numbers import NumberFormat
from phaselens.report.strings import printable
from phaselens.report.table import Record
from phaselens.report.terminal_layout import WIDTH, plain_text
from phaselens.runs import StudyResult
from phaselens.runs.study_file import REASON_SEPARATOR
from phaselens.runs.study_result import NO_SUCH_LAYER

_EXACT = NumberFormat("compact", 3)
_LAYER = NumberFormat("layer")
_TITLES = ("value", "model", "at", "published", "measured", "difference", "comparable")
_N_LEFT = 2


def print_study(result: StudyResult, output: Console) -> None:
    """Print the values of all runs in one table, then the reasons why values are not comparable."""
    records = result.table.records()
    reasons = list(
        dict.fromkeys(reason for record in records for reason in _reasons(record) if reason != NO_SUCH_LAYER)
    )
    output.print(Text(printable(result.study.title), style="bold"))
    output.print(Text(printable(result.study.source), style="dim"))
    cells = [_cells(record, reasons) for record in records]
    widths = [max(map(len, column)) for column in zip(_TITLES, *cells, strict=True)]
    if records:
        _print_row(_TITLES, widths, output, style="bold")
    for run in result.study.runs:
        output.print(Text(f"{printable(run.name)}: {printable(run.description)}", style="italic"))
        n_lacking = 0
        for record, row in zip(records, cells, strict=True):
            if record["run"] == run.name and NO_SUCH_LAYER in _reasons(record):
                n_lacking += 1
            elif record["run"] == run.name:
                _print_row(row, widths, output)
        if n_lacking:
            noun = "value" if n_lacking == 1 else "values"
            output.print(
                Text(f"  {n_lacking} more {noun} of layers that the measured models lack", style="dim")
            )
    if not records:
        output.print(
            Text(
                "The study has no published value that could be checked against its source; its runs are measured."
            )
        )
    for number, reason in enumerate(reasons, 1):
        output.print(Text(f"({number}) {printable(reason)}", style="dim"))


def as_text(result: StudyResult) -> str:
    """Return a study's result as plain text, 100 columns wide."""
    return plain_text(lambda output: print_study(result, output), WIDTH)


def _reasons(record: Record) -> list[str]:
    return [reason for reason in str(record["why"] or "").split(REASON_SEPARATOR) if reason]


def _cells(record: Record, reasons: Sequence[str]) -> list[str]:
    numbers = [str(1 + reasons.index(reason)) for reason in _reasons(record) if reason in reasons]
    layer = "" if record["layer"] is None else _LAYER.write(record["layer"])
    return [
        printable(str(record["quantity"])),
        printable(str(record["model"])),
        layer,
        *(_number(record[column]) for column in ("published", "measured", "difference")),
        f"no ({', '.join(numbers)})" if numbers else "yes",
    ]


def _number(value: CellValue) -> str:
    """Format a number; whole ones, such as layers, without decimals."""
    return _EXACT.write(int(value) if isinstance(value, float) and value.is_integer() else value)


def _print_row(cells: Sequence[str], widths: Sequence[int], output: Console, style: str = "") -> None:
    """Print a row on one line, however wide."""
    output.print(Text(_line(cells, widths), style=style), no_wrap=True, crop=False, overflow="ignore")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a row with names to the left and numbers to the right of their columns."""
    last = len(cells) - 1
    padded = [
        cell.ljust(width) if index < _N_LEFT or index == last else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  " + "  ".join(padded).rstrip()
