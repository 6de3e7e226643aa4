"""`phaselens run`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from phaselens.cli import options
from phaselens.cli.flags import MetricCommand, metric_flags, metrics_in_files
from phaselens.errors import InputError
from phaselens.plugin import Registered, plugins
from phaselens.report.words import plain

if TYPE_CHECKING:
    from phaselens.runs import Run

_POSITIVE = click.IntRange(min=1)


@click.command(cls=MetricCommand, context_settings={"show_default": True})
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "-p",
    "--plugin",
    "names",
    multiple=True,
    metavar="NAME",
    help="A metric to run; repeat, or separate by commas.",
)
@options.plugin_file
@options.settings
@click.option(
    "--texts",
    default="bundled",
    metavar="bundled|FILE|NAME",
    help="A .txt file (a text a line) or .jsonl file (`text`, optional `id`), or a plugin's texts.",
)
@click.option(
    "--max-tokens", type=_POSITIVE, metavar="N", default=512, help="Cut longer texts to this many tokens."
)
@click.option("--n-texts", type=_POSITIVE, metavar="N", help="Use only the first texts.")
@click.option(
    "--batch-tokens",
    type=_POSITIVE,
    metavar="N",
    default=8192,
    help="Tokens in a batch, pads included; changes speed and memory only.",
)
@options.bos
@options.device
@options.dtype
@options.positions
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", default=0, help="Seed of the bootstrap intervals."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv", "markdown"]),
    default="table",
    help="json: everything; csv: one table.",
)
@click.option(
    "--table",
    metavar="[METRIC.]NAME",
    help="Print this result table, whole (csv, if none is named: layers, or the one that is displayed).",
)
@click.option(
    "--figures",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Also draw the results into this folder, as PNG and SVG.",
)
@click.option("--quiet", is_flag=True, help="No progress bar and no notes on stderr.")
@options.debug
@click.pass_context
def run(ctx: click.Context, /, models: tuple[str, ...], **given: Any) -> int:
    """Measure metrics on models, side by side, on the same texts.

    MODEL is [LABEL=]SOURCE[@REVISION]; SOURCE is rope, drope, smollm2, a checkpoint folder, a plugin's
    model or a hub id. None means: rope drope. Name a metric with -p; `phaselens run -p NAME --help` shows its
    parameters, `phaselens plugins` lists all.
    """
    flags = metric_flags(ctx).values(given)
    names = options.split_names(given["names"]) or metrics_in_files(ctx)
    if not names:
        raise InputError(
            f"no metric was named; add -p NAME, one of: {', '.join(plugins().names) or 'none is installed'}"
        )
    settings = options.merged(options.by_metric(given["settings"], names), flags)
    table = _table_asked_for(names, given["form"], given["table"])
    with plugins().probe(besides=names) as others:
        try:
            finished = _measured(models, [(name, settings[name]) for name in names], given)
        except BaseException as error:
            _print_finished_part(error, given, table)
            raise
        try:  # what fails at being drawn is among the errors that are printed
            if given["figures"]:
                _draw(finished, given["figures"], quiet=given["quiet"])
        finally:
            _print(finished, given["form"], table, quiet=given["quiet"])
        if not given["quiet"]:
            _mention(others.failures())
    return _failures(finished, debug=given["debug"])


def _print_finished_part(error: BaseException, given: dict[str, Any], table: str | None) -> None:
    """What was complete when the run ended early, with a line for each metric that had failed by then."""
    from phaselens.cli.outcome import interrupt_was_heard

    if isinstance(error, KeyboardInterrupt):
        interrupt_was_heard()
    finished: Run | None = None
    cause: BaseException | None = error
    while (
        finished is None and cause is not None
    ):  # Ctrl-C may have been repeated while the first was answered
        finished, cause = getattr(cause, "run", None), cause.__context__
    if finished is None:
        return
    _print(finished, given["form"], table, quiet=given["quiet"])
    _failures(finished, debug=given["debug"])


def _draw(finished: Run, folder: str, *, quiet: bool) -> None:
    from phaselens.cli.outcome import say
    from phaselens.report.figures import draw

    written = draw(finished, folder)
    if not quiet:
        say("note", f"{len(written)} figures in {folder}")


def _mention(others: Iterable[Registered]) -> None:
    """One dim line for each plugin that does not work and was not asked for."""
    unusable = [one for one in plugins().registered if one.status == "failed"]
    for one in [*unusable, *others]:
        line = f"phaselens: note: plugin {one} is left out: {one.reason}"
        click.secho(plain(line), err=True, dim=True)


def _table_asked_for(names: list[str], form: str, name: str | None) -> str | None:
    """`METRIC.TABLE`, checked before anything is measured."""
    if form == "json" and name is not None:
        raise InputError(
            "--format json prints all tables; leave --table out, or choose csv, markdown or table"
        )
    if name is None and form != "csv":
        return None
    from phaselens.report.formats import usual_table, which_table

    metrics = {each: plugins().metric(each) for each in names}
    declared = {each: [spec.name for spec in metric.tables] for each, metric in metrics.items()}
    return ".".join(which_table(declared, name or usual_table(metrics.values())))


def _measured(
    models: tuple[str, ...], metrics: list[tuple[str, dict[str, Any]]], given: dict[str, Any]
) -> Run:
    from phaselens.cli.outcome import only_results_on_stdout
    from phaselens.report.progress import ProgressBar
    from phaselens.runs import DEFAULT_MODELS
    from phaselens.runs import run as measure

    with only_results_on_stdout(debug=given["debug"]), ProgressBar(quiet=given["quiet"]) as observer:
        return measure(
            models or DEFAULT_MODELS,
            metrics=metrics,
            texts=given["texts"],
            max_tokens=given["max_tokens"],
            n_texts=given["n_texts"],
            batch_tokens=given["batch_tokens"],
            bos=given["bos"],
            device=given["device"],
            dtype=given["dtype"],
            positions=options.by_label(given["positions"]),
            seed=given["seed"],
            observer=observer,
        )


def _print(finished: Run, form: str, table: str | None, *, quiet: bool) -> None:
    """Print the run whole, also where Ctrl-C comes in the middle of it."""
    from phaselens.cli.outcome import patient_interrupt

    with patient_interrupt():
        _print_at_once(finished, form, table, quiet=quiet)
        if sys.stdout is not None:
            sys.stdout.flush()


def _print_at_once(finished: Run, form: str, table: str | None, *, quiet: bool) -> None:
    from phaselens.cli.outcome import say
    from phaselens.report import formats, tables

    if table is not None:
        metric, _, name = table.partition(".")
        if name not in finished.result(metric).tables:
            return  # the metric failed on every model, which `_failures` says
    if form == "json":
        click.echo(formats.as_json(finished))
    elif form == "markdown":
        click.echo(formats.as_markdown(finished, table))
    elif form == "csv":
        click.echo(formats.as_csv(finished, table))
    elif table is not None:
        tables.print_table(finished, metric, name, tables.console(sys.stdout))
    else:
        tables.print_run(finished, tables.console(sys.stdout))
    if table is not None and not quiet:
        ended = {
            str(failure) for failure in finished.errors[:1]
        }  # the line that the command ends with says it
        for warning in finished.warnings:
            if warning not in ended:
                say("note", warning)


def _failures(finished: Run, *, debug: bool) -> int:
    """A line for each failure on stderr, and with `debug` its traceback before it; returns the exit code."""
    from phaselens.cli.outcome import say

    for name in finished.failed:
        for failure in finished.metrics[name].failures:
            if debug:
                click.echo(failure.traceback.rstrip("\n"), err=True)
            say(
                "error",
                f"metric {name} failed: {failure}; the other results are complete (--debug, --format json)",
            )
    return 1 if finished.failed else 0
