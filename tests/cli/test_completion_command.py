"""Completion in shells: the script, and the names that it asks for."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from phaselens.cli.completion_command import SHELLS, VARIABLE
from tests.cli.conftest import ErrorLine, Phaselens


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_that_it_can_read(shell: str, phaselens: Phaselens) -> None:
    code, out, err = phaselens("completion", shell)
    assert (code, err) == (0, "")
    assert VARIABLE in out
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed; its script is printed, not read")
    checked = subprocess.run([program, "-n"], input=out, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_another_shell_is_refused(error_line: ErrorLine) -> None:
    assert "'bash', 'zsh', 'fish'" in error_line(2, "completion", "csh")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("phaselens compl", ["completion"]),
        ("phaselens run -p sink", ["sink-removal", "sink-tokens", "sinks"]),
        ("phaselens run -p sinks,obs", ["sinks,observational"]),
        ("phaselens run dr", ["drope"]),
        ("phaselens run mine=dr", ["mine=drope"]),
        ("phaselens run --heat", ["--heatmap"]),
    ],
)
def test_names_are_completed(
    words: str, expected: list[str], phaselens: Phaselens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    code, out, _ = phaselens()
    items = [line.split(",", 1)[1] for line in out.splitlines()]
    assert (code, items) == (0, expected)
