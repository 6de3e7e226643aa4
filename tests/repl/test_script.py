"""A saved session runs by itself, in a fresh process, and finds the same numbers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import phaselens
from phaselens.repl.script import script
from phaselens.repl.session import Session
from tests.toys import save_checkpoint

STATE = """
clean = m.prompt("a b c d e f")
corrupt = m.prompt("a b x d e f")
logit_diff("g", "h")
patch("blocks.1.hook_resid_pre", pos=[3, -1])
ablate(what="head", layer=range(2), head=1, value="mean")
nope(1)
condition("bos-mlp", layer=0)
metric("bos-norm", massive_factor=3.0)
run()
sweep("v", by="pos-head", layer=[0, 1])
"""


def play(session: Session, state: str) -> None:
    for line in state.strip().splitlines():
        exec(line, session.names)


@pytest.mark.slow
def test_a_saved_session_reproduces_its_last_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tmp_path / "model")
    lens = phaselens.load(str(folder), label="toy")
    session = Session({"toy": lens}, str(tmp_path), quiet=True)
    play(session, STATE)
    text = script(session, {"toy": f"phaselens.load({str(folder)!r}, label='toy')"})
    expected = "\n".join(
        str(each)
        for each in (
            session.experiment.run(),
            session.experiment.measure("bos-norm", massive_factor=3.0),
            session.experiment.sweep("v", by="pos-head", layer=[0, 1]),
        )
    )
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert imported == {"phaselens.patching"}
    capsys.readouterr()
    file = tmp_path / "state.py"
    file.write_text(text)
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    done = subprocess.run(
        [sys.executable, "-c", threads + file.read_text()],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_texts_are_written_so_that_they_cannot_become_code(lines, shell):
    lines("clean = m.prompt('a\"\\'\\n\\\\');import os")
    out, error = lines("%save_session state.py")
    assert (out, error) == ("written: state.py\n", "")
    tree = ast.parse(Path("state.py").read_text())
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert "a\"'\n\\" in texts
    assert "corrupt = None" in Path("state.py").read_text()


def test_what_a_script_cannot_say_is_an_error(lines):
    assert lines("%save_session state.py")[1].startswith("error: there is no prompt yet")
    lines('clean = m.prompt("to be")', "metric(lambda logits: logits[:, -1, 3])")
    assert (
        "a function of this session, which a script cannot make again" in lines("%save_session state.py")[1]
    )
    lines('metric("loss")')
    assert lines("%save_session no/such/folder/state.py")[1].startswith(
        "error: save_session: no/such/folder/state.py cannot"
    )
    assert lines("%save_session state.py")[0] == "written: state.py\n"
