"""A package's folder is checked without being installed; an error in a plugin's command names the plugin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phaselens.plugin import plugins
from tests.cli.conftest import ErrorLine, Phaselens
from tests.distributions import Install

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
    """A function that writes a package with one metric into a separate folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)

    def write(
        name: str, *, where: str = "src", replacement: str = "0.0", declared: str | None = None
    ) -> Path:
        folder = tmp_path / f"package-{name}"
        (folder / where).mkdir(parents=True)
        (folder / where / f"{name}_module.py").write_text(METRIC.format(name=name, to=replacement))
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
def test_a_package_is_checked_without_being_installed(
    phaselens: Phaselens, package: Callable[..., Path], where: str
) -> None:
    outcome = phaselens("plugins", "check", package("laid", where=where))
    assert outcome.code == 0, outcome
    assert "halves merged equal the whole" in outcome.out
    assert "failed" not in outcome.out


@pytest.mark.slow
def test_a_package_whose_metric_breaks_the_contract_is_reported(
    phaselens: Phaselens, package: Callable[..., Path]
) -> None:
    outcome = phaselens("plugins", "check", package("idle", replacement="lambda tensor, site: tensor"))
    assert outcome.code == 1
    assert "changed no value" in " ".join(outcome.out.split())


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("", "declares no plugin; add [project.entry-points.phaselens]"),
        ('odd = "elsewhere"', "names the module 'elsewhere', which is neither in"),
        ("odd = [", "cannot be read"),
        ('other = "odd_module"', "'other' (folder"),
    ],
)
def test_a_broken_folder_is_an_error_of_one_line(
    error_line: ErrorLine, package: Callable[..., Path], declared: str, message: str
) -> None:
    assert message in error_line(2, "plugins", "check", package("odd", declared=declared))


def test_a_folder_without_a_package_is_an_error_of_one_line(error_line: ErrorLine, tmp_path: Path) -> None:
    assert "has no pyproject.toml" in error_line(2, "plugins", "check", tmp_path)


def test_an_error_in_a_plugins_command_names_the_plugin(error_line: ErrorLine, install: Install) -> None:
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
    line = error_line(1, "greet")
    assert line == "command of plugin 'greet' (dist-greet 2.5) failed: ZeroDivisionError: nobody there"


def test_parameters_of_the_checked_metric_are_read(phaselens: Phaselens, error_line: ErrorLine) -> None:
    outcome = phaselens("plugins", "check", "passkey", "-P", "passkey.symbls=abc")
    assert outcome.code == 1
    assert "no parameter 'symbls'; did you mean symbols?" in " ".join(outcome.out.split())
    assert "'sinks' is not in this run" in error_line(2, "plugins", "check", "passkey", "-P", "sinks.tau=0.2")
