"""The output of a run on stdout: the format, and whether it is the whole run or one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from phaselens.cli.interrupts import patient_interrupt
from phaselens.cli.streams import print_message, results_stream
from phaselens.errors import InputError
from phaselens.plugin import Metric
from phaselens.report.formats import (
    DEFAULT_FORMAT,
    FORMATS,
    OutputFormat,
    RunFormat,
    TableFormat,
    formats_with_tracebacks,
    run_formats,
    table_formats,
)

if TYPE_CHECKING:
    from phaselens.runs import Run

F = TypeVar("F", bound=Callable[..., object])


def format_option(command: F) -> F:
    """Add `--format`, whose choices and help are those of the registry of formats."""
    return _format_option(FORMATS, default=DEFAULT_FORMAT)(command)


def export_format_option(command: F) -> F:
    """Add `--format` without the terminal's tables, and without a default."""
    formats = {name: output_format for name, output_format in FORMATS.items() if name != DEFAULT_FORMAT}
    return _format_option(formats, required=True)(command)


def _format_option(formats: Mapping[str, type[OutputFormat]], **settings: Any) -> Callable[[F], F]:
    return click.option(
        "--format",
        "format_name",
        type=click.Choice(list(formats)),
        help="; ".join(f"{name}: {output_format.help}" for name, output_format in formats.items()) + ".",
        **settings,
    )


def table_option(command: F) -> F:
    """Add `--table`, whose help names the formats that need a table."""
    one_table_formats = ", ".join(name for name in FORMATS if name not in run_formats())
    option = click.option(
        "--table",
        metavar="[METRIC.]NAME",
        help=f"Print this result table in full ({one_table_formats} without --table: layers, or the displayed table).",
    )
    return option(command)


def traceback_options() -> str:
    """Return the options with which a run prints the tracebacks of metrics that failed."""
    return ", ".join(["--debug", *(f"--format {name}" for name in formats_with_tracebacks())])


@dataclass(frozen=True)
class Output:
    """An output format, and the table `METRIC.TABLE` to write in it, or None for the whole run."""

    output_format: OutputFormat
    table: str | None
    quiet: bool

    @classmethod
    def choose(
        cls,
        format_name: str,
        metrics: Mapping[str, type[Metric[Any]]],
        table: str | None,
        *,
        quiet: bool,
        by_label: bool = False,
    ) -> Output:
        """Return the output of a run of `metrics` that the options ask for, checked before anything is measured.

        With `by_label`, metrics have the table of means by label too, which is then the default table.

        Raises:
            InputError: for a table that no metric declares, or a format that cannot write a single table.
        """
        output_format = FORMATS[format_name]()
        if table is not None and not isinstance(output_format, TableFormat):
            *format_names, last_name = sorted(table_formats())
            raise InputError(
                f"--format {format_name} prints all tables; leave --table out, or choose "
                f"{', '.join(format_names)} or {last_name}"
            )
        if table is None and isinstance(output_format, RunFormat):
            return cls(output_format, None, quiet)
        from phaselens.report.table_names import default_table, find_table
        from phaselens.runs import BY_LABEL

        declared = {name: [spec.name for spec in metric.tables] for name, metric in metrics.items()}
        for name, metric in metrics.items():
            declared[name] += [BY_LABEL] if by_label and metric.prints else []
        default = BY_LABEL if by_label else default_table(metrics.values())
        chosen = find_table(declared, table or default)
        return cls(output_format, ".".join(chosen), quiet)

    @property
    def is_terminal(self) -> bool:
        """Whether the output is the tables of a whole run for a terminal."""
        return self.table is None and isinstance(self.output_format, FORMATS[DEFAULT_FORMAT])

    def require_file(self) -> None:
        """Raise InputError for a binary format on a terminal."""
        stream = results_stream()
        if self.output_format.is_binary and stream is not None and stream.isatty():
            name = next(name for name, kind in FORMATS.items() if isinstance(self.output_format, kind))
            raise InputError(f"--format {name} is binary; redirect it to a file: … > FILE.{name}")

    def write(self, run: Run) -> None:
        """Write the run or its table in full, even if Ctrl-C is pressed meanwhile."""
        stream = results_stream()
        if stream is None:
            return
        with patient_interrupt():
            self.write_to(run, stream)
            stream.flush()

    def write_to(self, run: Run, file: IO[str]) -> None:
        """Write the run or its table to a file, and notes on a table to stderr."""
        output_format = self.output_format
        if self.table is None:
            if isinstance(output_format, RunFormat):
                from phaselens.report.document import printed_run

                output_format.write_run(printed_run(run), file)
            return
        metric, _, name = self.table.partition(".")
        tables = run.result(metric).tables
        if name not in tables:
            return  # the metric failed on every model, which the command's errors report
        if isinstance(output_format, TableFormat):
            output_format.write_table(self.table, tables[name], file)
        if not self.quiet:
            self._print_warnings(run)

    def _print_warnings(self, run: Run) -> None:
        """Print the run's warnings as notes on stderr, because a single table does not contain them."""
        from phaselens.runs.result import NotMeasured

        not_measured = (warning for warning in run.warnings if isinstance(warning, NotMeasured))
        ending = next(not_measured, None)  # printed as the error that the command ends with
        for warning in run.warnings:
            if warning is not ending:
                print_message("note", warning)


def report_failures(run: Run, *, debug: bool = False) -> int:
    """Print one line per failure on stderr, with `debug` after its traceback, and return the exit code."""
    for name in run.failed:
        for failure in run.metrics[name].failures:
            if debug:
                click.echo(failure.traceback.rstrip("\n"), err=True)
            print_message(
                "error",
                f"metric {name} failed: {failure}; the other results are complete ({traceback_options()})",
            )
    for shard in run.failed_shards:
        print_message("error", f"{shard}; to try again, repeat its command")
    return 1 if run.failed or run.failed_shards else 0
