"""The command `phaselens run`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from phaselens.cli import shared_options
from phaselens.cli.completion_command import metric_names, model_names
from phaselens.cli.interrupts import stop_repeating
from phaselens.cli.metric_flags import MetricCommand, chosen_metrics, metric_flags
from phaselens.cli.output import Output, format_option, report_failures, table_option
from phaselens.cli.report_command import report_target, write_report
from phaselens.cli.streams import only_results, only_results_on_stdout, print_message, results_stream
from phaselens.cli.text_options import (
    require_labels,
    require_window_within,
    text_fields,
    text_options,
    texts_of,
)
from phaselens.cli.worker_options import worker_choices, worker_options
from phaselens.errors import InputError, close_matches
from phaselens.plugin import plugins

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phaselens.report.run_heatmap import HeadQuantity
    from phaselens.runs import Run

#: The metric that supplies the text view of a report.
TOKENS = "tokens"
_POSITIVE = click.IntRange(min=1)


class _BatchTokens(click.IntRange):
    """A whole number of at least 1, or `auto`."""

    name = "integer or auto"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


@click.command(cls=MetricCommand, context_settings={"show_default": True})
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=model_names)
@click.option(
    "-p",
    "--plugin",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=metric_names,
    help="A metric to run; can be repeated, or list names separated by commas. all, observational, causal and task "
    "are all metrics of that kind.",
)
@shared_options.plugin_file
@shared_options.settings
@text_options
@click.option(
    "--batch-tokens",
    type=_BatchTokens(),
    metavar="N|auto",
    default=8192,
    help="Tokens in a batch, pads included; changes speed and memory only. auto: by free memory.",
)
@click.option(
    "--shard-tokens",
    type=_POSITIVE,
    metavar="N",
    default=65_536,
    help="Tokens in a shard, a set of texts that is measured as one unit.",
)
@shared_options.bos
@shared_options.device
@shared_options.device_map
@shared_options.dtype
@shared_options.positions
@shared_options.adapter_scale
@shared_options.softmax_scale
@shared_options.rope_scaling
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", default=0, help="Seed of the bootstrap intervals."
)
@format_option
@table_option
@shared_options.by
@click.option(
    "--figures",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Also draw the results as files in this folder.",
)
@click.option(
    "--figure-format",
    "figure_formats",
    metavar="png,svg,pdf",
    default="png,svg",
    help="Formats of --figures, separated by commas.",
)
@click.option(
    "--figure-width",
    metavar="WIDTH",
    help="Width of --figures, such as 3.3in or 84mm; letters stay legible.",
)
@click.option(
    "--out",
    metavar="DIR",
    help="Keep the run in this directory: its record, finished shards, tables and figures. The same command continues.",
)
@click.option("--fresh", is_flag=True, help="Start over in a new directory beside --out if that holds a run.")
@worker_options
@click.option(
    "--plan",
    is_flag=True,
    help="Measure one batch only, and print what the run would take: shards, forwards, memory, time (or as json).",
)
@click.option(
    "--heatmap",
    "heatmaps",
    multiple=True,
    metavar="METRIC[.COLUMN]",
    help="Also draw a value by layer and head in the terminal; can be repeated.",
)
@click.option(
    "--report",
    "report_file",
    metavar="FILE.html",
    help="Also write the run as one HTML file (extra `report`).",
)
@click.option(
    "--token-texts",
    type=click.IntRange(min=0),
    metavar="N",
    default=6,
    help="With --out or --report, keep the tokens of the first N texts for the report's text view; 0 keeps none.",
)
@click.option("--quiet", is_flag=True, help="Show no progress bar and no notes on stderr.")
@shared_options.debug
@click.pass_context
@only_results
def run(ctx: click.Context, /, models: tuple[str, ...], **arguments: Any) -> int:
    """Measure metrics on models, side by side, on the same texts.

    MODEL is [LABEL=]SOURCE[@REVISION]; SOURCE is rope, drope, smollm2, a checkpoint folder, a GGUF file, a
    plugin's model, a hub id, BASE+ADAPTER, or an adapter's folder. The default is rope drope. Name a metric with
    -p; `phaselens run -p NAME --help` shows its parameters, `phaselens plugins` lists all metrics.
    """
    require_window_within(ctx)
    require_labels(arguments)
    flags = metric_flags(ctx).values(arguments)
    names = chosen_metrics(ctx)
    if not names:
        raise InputError(
            f"no metric was named; add -p NAME, one of: {', '.join(plugins().names) or 'none is installed'}"
        )
    settings = shared_options.merge_settings(shared_options.by_metric(arguments["settings"], names), flags)
    classes = {name: plugins().metric(name) for name in names}
    output = Output.choose(
        arguments["format_name"],
        classes,
        arguments["table"],
        quiet=arguments["quiet"],
        by_label=arguments["by"] is not None,
    )
    output.require_file()
    heatmaps = _heatmaps(arguments["heatmaps"], names, output)
    drawing = _drawing_options(arguments)
    report_path = report_target(arguments["report_file"])
    requests = [(name, settings[name]) for name in names]
    details = _details(names, arguments)
    command = ctx.meta.get(shared_options.COMMAND_LINE)
    if arguments["plan"]:
        return _plan(models, [*requests, *details.items()], arguments)
    try:
        result = _measure(models, [*requests, *details.items()], arguments, command)
    except BaseException as error:
        _print_finished_models(error, output, arguments["out"], debug=arguments["debug"])
        raise
    if arguments["shards"] is not None and not result.models:
        return _report_part(result, quiet=arguments["quiet"], debug=arguments["debug"])
    try:  # failures while drawing are among the errors that are printed
        if arguments["figures"]:
            _draw(result, arguments["figures"], drawing, quiet=arguments["quiet"])
        _draw_in_directory(result, quiet=arguments["quiet"])
        if report_path is not None:
            write_report(result, report_path, command=command, quiet=arguments["quiet"])
    finally:
        output.write(result if arguments["by"] is None else _grouped(result))
    _print_heatmaps(result, heatmaps)
    if not arguments["quiet"]:
        _mention_unusable_plugins()
    return report_failures(result, debug=arguments["debug"])


def _grouped(run: Run) -> Run:
    from phaselens.runs import group_by_label

    return group_by_label(run)


def _report_part(result: Run, *, quiet: bool, debug: bool) -> int:
    """Print what a part has done, and return the exit code. It has no tables."""
    if not quiet:
        for warning in result.warnings:
            print_message("note", warning)
    return report_failures(result, debug=debug)


def _details(names: Sequence[str], arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metric that keeps tokens for a report, with its parameters, unless it is named or not wanted."""
    is_kept = arguments["out"] is not None or arguments["report_file"] is not None
    if not is_kept or not arguments["token_texts"] or TOKENS in names or TOKENS not in plugins().names:
        return {}
    return {TOKENS: {"n_texts": arguments["token_texts"]}}


