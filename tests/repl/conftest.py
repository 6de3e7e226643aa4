"""A shell on tiny models, in this process and without a terminal."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from phaselens.testing import tiny_lens

Lines = Callable[..., tuple[str, str]]


@pytest.fixture(scope="session")
def lenses() -> dict[str, Any]:
    """Two models, shared because wrapping them takes longer than a test."""
    return {
        "rope": tiny_lens("llama", label="rope", num_hidden_layers=3),
        "other-model": tiny_lens("gpt2", label="other-model"),
    }


@contextmanager
def shell_on(lenses: dict[str, Any], tmp_path: Path) -> Iterator[Any]:
    """IPython on these models; it restores what it changes of them and of this process."""
    hooks_before = sys.displayhook, sys.excepthook

    from phaselens.repl.session import Session
    from phaselens.repl.shell import Shell, make_shell

    session = Session(lenses, str(tmp_path / "figures"), quiet=True)
    loads = {label: f"LOAD({label!r})" for label in lenses}
    shell = make_shell(session, loads, history=":memory:")
    shell.session = session
    yield shell
    gc.freeze()  # IPython collects garbage when it ends, which takes 0.4 s in a test process
    shell.atexit_operations()
    gc.unfreeze()
    atexit.unregister(shell.atexit_operations)
    shell.restore_sys_module_state()
    Shell.clear_instance()
    sys.displayhook, sys.excepthook = hooks_before
    lenses["rope"].set_rotation(nulled=False)


@pytest.fixture
def shell(lenses: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """IPython on `rope` and `other-model`."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    with shell_on(lenses, tmp_path) as shell:
        yield shell


@pytest.fixture
def lines(shell: Any, capsys: pytest.CaptureFixture[str]) -> Lines:
    """Return a function that types lines and returns stdout and stderr."""

    def run(*typed: str) -> tuple[str, str]:
        capsys.readouterr()
        for line in typed:
            shell.run_cell(line, store_history=True)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def ready(lines: Lines) -> Lines:
    """`lines` in a session with two prompts and a metric."""
    lines('clean = m.prompt("to be or")', 'corrupt = m.prompt("to do or")', 'logit_diff("e", "o")')
    return lines
