"""The group of commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Any

import click

from phaselens.cli.check_command import check
from phaselens.cli.compare_command import compare
from phaselens.cli.hooks_command import hooks
from phaselens.cli.merge_command import merge
from phaselens.cli.new_plugin_command import new_plugin
from phaselens.cli.plugins_command import plugin_commands
from phaselens.cli.repl_command import repl
from phaselens.cli.report_command import report
from phaselens.cli.run_command import run
from phaselens.cli.stored_run_commands import export, runs, show
from phaselens.cli.study_command import study
from phaselens.errors import MetricError, PhaseLensError
from phaselens.plugin import plugins
from phaselens.plugin.author_errors import describe_error


class Commands(click.Group):
    """The command group: built-in commands, and those of plugins, which are loaded when their name is used."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name: a built-in one, or else a plugin's."""
        return super().get_command(ctx, cmd_name) or plugins().command(cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. An unforeseen error in a plugin's command is reported as that plugin's."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, PhaseLensError, OSError):
            raise
        except Exception as error:
            name = ctx.invoked_subcommand
            if name is None or name in self.commands:
                raise
            raise MetricError(
                f"command of plugin {plugins().origin(name)} failed: {describe_error(error)}"
            ) from error


@click.group(cls=Commands, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="phaselens", message="phaselens %(version)s")
def app() -> None:
    """Measure what a decoder-only transformer does with its first token and with position.

    phaselens run -p sinks measures attention sinks on the bundled RoPE and DroPE models, side by side.
    Plugins may add commands; `phaselens plugins` lists them.
    """


for _command in (
    run,
    merge,
    show,
    export,
    runs,
    compare,
    report,
    study,
    plugin_commands,
    hooks,
    check,
    new_plugin,
    repl,
):
    app.add_command(_command)
