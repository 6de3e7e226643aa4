"""The command `phaselens completion`, and the completion of metrics' and models' names that it turns on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from phaselens.cli.metric_names import GROUPS
from phaselens.plugin import plugins

if TYPE_CHECKING:
    from phaselens.cli.app import Commands

SHELLS = ("bash", "zsh", "fish")
#: The environment variable in which a shell's script asks for completions.
VARIABLE = "_PHASELENS_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands, options, metrics and models in SHELL.

    bash: eval "$(phaselens completion bash)" in ~/.bashrc; zsh: the same with zsh in ~/.zshrc;
    fish: phaselens completion fish > ~/.config/fish/completions/phaselens.fish
    """
    completer = get_completion_class(shell)
    assert completer is not None, "click completes in these shells"
    click.echo(completer(ctx.find_root().command, {}, "phaselens", VARIABLE).source())


def complete(app: Commands) -> int | None:
    """Answer a shell that asks for completions, and return the exit code; None if none asks."""
    instruction = os.environ.get(VARIABLE)
    return shell_complete(app, {}, "phaselens", VARIABLE, instruction) if instruction else None


def metric_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the last of the metrics in a list separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    names = [name for name in (*GROUPS, *plugins().names) if name.startswith(last)]
    return [CompletionItem(f"{before}{comma}{name}") for name in names]


def model_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a model, with its label: a name that `phaselens.load` takes, or a folder or file."""
    from phaselens.lens.packaged import names as packaged

    label, sign, source = incomplete.rpartition("=")
    names = [name for name in ("rope", "drope", *packaged()) if name.startswith(source)]
    items = [CompletionItem(f"{label}{sign}{name}") for name in names]
    return items or [CompletionItem(incomplete, type="file")]