def _print_finished_models(error: BaseException, output: Output, out: str | None, *, debug: bool) -> None:
    """Print the models that were finished when the run ended early, and one line per metric that had failed."""
    if isinstance(error, KeyboardInterrupt):
        stop_repeating()
        if out is not None and not output.quiet:
            print_message("note", f"finished shards are kept in {out}; the same command continues from them")
    partial_run: Run | None = None
    cause: BaseException | None = error
    # Ctrl-C may have been repeated while the first one was handled.
    while partial_run is None and cause is not None:
        partial_run, cause = getattr(cause, "run", None), cause.__context__
    if partial_run is None:
        return
    output.write(partial_run)
    report_failures(partial_run, debug=debug)


def _heatmaps(targets: tuple[str, ...], names: Sequence[str], output: Output) -> list[HeadQuantity]:
    """Return what `--heatmap` asks for, checked before anything is measured."""
    if not targets:
        return []
    from phaselens.report.run_heatmap import HeadQuantity

    if not output.is_terminal:
        raise InputError("--heatmap draws on a terminal; leave --format and --table out")
    return [HeadQuantity.find(target, {name: plugins().metric(name) for name in names}) for target in targets]


def _print_heatmaps(run: Run, heatmaps: Sequence[HeadQuantity]) -> None:
    stream = results_stream()
    if not heatmaps or stream is None:
        return
    from phaselens.report.run_heatmap import print_heatmaps
    from phaselens.report.terminal_layout import console

    for quantity in heatmaps:
        print_heatmaps(run, quantity, console(stream))


