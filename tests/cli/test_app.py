"""Options and help of `phaselens` without a command."""

from tests.cli.conftest import Phaselens


def test_version(phaselens: Phaselens) -> None:
    from importlib.metadata import version

    assert phaselens("--version").out == f"phaselens {version('phaselens')}\n"


def test_without_arguments_the_help_is_shown(phaselens: Phaselens) -> None:
    outcome = phaselens()
    assert outcome.out.startswith("Usage: phaselens [OPTIONS] COMMAND [ARGS]...")
    assert (outcome.code, outcome.err) == (2, "")
