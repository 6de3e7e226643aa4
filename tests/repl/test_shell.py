"""The session in a real terminal: start, patch, undo, sweep, Ctrl-C, save, quit."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.toys import save_checkpoint

MAIN = "import sys; from phaselens.cli import main; sys.exit(main())"
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\r")


class PseudoTerminal:
    """A terminal of 100 × 40 whose user waits for the prompt before typing."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        environment = {
            **os.environ, "HOME": str(folder), "IPYTHONDIR": str(folder / "ipython"), "TERM": "xterm-256color",
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.child = pexpect.spawn(
            sys.executable, ["-c", MAIN, *arguments], cwd=str(folder), env=environment, encoding="utf-8",
            timeout=120, dimensions=(40, 100), echo=False,
        )  # fmt: skip
        self.number = 0
        self.banner = self.wait()

    def wait(self) -> str:
        """Return the output until the next prompt."""
        self.number += 1
        self.child.expect(rf"In \[(?:\x1b\[[0-9;]*m)*{self.number}(?:\x1b\[[0-9;]*m)*\]: ")
        return ANSI.sub("", self.child.before)

    def type(self, line: str) -> str:
        """Type a line and return its output."""
        self.child.send(line + "\r")
        return self.wait()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    save_checkpoint(tmp_path / "toy", num_hidden_layers=4)
    terminal = PseudoTerminal(["repl", "toy"], tmp_path)
    yield terminal
    terminal.child.close(force=True)


@pytest.mark.slow
def test_start_patch_undo_sweep_save_quit(terminal, tmp_path):
    assert "toy: LlamaForCausalLM, 4 layers" in terminal.banner
    assert "guide() lists all commands" in terminal.banner
    terminal.child.send('patch("blocks.1.hook_resid_po\t')
    terminal.child.expect("hook_resid_post")
    terminal.child.send('", pos=0)\r')
    assert "there is no prompt yet" in terminal.wait()
    terminal.type('clean = toy.prompt("a b c d e")')
    assert re.search(r"3 +'c' +≠ 'x'", terminal.type('corrupt = toy.prompt("a b x d e")'))
    terminal.type('logit_diff("g", "h")')
    assert "1. patch blocks.3.hook_resid_post at position 5" in terminal.type(
        'patch("blocks.3.hook_resid_post", pos=5)'
    )
    assert "after 1 edit" in terminal.type("run()")
    assert "undone: patch blocks.3" in terminal.type("undo()")
    assert "error: undo: there is no edit to undo" in terminal.type("undo()")
    output = terminal.type('sweep("resid")')
    assert "pos \\ layer" in output
    assert "5 ' e'" in output or "5 'e'" in output
    file = re.search(r"figure: (\S+\.png)", output.replace("\n", ""))
    assert Path(file[1]).is_file()
    assert "written: state.py" in terminal.type("%save_session state.py")
    assert (tmp_path / "state.py").read_text().endswith("print(experiment.sweep('resid'))\n")
    terminal.child.send("quit\r")
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    assert terminal.child.exitstatus == 0
    assert (tmp_path / "ipython" / "profile_default" / "history.sqlite").is_file()


@pytest.mark.slow
def test_an_edit_outlives_prompts_that_are_too_short_for_it(terminal, tmp_path):
    terminal.type('clean = m.prompt("a b c d e")')
    terminal.type('corrupt = m.prompt("a b x d e")')
    terminal.type('patch("blocks.1.hook_resid_pre", pos=5)')
    before = terminal.type("run()")
    assert "after 1 edit" in before
    output = terminal.type('clean = m.prompt("a b c")')
    assert "error" not in output
    assert "corrupt is still the earlier prompt, of 6 tokens; assign corrupt too" in output
    assert "note: set aside, the prompts have 4 tokens: edit 1" in terminal.type(
        'corrupt = m.prompt("a x c")'
    )
    assert "set aside: 1. patch blocks.1.hook_resid_pre" in terminal.type("run()")
    assert "did you mean value='mean'?" in terminal.type('ablate(what="mlp", to="mean")')
    assert "did you mean layer=3?" in terminal.type("patch(layers=3)")
    assert "written: state.py" in terminal.type("%save_session state.py")
    terminal.type('clean = m.prompt("a b c d e"); corrupt = m.prompt("a b x d e")')
    assert terminal.type("run()").splitlines()[1:] == before.splitlines()[1:]
    assert "undone: patch blocks.1" in terminal.type("undo()")
    assert "set aside: 1. patch" in terminal.type("import phaselens; exec(open('state.py').read())")


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_and_not_the_session(terminal):
    """The metric sleeps, so that there is time to press Ctrl-C."""
    terminal.type('clean = m.prompt("a b c d e")')
    terminal.type('corrupt = m.prompt("a b x d e")')
    terminal.type("import time")
    terminal.type("slow = lambda logits: (print('cell', flush=True), time.sleep(0.25), logits[:, -1, 3])[-1]")
    terminal.type("metric(slow)")
    terminal.child.send('sweep("head")\r')
    for _ in range(4):
        terminal.child.expect("cell\r\n")
    terminal.child.sendintr()
    assert re.search(r"stopped after \d+ of 16 cells", terminal.wait())
    assert "True" in terminal.type("3 < result.n_done < 16")
    assert "error: NameError" in terminal.type("nothing")
    assert "True" in terminal.type("result.interrupted")
    terminal.child.send("print('be' + 'gun', flush=True) or time.sleep(60)\r")
    terminal.child.expect("begun")
    terminal.child.sendintr()
    assert "interrupted" in terminal.wait()
