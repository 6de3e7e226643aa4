"""The group of commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import click

from phaselens.cli.lists import check, hooks, list_plugins
from phaselens.cli.run import run


@click.group(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="phaselens", message="phaselens %(version)s")
def app() -> None:
    """Measure what a decoder-only transformer does with its first token and with position.

    phaselens run -p sinks measures attention sinks on the bundled RoPE and DroPE models, side by side.
    """


app.add_command(run)
app.add_command(list_plugins)
app.add_command(hooks)
app.add_command(check)