def _drawing_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the formats and the width of `--figures`, checked before anything is measured."""
    formats = shared_options.split_names([arguments["figure_formats"]])
    if arguments["figures"] is None:
        if arguments["figure_width"] is not None:
            raise InputError("--figure-width is that of --figures; name a folder with --figures DIR")
        return {}
    from phaselens.report.drawing_sizes import parse_width
    from phaselens.report.figures import FORMATS

    for name in formats:
        if name not in FORMATS:
            raise InputError(f"--figure-format {name}: {close_matches(name, FORMATS)}")
    if not formats:
        raise InputError(f"--figure-format names no format; give {', '.join(FORMATS)}")
    width = arguments["figure_width"]
    return {"formats": formats, "width": None if width is None else parse_width(width)}


def _draw(run: Run, folder: str, drawing: dict[str, Any], *, quiet: bool) -> None:
    from phaselens.report.figures import draw

    paths = draw(run, folder, **drawing)
    if not quiet:
        print_message("note", f"{len(paths)} figures in {folder}")


def _draw_in_directory(run: Run, *, quiet: bool) -> None:
    """Draw the figures of a run with a directory, and say where the run is."""
    if run.directory is None:
        return
    from phaselens.report.figures import draw_in_directory

    draw_in_directory(run)
    if not quiet:
        print_message("note", f"the run is in {run.directory}")


def _mention_unusable_plugins() -> None:
    """Print one dim line for each plugin whose metadata says that it cannot be used. None is imported for that."""
    for plugin in plugins().registered:
        if plugin.status == "failed":
            print_message("note", f"plugin {plugin} is left out: {plugin.reason}", dim=True)


def _measure(
    models: tuple[str, ...],
    metrics: list[tuple[str, dict[str, Any]]],
    arguments: dict[str, Any],
    command: list[str] | None,
) -> Run:
    from phaselens.report.plan_tables import plan_sentence
    from phaselens.report.progress import ProgressBar
    from phaselens.runs import DEFAULT_MODELS, ModelPlan
    from phaselens.runs import run as measure

    def announce(plan: ModelPlan) -> None:
        print_message("note", plan_sentence(plan))

    with (
        only_results_on_stdout(debug=arguments["debug"]),
        ProgressBar(quiet=arguments["quiet"], announce=announce) as observer,
    ):
        return measure(
            models or DEFAULT_MODELS,
            metrics=metrics,
            texts=texts_of(arguments),
            text_fields=text_fields(arguments),
            **_options(arguments),
            observer=observer,
            out=arguments["out"],
            fresh=arguments["fresh"],
            command=command,
            **worker_choices(arguments),
        )


def _plan(
    models: tuple[str, ...], metrics: list[tuple[str, dict[str, Any]]], arguments: dict[str, Any]
) -> int:
    """Print what the run would take, as tables or JSON."""
    from phaselens.report.plan_tables import print_plan
    from phaselens.report.progress import ProgressBar
    from phaselens.report.terminal_layout import console
    from phaselens.runs import DEFAULT_MODELS, RunOptions, plan

    chosen = _options(arguments)
    is_automatic = chosen["batch_tokens"] == "auto"
    if is_automatic:
        del chosen["batch_tokens"]
    options = RunOptions(**chosen, threads=arguments["threads"])
    with only_results_on_stdout(debug=arguments["debug"]), ProgressBar(quiet=arguments["quiet"]) as observer:
        planned = plan(
            models or DEFAULT_MODELS,
            metrics=metrics,
            texts=texts_of(arguments),
            text_fields=text_fields(arguments),
            options=options,
            automatic_batches=is_automatic,
            observer=observer,
        )
    stream = results_stream()
    if arguments["format_name"] == "json":
        click.echo(json.dumps(planned.as_dict(), allow_nan=False), file=stream)
    elif stream is not None:
        print_plan(planned, console(stream))
    return 0


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the run, which `RunOptions` takes too."""
    names = (
        "max_tokens",
        "n_texts",
        "window",
        "stride",
        "batch_tokens",
        "shard_tokens",
        "bos",
        "device",
        "device_map",
        "dtype",
    )
    return {
        **{name: arguments[name] for name in (*names, "seed")},
        "positions": shared_options.by_label(arguments["positions"]),
        "adapter_scale": shared_options.adapter_scale_by_label(arguments["adapter_scales"]),
        "softmax_scale": shared_options.softmax_scale_by_label(arguments["softmax_scales"]),
        "rope_scaling": shared_options.rope_scaling_by_label(arguments["rope_scalings"]),
    }
