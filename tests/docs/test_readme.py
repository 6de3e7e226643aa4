"""The README is short, its commands and its Python run as they stand, and its links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tools.page_blocks import blocks, run_page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_five_commands_and_the_python_run(tmp_path: Path) -> None:
    assert list(run_page(README, tmp_path)) == []
    assert (tmp_path / "study" / "run.json").is_file()
    assert list((tmp_path / "figures").glob("*.png"))
    assert (tmp_path / "phaselens-my-metric" / "pyproject.toml").is_file()


def test_it_has_five_commands_without_placeholders_and_three_lines_of_python() -> None:
    commands, python = blocks(README)
    words = [shlex.split(line, comments=True) for line in commands.code.splitlines()]
    assert [command[0] for command in words] == ["phaselens"] * 5
    assert not re.search(r"\./|[A-Z]{4,}|<|…", commands.code)
    assert len([line for line in python.code.splitlines() if line]) == 3
    assert len(README.splitlines()) < 100


def test_null_is_explained_where_it_first_appears() -> None:
    first = re.search(r"\bnull\b", README)
    assert first is not None
    assert README[first.start() :].startswith("null** beside its values: what the same computation gives")


def test_the_readme_begins_with_the_two_commands_and_its_links_exist() -> None:
    commands = [line.split()[1] for line in README.splitlines() if line.startswith("    make ")]
    assert commands == ["demo", "test"]
    assert README.index("make demo") < 60
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{command}:" in targets for command in commands)
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_page_of_the_site_can_be_reached_from_the_readme_or_its_lists() -> None:
    """Pages of a folder are listed by a page of their own, such as docs/metrics.md."""
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#]+\.md)\)", README)}
    for path in tuple(linked):
        linked |= {
            (path.parent / link).resolve()
            for link in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        }
    pages = {path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "api"}
    assert sorted(str(path.relative_to(ROOT)) for path in pages - linked) == []


def test_each_phaselens_command_exists() -> None:
    import click

    from phaselens.cli.app import app

    named = set(re.findall(r"phaselens ([a-z][\w-]+)", README)) - {"in"}
    assert named <= set(app.list_commands(click.Context(app)))
