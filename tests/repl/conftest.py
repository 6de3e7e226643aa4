"""A shell on tiny models, in this process, without a terminal."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phaselens.testing import tiny_lens

Lines = Callable[..., tuple[str, str]]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """IPython on two models, `rope` and `other-model`; what it changes of this process is put back."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    before = sys.displayhook, sys.excepthook

    from phaselens.repl.session import Session
    from phaselens.repl.shell import Shell, make_shell

    lenses = {
        "rope": tiny_lens("llama", label="rope", num_hidden_layers=3),
        "other-model": tiny_lens("gpt2", label="other-model"),
    }
    session = Session(lenses, str(tmp_path / "figures"), quiet=True)
    loads = {label: f"LOAD({label!r})" for label in lenses}
    made = make_shell(session, loads, history=":memory:")
    made.session = session
    yield made
    made.atexit_operations()
    atexit.unregister(made.atexit_operations)
    made.restore_sys_module_state()
    Shell.clear_instance()
    sys.displayhook, sys.excepthook = before


@pytest.fixture
def lines(shell: Any, capsys: pytest.CaptureFixture[str]) -> Lines:
    """Types lines, and gives what stood on stdout and stderr."""

    def run(*typed: str) -> tuple[str, str]:
        capsys.readouterr()
        for line in typed:
            shell.run_cell(line, store_history=True)
        seen = capsys.readouterr()
        return seen.out, seen.err

    return run


@pytest.fixture
def ready(lines: Lines) -> Lines:
    """The same, with two prompts and a metric."""
    lines('clean = m.prompt("to be or")', 'corrupt = m.prompt("to do or")', 'logit_diff("e", "o")')
    return lines
