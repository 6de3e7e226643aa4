"""The command `phaselens plugins`, with `show` and `check`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from phaselens.cli import shared_options
from phaselens.cli.streams import only_results_on_stdout
from phaselens.errors import InputError
from phaselens.plugin import Metric, TableSpec, kind_of, plugins
from phaselens.report.strings import aligned_columns

#: Context length of the model for which `show` lists hook points.
_N_CTX = 2048


@click.group("plugins", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array instead of a table.")
@click.pass_context
def plugin_commands(ctx: click.Context, as_json: bool) -> int:
    """List the installed plugins, what each measures, and whether it only reads the model (observational), edits it
    (causal) or tests it on prompts of its own (task).

    Third-party plugins are imported in a separate process each. PHASELENS_PLUGINS=a,b allows only these (empty: none);
    PHASELENS_DISABLE_PLUGINS=a,b forbids these; both accept names of plugins or distributions.
    PHASELENS_STRICT_PLUGINS=1 makes a failed plugin an error.
    """
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise InputError(f"--json lists all plugins; leave it out before {ctx.invoked_subcommand}")
        return 0
    registered = plugins().check_all()
    if as_json:
        click.echo(json.dumps([plugin.as_dict() for plugin in registered], allow_nan=False))
    else:
        rows = [
            [
                plugin.name,
                plugin.status,
                ", ".join(plugin.kind if offer == "metric" else offer for offer in plugin.offers) or "–",
                f"{plugin.distribution} {plugin.version}",
                plugin.reason or plugin.measures,
            ]
            for plugin in registered
        ]
        titles = ["plugin", "status", "kind", "from", "measures"]
        click.echo("\n".join(aligned_columns(titles, rows, width=_output_width())))
    failed = any(plugin.status == "failed" for plugin in registered)
    return 1 if failed and plugins().selection.strict else 0


@plugin_commands.command()
@click.argument("name")
@shared_options.plugin_file
@shared_options.debug
def show(name: str, files: tuple[str, ...], debug: bool) -> None:
    """Show the metric NAME: parameters with units and bounds, hook points, tables, null, citation."""
    for path in files:
        plugins().add_file(path)
    metric = plugins().metric(name)
    origin = plugins().origin(name)
    lines = [
        f"{name}: {metric.title or name}",
        f"version {metric.version}, from {origin.distribution} {origin.version}",
        f"kind: {kind_of(metric)}: {_KINDS[kind_of(metric)]}",
    ]
    lines += [line for line in (metric.description, metric.citation) if line]
    lines += ["", f"by default: {metric.define(metric.Params())}"]
    lines += ["", *_parameters(metric), "", "hook points"]
    lines += [f"  {point}" for point in _points(metric) or ["none"]]
    for table in metric.tables:
        lines += ["", *_table(metric, table)]
    click.echo("\n".join(lines))


def _output_width() -> int | None:
    """Return the terminal's width; None where stdout is a file or a pipe, whose lines are not broken."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else None


#: What the kinds of metrics do.
_KINDS = {
    "observational": "it does not change the model",
    "causal": "it changes the model and measures the effect",
    "task": "it tests the model on prompts of its own, under any condition",
}


def _parameters(metric: type[Metric[Any]]) -> list[str]:
    specs = metric.Params.specs()
    if not specs:
        return ["no parameters"]
    rows = [[spec.name, str(spec.default), spec.unit or "–", spec.allowed, spec.help] for spec in specs]
    return aligned_columns(["parameter", "default", "unit", "takes", ""], rows)


def _points(metric: type[Metric[Any]]) -> list[str]:
    """Return the hook points that the metric reads with its default parameters on a model with every kind of layer."""
    from phaselens.testing.facts import model_info

    return list(metric(model_info(n_ctx=_N_CTX), metric.Params()).hooks())


def _table(metric: type[Metric[Any]], table: TableSpec) -> list[str]:
    display = metric.display if metric.display is not None and metric.display.table == table.name else None
    rows = []
    for column in table.columns:
        marks = []
        if display is not None and column.name == display.value:
            marks.append("the displayed value")
        if display is not None and column.name == display.null:
            marks.append("its null")
        note = f" ({', '.join(marks)})" if marks else ""
        rows.append([f"  {column.name}", column.type.__name__, column.unit or "–", column.help + note])
    heading = f"table {table.name}" + (f": {table.help}" if table.help else "")
    return [heading, *aligned_columns(["  column", "type", "unit", ""], rows)]


@plugin_commands.command()
@click.argument("target", metavar="NAME|PATH")
@shared_options.settings
@click.option(
    "--allow-matrix", is_flag=True, help="The metric may read the whole attention matrix, which is O(L²)."
)
@shared_options.debug
def check(target: str, settings: tuple[str, ...], allow_matrix: bool, debug: bool) -> int:
    """Check on tiny models that the metric NAME, or each metric in PATH, keeps the contract of metrics.

    PATH is a .py file, or the folder of a package (with its pyproject.toml), which need not be installed.

    Exits with 1 if a check failed.
    """
    from phaselens.report.terminal_layout import console, print_rows

    if target.endswith(".py"):
        names = plugins().add_file(target)
    elif os.sep in target or (Path(target) / "pyproject.toml").is_file():
        names = plugins().add_folder(target)
    else:
        names = [target]
    parameters = shared_options.by_metric(settings, names)
    rows = []
    with only_results_on_stdout(debug=debug):
        from phaselens.testing import examine

        for name in names:
            for finding in examine(plugins().metric(name), parameters[name], allow_matrix=allow_matrix):
                rows.append((name, finding.status, finding.name, finding.detail))
    print_rows(["metric", "", "check", "result"], rows, console(sys.stdout), status_column=1)
    return 1 if any(row[1] == "failed" for row in rows) else 0
