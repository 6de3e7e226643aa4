"""A package's folder is checked without being installed; what a plugin's command raises is told as the plugin's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phaselens.plugin import plugins
from tests.cli.conftest import Phaselens
from tests.distributions import Install

Fails = Callable[..., str]

METRIC = """
from phaselens.plugin import CausalMetric, Condition, Edit, hookimpl

class {name}Metric(CausalMetric):
    name, version = "{name}", "1"

    def conditions(self):
        return [Condition("off", [Edit("blocks.0.attn.hook_v", {to}, positions=[0])], layer=0)]

@hookimpl
def phaselens_metrics():
    return [{name}Metric]
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Write a package with one metric into a folder of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)

    def write(name: str, *, where: str = "src", to: str = "0.0", declared: str | None = None) -> Path:
        folder = tmp_path / f"package-{name}"
        (folder / where).mkdir(parents=True)
        (folder / where / f"{name}_module.py").write_text(METRIC.format(name=name, to=to))
        points = declared if declared is not None else f'{name} = "{name}_module"'
        (folder / "pyproject.toml").write_text(f"[project.entry-points.phaselens]\n{points}\n")
        return folder

    plugins.cache_clear()
    yield write
    plugins.cache_clear()
    for name in set(sys.modules) - modules:
        if name.endswith("_module"):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["src", "."])
def test_a_package_is_checked_where_it_lies(
    phaselens: Phaselens, package: Callable[..., Path], where: str
) -> None:
    outcome = phaselens("plugins", "check", package("laid", where=where))
    assert outcome.code == 0, outcome
    assert "halves merged equal the whole" in outcome.out
    assert "failed" not in outcome.out


def test_a_package_whose_metric_breaks_the_contract_is_told(
    phaselens: Phaselens, package: Callable[..., Path]
) -> None:
    outcome = phaselens("plugins", "check", package("idle", to="lambda tensor, site: tensor"))
    assert outcome.code == 1
    assert "changed nothing there" in " ".join(outcome.out.split())


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ("", "declares no plugin; add [project.entry-points.phaselens]"),
        ('odd = "elsewhere"', "names the module 'elsewhere', which is neither in"),
        ("odd = [", "cannot be read"),
        ('other = "odd_module"', "'other' (folder"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(
    fails: Fails, package: Callable[..., Path], declared: str, complaint: str
) -> None:
    assert complaint in fails(2, "plugins", "check", package("odd", declared=declared))


def test_a_folder_that_is_no_package_is_one_line(fails: Fails, tmp_path: Path) -> None:
    assert "no pyproject.toml in it" in fails(2, "plugins", "check", tmp_path)


def test_a_plugins_command_that_raises_is_told_as_the_plugins(fails: Fails, install: Install) -> None:
    install(
        "greet",
        """
        import click
        from phaselens.plugin import hookimpl

        @click.command()
        def greet():
            raise ZeroDivisionError("nobody there")

        @hookimpl
        def phaselens_commands(cli):
            cli.add_command(greet)
        """,
    )
    line = fails(1, "greet")
    assert line == "command of plugin 'greet' (dist-greet 2.5) failed: ZeroDivisionError: nobody there"


def test_parameters_of_the_checked_metric_are_read(phaselens: Phaselens, fails: Fails) -> None:
    outcome = phaselens("plugins", "check", "passkey", "-P", "passkey.symbls=abc")
    assert outcome.code == 1
    assert "no parameter 'symbls'; did you mean symbols?" in " ".join(outcome.out.split())
    assert "'sinks' is not in this run" in fails(2, "plugins", "check", "passkey", "-P", "sinks.tau=0.2")
