"""A shell on tiny models, in this process, without a terminal."""

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
    """Two models; wrapping them takes longer than a test does."""
    return {
        "rope": tiny_lens("llama", label="rope", num_hidden_layers=3),
        "other-model": tiny_lens("gpt2", label="other-model"),
    }


@contextmanager
def shell_on(lenses: dict[str, Any], tmp_path: Path) -> Iterator[Any]:
    """IPython on these models; what it changes of them and of this process is put back."""
    before = sys.displayhook, sys.excepthook

    from phaselens.lens.positions import restore_rotation
    from phaselens.repl.session import Session
    from phaselens.repl.shell import Shell, make_shell

    session = Session(lenses, str(tmp_path / "figures"), quiet=True)
    loads = {label: f"LOAD({label!r})" for label in lenses}
    made = make_shell(session, loads, history=":memory:")
    made.session = session
    yield made
    gc.freeze()  # IPython collects garbage at its end: 0.4 s over all that a test process holds, and for nothing
    made.atexit_operations()
    gc.unfreeze()
    atexit.unregister(made.atexit_operations)
    made.restore_sys_module_state()
    Shell.clear_instance()
    sys.displayhook, sys.excepthook = before
    restore_rotation(lenses["rope"])


@pytest.fixture
def shell(lenses: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """IPython on `rope` and `other-model`."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    with shell_on(lenses, tmp_path) as made:
        yield made


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
