"""The README's Python runs unchanged, and its commands are those of the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phaselens.lens.points import STATISTICS, declaration, in_layer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_python_blocks_run_in_order(capsys):
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), scope)
    assert "sink rate" in capsys.readouterr().out
    assert scope["sinks"][0].shape == (1, 4, scope["tokens"].shape[1])


def test_the_readme_begins_with_the_two_commands_and_its_links_exist():
    commands = [line.split()[1] for line in README.splitlines() if line.startswith("    make ")]
    assert commands == ["demo", "test"]
    assert README.index("make demo") < 60
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{command}:" in targets for command in commands)
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_each_phaselens_command_exists():
    import click

    from phaselens.cli.app import app

    named = set(re.findall(r"^    phaselens ([\w-]+)", README, re.MULTILINE))
    assert named <= set(app.list_commands(click.Context(app)))


def test_the_table_of_statistics_is_the_registry():
    """Each row has the name, shape and meaning of the registry's entry."""
    declarations = [declaration(f"attn.{statistic}") for statistic in STATISTICS]
    expected = [
        f"| `{in_layer('{i}', entry.name)}` | {entry.shape} | {entry.meaning} |" for entry in declarations
    ]
    assert [line for line in README.splitlines() if line.startswith("| `blocks.")] == expected
