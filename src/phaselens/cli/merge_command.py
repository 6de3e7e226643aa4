"""The command `phaselens merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from phaselens.cli import shared_options
from phaselens.cli.output import Output, format_option, table_option
from phaselens.cli.streams import only_results_on_stdout, print_message
from phaselens.plugin import plugins

if TYPE_CHECKING:
    from phaselens.runs import Run


@click.command(context_settings={"show_default": True})
@click.argument("directory", metavar="DIR")
@click.option(
    "--allow-missing", is_flag=True, help="Leave out shards that no part has computed, and report them."
)
@shared_options.plugin_file
@format_option
@table_option
@click.option("--quiet", is_flag=True, help="Show no notes on stderr.")
@shared_options.debug
def merge(
    directory: str,
    allow_missing: bool,
    files: tuple[str, ...],
    format_name: str,
    table: str | None,
    quiet: bool,
    debug: bool,
) -> int:
    """Make the tables of a run whose parts were computed by `phaselens run --shards PART/PARTS --out DIR`.

    No model is loaded. If conditions follow from the observations of all parts, they must have been run by then.
    """
    for path in files:
        plugins().add_file(path)
    from phaselens.report.figures import draw_in_directory
    from phaselens.runs import merge as merge_run
    from phaselens.runs import metrics_of

    output = Output.choose(format_name, metrics_of(directory), table, quiet=quiet)
    with only_results_on_stdout(debug=debug):
        run = merge_run(directory, allow_missing=allow_missing)
        draw_in_directory(run)
    output.write(run)
    if not quiet:
        print_message("note", f"the run is in {run.directory}")
    return report_failures(run, debug=debug)


def report_failures(run: Run, *, debug: bool) -> int:
    """Print one line per failure on stderr, with `debug` after its traceback, and return the exit code."""
    from phaselens.cli.output import traceback_options

    for name in run.failed:
        for failure in run.metrics[name].failures:
            if debug:
                click.echo(failure.traceback.rstrip("\n"), err=True)
            print_message(
                "error",
                f"metric {name} failed: {failure}; the other results are complete ({traceback_options()})",
            )
    for shard in run.failed_shards:
        print_message("error", f"{shard}; the same command tries again")
    return 1 if run.failed or run.failed_shards else 0
