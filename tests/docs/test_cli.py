"""The page of commands shows the help of every command, as it is printed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from tools.page_blocks import ROOT, blocks, run_page, same_output, trimmed

from phaselens.cli.app import app

PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def commands(command: click.Command, words: tuple[str, ...]) -> Iterator[str]:
    """Yield a command and the commands below it, as they are typed."""
    yield " ".join(words)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from commands(child, (*words, name))


def test_the_help_of_every_command_is_on_the_page_as_it_is_printed(tmp_path: Path) -> None:
    shown = [block.code.strip() for block in blocks(PAGE) if block.kind == "sh"]
    assert shown == [f"{words} --help" for words in commands(app, ("phaselens",))]
    outputs = list(run_page(PAGE, tmp_path))
    assert len(outputs) == len(shown)
    different = [
        output.shown.code for output in outputs if not same_output(output.shown.code, trimmed(output.text))
    ]
    assert different == [], "run: python -m tools.page_blocks docs/cli.md"
