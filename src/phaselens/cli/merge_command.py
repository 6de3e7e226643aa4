"""The command `phaselens merge`."""

from __future__ import annotations

import click

from phaselens.cli import shared_options
from phaselens.cli.output import Output, format_option, report_failures, table_option
from phaselens.cli.streams import only_results, only_results_on_stdout, print_message
from phaselens.plugin import plugins


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
@only_results
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
    from phaselens.runs.run_directory import RunDirectory

    names = RunDirectory(directory).read_record()["metrics"]
    metrics = {name: plugins().metric(name) for name in names}
    output = Output.choose(format_name, metrics, table, quiet=quiet)
    output.require_file()
    with only_results_on_stdout(debug=debug):
        run = merge_run(directory, allow_missing=allow_missing)
        draw_in_directory(run)
    output.write(run)
    if not quiet:
        print_message("note", f"the run is in {run.directory}")
    return report_failures(run, debug=debug)
