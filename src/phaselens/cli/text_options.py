"""Options of `phaselens run` that say which texts are read, and how they are cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from phaselens.data import TextFields
from phaselens.errors import InputError
from phaselens.plugin import plugins

F = TypeVar("F", bound=Callable[..., object])

_POSITIVE = click.IntRange(min=1)

_OPTIONS = (
    click.option(
        "--texts",
        default="bundled",
        metavar="bundled|FILE|FOLDER|-|NAME",
        help="A .txt file (one text per line), records (.jsonl, .csv, .tsv, .parquet), any of them as .gz or .zst, a "
        "folder of such files, - for stdin, or a plugin's texts.",
    ),
    click.option(
        "--text-field", metavar="NAME", default="text", help="The field of a record that holds its text."
    ),
    click.option(
        "--id-field", metavar="NAME", default="id", help="The field that holds its id, if it has one."
    ),
    click.option("--label-field", metavar="NAME", help="A field whose values group the texts; see --by."),
    click.option(
        "--paragraphs",
        is_flag=True,
        help="A text of a .txt file ends at a blank line, not at each line's end.",
    ),
    click.option(
        "--max-tokens", type=_POSITIVE, metavar="N", default=512, help="Cut longer texts to this many tokens."
    ),
    click.option(
        "--window",
        type=_POSITIVE,
        metavar="N",
        help="Cut longer texts into windows of this many tokens of the first model instead, with the ids ID#0, ID#1, …",
    ),
    click.option(
        "--stride",
        type=_POSITIVE,
        metavar="M",
        help="Windows begin M tokens apart; default: without overlap.",
    ),
    click.option("--n-texts", type=_POSITIVE, metavar="N", help="Use only the first texts."),
)


def text_options(command: F) -> F:
    """Add the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def require_window_within(ctx: click.Context) -> None:
    """Raise InputError if windows are longer than what `--max-tokens`, given on the command line, lets texts be."""
    window, max_tokens = ctx.params["window"], ctx.params["max_tokens"]
    is_given = ctx.get_parameter_source("max_tokens") is not ParameterSource.DEFAULT
    if window is not None and is_given and window > max_tokens:
        raise InputError(
            f"--window {window} is longer than --max-tokens {max_tokens}, which would cut every window; leave "
            "--max-tokens out"
        )


def require_labels(arguments: dict[str, Any]) -> None:
    """Raise InputError if texts are grouped by labels that no field holds; texts of plugins can have labels."""
    if (
        arguments["by"] is not None
        and arguments["label_field"] is None
        and not plugins().texts(arguments["texts"])
    ):
        raise InputError(
            "--by label groups texts by their labels; name the field that holds them: --label-field NAME"
        )


def text_fields(arguments: dict[str, Any]) -> TextFields | None:
    """Return where the texts of a file stand; None for the defaults."""
    fields = TextFields(
        arguments["text_field"], arguments["id_field"], arguments["label_field"], arguments["paragraphs"]
    )
    return None if fields == TextFields() else fields
