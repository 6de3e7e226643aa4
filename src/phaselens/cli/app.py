"""The group of commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Any

import click

from phaselens.cli.lists import check, hooks
from phaselens.cli.new_plugin import new_plugin
from phaselens.cli.plugins import plugin_commands
from phaselens.cli.repl import repl
from phaselens.cli.run import run
from phaselens.errors import MetricError, PhaseLensError
from phaselens.plugin import plugins
from phaselens.plugin.loading import told


class Commands(click.Group):
    """PhaseLens' own commands; a name that is none of them may be a plugin's, which is loaded then."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Its own command, else a plugin's."""
        return super().get_command(ctx, cmd_name) or plugins().command(cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. What a plugin's own command raises unforeseen is told as the plugin's."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, PhaseLensError, OSError):
            raise
        except Exception as error:
            name = ctx.invoked_subcommand
            if name is None or name in self.commands:
                raise
            raise MetricError(f"command of plugin {plugins().origin(name)} failed: {told(error)}") from error


@click.group(cls=Commands, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="phaselens", message="phaselens %(version)s")
def app() -> None:
    """Measure what a decoder-only transformer does with its first token and with position.

    phaselens run -p sinks measures attention sinks on the bundled RoPE and DroPE models, side by side.
    Plugins may bring further commands; `phaselens plugins` lists them.
    """


for _command in (run, plugin_commands, hooks, check, new_plugin, repl):
    app.add_command(_command)
