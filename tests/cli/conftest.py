"""The command line in this process, and small checkpoints for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from phaselens.cli.entry import run_to_exit_code
from tests.distributions import install
from tests.toys import letters, save_checkpoint

__all__ = ["install"]


class CliResult(NamedTuple):
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str


Phaselens = Callable[..., CliResult]
ErrorLine = Callable[..., str]


@pytest.fixture
def phaselens(capsys: pytest.CaptureFixture[str]) -> Phaselens:
    """A function that runs a command line and returns exit code, stdout and stderr."""

    def run(*arguments: object) -> CliResult:
        capsys.readouterr()
        exit_code = run_to_exit_code([str(argument) for argument in arguments])
        return CliResult(exit_code, *capsys.readouterr())

    return run


@pytest.fixture
def error_line(phaselens: Phaselens) -> ErrorLine:
    """A function that runs a command line that must fail with a code and one line on stderr, and returns that line."""

    def run(code: int, *arguments: object) -> str:
        result = phaselens(*arguments)
        assert result.out == ""
        assert result.err.startswith("phaselens: error: ")
        assert result.err.count("\n") == 1
        assert result.code == code
        return result.err.removeprefix("phaselens: error: ").rstrip("\n")

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
