"""The command `phaselens compare`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from phaselens.cli import shared_options
from phaselens.cli.interrupts import patient_interrupt
from phaselens.cli.streams import print_message
from phaselens.errors import InputError
from phaselens.report.comparison_formats import COMPARISON_FORMATS

if TYPE_CHECKING:
    from phaselens.runs import Comparison

_DEFAULT_FORMAT = next(iter(COMPARISON_FORMATS))


@click.command(context_settings={"show_default": True})
@click.argument("first", metavar="RUN_A")
@click.argument("second", metavar="[RUN_B]", required=False)
@click.option(
    "--models",
    metavar="A,B",
    help="Labels of the two models; default: the model that both runs have, or the two models of the run.",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(COMPARISON_FORMATS)),
    default=_DEFAULT_FORMAT,
    help="table and markdown: a value per metric, for people; json and csv: every difference.",
)
@click.option(
    "--figure", metavar="FILE", help="Also draw the differences; FILE ends with .png, .svg or .pdf."
)
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    metavar="NAME",
    help="Compare although this differs, and record it: texts, labels, length, bos, parameters, definitions, "
    "precision, numerics; can be repeated.",
)
@click.option(
    "--by",
    type=click.Choice(["label"]),
    help="Compare the texts of each label by themselves (--label-field of a run).",
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", default=0, help="Seed of intervals and permutations."
)
@click.option("--quiet", is_flag=True, help="Show no notes on stderr.")
@shared_options.debug
def compare(
    first: str,
    second: str | None,
    models: str | None,
    format_name: str,
    figure: str | None,
    allowed: tuple[str, ...],
    by: str | None,
    seed: int,
    quiet: bool,
    debug: bool,
) -> None:
    """Compare two models text by text: by metric and layer, the difference B − A, its interval over texts, p, effect
    size and number of texts.

    RUN_A and RUN_B are directories made by `phaselens run --out`; with RUN_A alone, two of its models are compared.
    What makes numbers incomparable is refused by name.
    """
    from phaselens.api import compare as compare_models
    from phaselens.api import open_run

    if figure is not None:
        from phaselens.report.comparison_figure import require_suffix

        require_suffix(figure)
    runs = [open_run(directory) for directory in (first, second) if directory is not None]
    allow = shared_options.split_names(allowed)
    comparison = compare_models(*runs, models=_labels(models), allow=allow, seed=seed, by=by)
    if figure is not None:
        from phaselens.report.comparison_figure import draw_comparison

        draw_comparison(comparison, figure)
    _write(comparison, format_name, quiet=quiet)
    if figure is not None and not quiet:
        print_message("note", f"the figure is {figure}")


def _labels(models: str | None) -> list[str] | None:
    """Return the two labels that `--models` names; None without it."""
    if models is None:
        return None
    labels = models.split(",")
    if len(labels) != 2 or not all(labels):
        raise InputError(f"--models {models!r}: write two labels, A,B; the first is RUN_A's")
    return labels


def _write(comparison: Comparison, format_name: str, *, quiet: bool) -> None:
    """Print the comparison, and the notes that a table of numbers cannot hold on stderr."""
    if sys.stdout is not None:
        with patient_interrupt():
            COMPARISON_FORMATS[format_name](comparison, sys.stdout)
            sys.stdout.flush()
    if format_name == "csv" and not quiet:
        from phaselens.report.comparison_tables import comparison_notes

        for note in comparison_notes(comparison):
            print_message("note", note.removeprefix("note: "))
