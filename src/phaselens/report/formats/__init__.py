"""The registry of output formats. A new format is one class in one file, and its line in `FORMATS`.

The class extends `RunFormat` if it can represent a whole run, `TableFormat` if one result table, or both.
`phaselens run` reads its choices, its default (the first format) and its help from the registry.
"""

from __future__ import annotations

from phaselens.report.formats.base import OutputFormat, RunFormat, TableFormat
from phaselens.report.formats.csv import CsvFormat
from phaselens.report.formats.json import JsonFormat
from phaselens.report.formats.latex import LatexFormat
from phaselens.report.formats.markdown import MarkdownFormat
from phaselens.report.formats.parquet import ParquetFormat
from phaselens.report.formats.terminal import TerminalFormat

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "OutputFormat",
    "RunFormat",
    "TableFormat",
    "formats_with_tracebacks",
    "run_formats",
    "table_formats",
]

FORMATS: dict[str, type[OutputFormat]] = {
    "table": TerminalFormat,
    "json": JsonFormat,
    "csv": CsvFormat,
    "markdown": MarkdownFormat,
    "parquet": ParquetFormat,
    "latex": LatexFormat,
}

DEFAULT_FORMAT = next(iter(FORMATS))


def run_formats() -> list[str]:
    """Return the names of the formats that can represent a whole run; the others need one table."""
    return [name for name, output_format in FORMATS.items() if issubclass(output_format, RunFormat)]


def table_formats() -> list[str]:
    """Return the names of the formats that can represent one result table."""
    return [name for name, output_format in FORMATS.items() if issubclass(output_format, TableFormat)]


def formats_with_tracebacks() -> list[str]:
    """Return the names of the formats that write the tracebacks of failures."""
    return [name for name, output_format in FORMATS.items() if output_format.shows_tracebacks]
