"""The commands `phaselens show`, `export` and `runs`, which read run directories and load no model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from phaselens.cli import shared_options
from phaselens.cli.output import Output, export_format_option, report_failures, table_option
from phaselens.cli.streams import print_message
from phaselens.errors import InputError
from phaselens.report.formats import DEFAULT_FORMAT, run_formats

if TYPE_CHECKING:
    from phaselens.runs import Run, RunSummary

_QUIET = click.option("--quiet", is_flag=True, help="Show no notes on stderr.")


@click.command()
@click.argument("directory", metavar="DIR")
@table_option
@shared_options.by
@_QUIET
@shared_options.debug
def show(directory: str, table: str | None, by: str | None, quiet: bool, debug: bool) -> int:
    """Print the tables of the run in DIR again, as `phaselens run --out DIR` printed them."""
    run = _open(directory, by)
    _output(run, DEFAULT_FORMAT, table, quiet=quiet, by=by).write(run)
    return report_failures(run, debug=debug)


@click.command()
@click.argument("directory", metavar="DIR")
@export_format_option
@table_option
@click.option(
    "--out",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Write to this file instead of stdout; csv and parquet without --table: to a folder, one file per table.",
)
@shared_options.by
@_QUIET
@shared_options.debug
def export(
    directory: str,
    format_name: str,
    table: str | None,
    out: Path | None,
    by: str | None,
    quiet: bool,
    debug: bool,
) -> int:
    """Write the results of the run in DIR in another format, to stdout or to --out."""
    run = _open(directory, by)
    if out is not None and table is None and format_name not in run_formats():
        names = [f"{metric}.{name}" for metric, result in run.metrics.items() for name in result.tables]
        for name in names:
            _write_file(
                run, _output(run, format_name, name, quiet=True, by=by), out / f"{name}.{format_name}"
            )
        if not quiet:
            print_message("note", f"{len(names)} tables in {out}")
        return report_failures(run, debug=debug)
    output = _output(run, format_name, table, quiet=quiet, by=by)
    if out is not None:
        _write_file(run, output, out)
    else:
        output.require_file()
        if table is None and output.table is not None and not quiet:
            print_message(
                "note", f"this is the table {output.table}; --table selects another, --out writes all"
            )
        output.write(run)
    return report_failures(run, debug=debug)


@click.command()
@click.argument("directories", nargs=-1, required=True, metavar="DIR...")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array instead of a table.")
def runs(directories: tuple[str, ...], as_json: bool) -> int:
    """List the runs in DIR and in the folders below it: when they began, their models, metrics and texts, and whether
    they are complete, how many shards are finished, or which metrics failed.
    """
    from phaselens.runs import RunSummary, find_runs

    summaries: list[RunSummary] = []
    paths = find_runs(directories)
    for path in paths:
        try:
            summaries.append(RunSummary.read(path))
        except InputError as error:
            print_message("error", str(error))
    summaries.sort(key=lambda summary: summary.started)
    if as_json:
        click.echo(json.dumps([summary.as_dict() for summary in summaries], allow_nan=False))
    elif summaries:
        _print_summaries(summaries)
    return 0 if len(summaries) == len(paths) else InputError.exit_code


def _open(directory: str, by: str | None) -> Run:
    """Return the run in a directory, grouped by label if `by` says so."""
    from phaselens.api import open_run
    from phaselens.runs import group_by_label

    run = open_run(directory)
    return run if by is None else group_by_label(run)


def _output(run: Run, format_name: str, table: str | None, *, quiet: bool, by: str | None) -> Output:
    metrics = {name: result.metric for name, result in run.metrics.items()}
    return Output.choose(format_name, metrics, table, quiet=quiet, by_label=by is not None)


def _write_file(run: Run, output: Output, path: Path) -> None:
    """Write to a file, which appears complete."""
    from phaselens.data.new_files import partial_path

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_path(path) as partial:
            with partial.open("w", encoding="utf-8", newline="") as file:
                output.write_to(run, file)
            partial.replace(path)
    except OSError as error:
        raise InputError(f"--out {str(path)!r} cannot be written: {error.strerror or error}") from error


def _print_summaries(summaries: list[RunSummary]) -> None:
    from phaselens.report.terminal_layout import console, print_rows

    rows = [
        (
            str(summary.path),
            summary.started.replace("T", " ")[:16],
            summary.state,
            ", ".join(summary.models),
            f"{summary.n_texts:,} ({summary.texts})",
            ", ".join(summary.metrics),
        )
        for summary in summaries
    ]
    print_rows(["run", "began (UTC)", "state", "models", "texts", "metrics"], rows, console(sys.stdout))
