"""The commands `phaselens study run`, `list`, `show` and `check`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from phaselens.cli import shared_options
from phaselens.cli.interrupts import patient_interrupt
from phaselens.cli.streams import only_results, only_results_on_stdout, print_message, results_stream
from phaselens.errors import InputError
from phaselens.report.formats import DEFAULT_FORMAT, FORMATS, TableFormat
from phaselens.report.strings import aligned_columns, printable

if TYPE_CHECKING:
    from phaselens.runs import StudyResult

_FORMATS = [DEFAULT_FORMAT, "json", "csv", "markdown"]


@click.group("study")
def study() -> None:
    """Hold published values against measured ones. A study is a TOML file; it runs no code of its own."""


@study.command("run")
@click.argument("name", metavar="FILE|NAME")
@click.argument("more_models", nargs=-1, metavar="")
@click.option(
    "--models",
    multiple=True,
    metavar="[LABEL=]SOURCE...",
    help="Models in place of the study's, in its order; several after one flag, or separated by commas.",
)
@click.option("--out", metavar="DIR", help="Keep the runs in this folder; the same command continues.")
@shared_options.device
@click.option(
    "--format", "format_name", type=click.Choice(_FORMATS), default=DEFAULT_FORMAT, show_default=True
)
@click.option("--quiet", is_flag=True, help="Show no progress bar and no notes on stderr.")
@shared_options.debug
@only_results
def run_command(
    name: str,
    more_models: tuple[str, ...],
    models: tuple[str, ...],
    out: str | None,
    device: str,
    format_name: str,
    quiet: bool,
    debug: bool,
) -> int:
    """Measure a study's models by its protocols, and print each published value beside the measured one.

    FILE|NAME is a TOML file, or one of `phaselens study list`. A value is comparable only if nothing differs: model,
    texts, protocol, and no known trap.
    """
    from phaselens.report.progress import ProgressBar
    from phaselens.runs import read_study, run_study

    if more_models and not models:
        raise InputError(f"{' '.join(more_models)}: name models with --models")
    chosen = [part for value in (*models, *more_models) for part in value.split(",") if part]
    plan = read_study(name)
    with only_results_on_stdout(debug=debug), ProgressBar(quiet=quiet) as observer:
        result = run_study(plan, models=chosen, out=out, device=device, observer=observer)
    with patient_interrupt():
        _write(result, format_name)
    if not quiet:
        for run_name, run in result.runs.items():
            for warning in run.warnings:
                print_message("note", f"{run_name}: {warning}")
    for failed in result.failed:
        print_message("error", f"metric failed in {failed}; the other values are complete")
    return 1 if result.failed else 0


def _write(result: StudyResult, format_name: str) -> None:
    stream = results_stream()
    if stream is None:
        return
    if format_name == DEFAULT_FORMAT:
        from phaselens.report.study_tables import print_study
        from phaselens.report.terminal_layout import console

        print_study(result, console(stream))
    else:
        output_format = FORMATS[format_name]()
        if isinstance(output_format, TableFormat):
            output_format.write_table(result.study.name, result.table, stream)
    stream.flush()


@study.command("list")
def list_command() -> None:
    """List the shipped studies."""
    from phaselens.runs import read_study, shipped_studies

    studies = [read_study(name) for name in shipped_studies()]
    rows = [[plan.name, str(len(plan.values)), plan.title, plan.source] for plan in studies]
    click.echo("\n".join(aligned_columns(["name", "values", "title", "source"], rows)))


@study.command("show")
@click.argument("name", metavar="FILE|NAME")
def show_command(name: str) -> None:
    """Show a study: its source, models, protocols, and numbers of published values."""
    from phaselens.runs import read_study

    plan = read_study(name)
    click.echo(f"{printable(plan.title)}\n{printable(plan.source)}\n\n{printable(plan.description)}\n")
    click.echo(
        "\n".join(
            aligned_columns(["model", "source"], [[model.label, model.source] for model in plan.models])
        )
    )
    for run in plan.runs:
        texts = f"{len(run.texts)} texts in the file" if isinstance(run.texts, tuple) else run.texts
        options = ", ".join(f"{option} = {value}" for option, value in run.options.items())
        click.echo(f"\nrun {printable(run.name)}: {printable(run.description)}")
        click.echo(printable(f"  texts: {texts}{f'; {options}' if options else ''}"))
        for metric, params in run.metrics.items():
            settings = ", ".join(f"{key} = {value}" for key, value in params.items())
            click.echo(printable(f"  {metric}{f': {settings}' if settings else ''}"))
        for reason in run.differs:
            click.echo(printable(f"  differs: {reason}"))
    counts = Counter((value.quantity, value.model, value.place) for value in plan.values)
    if counts:
        rows = [[quantity, model, str(n), place] for (quantity, model, place), n in counts.items()]
        click.echo("\n" + "\n".join(aligned_columns(["value", "model", "n", "stated in"], rows)))


@study.command("check")
@click.argument("name", metavar="FILE|NAME")
def check_command(name: str) -> None:
    """Check a study's file: its keys, metrics, parameters, tables and columns. No model is loaded."""
    from phaselens.runs import read_study, require_measurable

    plan = read_study(name)
    require_measurable(plan)
    for run in plan.runs:
        if isinstance(run.texts, str) and run.texts != "bundled" and plan.folder is not None:
            path = Path(plan.folder) / run.texts
            if not path.exists():
                raise InputError(f"study {plan.name!r}, run {run.name!r}: no texts {str(path)!r}")
    click.echo(
        f"{printable(plan.name)}: ok ({len(plan.models)} models, {len(plan.runs)} runs, {len(plan.values)} values)"
    )
