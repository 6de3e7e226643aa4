"""The command line in this process, and small checkpoints for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from phaselens.cli.outcome import run_to_exit_code
from tests.distributions import install
from tests.toys import letters, save_checkpoint

__all__ = ["install"]


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Phaselens = Callable[..., Outcome]


@pytest.fixture
def phaselens(capsys: pytest.CaptureFixture[str]) -> Phaselens:
    """Run a command line; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run_to_exit_code([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def fails(phaselens: Phaselens) -> Callable[..., str]:
    """Run a command line that must fail with a code, nothing on stdout and one line on stderr; returns that line."""

    def run(code: int, *arguments: object) -> str:
        outcome = phaselens(*arguments)
        assert outcome.out == ""
        assert outcome.err.startswith("phaselens: error: ")
        assert outcome.err.count("\n") == 1
        assert outcome.code == code
        return outcome.err.removeprefix("phaselens: error: ").rstrip("\n")

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of four short texts."""
    path = tmp_path_factory.mktemp("texts") / "four.txt"
    path.write_text("\n".join(letters(length, length) for length in (5, 12, 2, 9)))
    return path
