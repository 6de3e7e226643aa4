"""The session in a real terminal: start, patch, undo, sweep, Ctrl-C, save, quit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from click.testing import CliRunner

from tests.toys import save_checkpoint, save_in_hub_cache

MAIN = "import sys; from phaselens.cli import main; sys.exit(main())"
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\r")


class Terminal:
    """A person at a terminal of 100 × 40, who waits for the prompt before typing."""

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
        """All that is shown until the next prompt."""
        self.number += 1
        self.child.expect(rf"In \[(?:\x1b\[[0-9;]*m)*{self.number}(?:\x1b\[[0-9;]*m)*\]: ")
        return ANSI.sub("", self.child.before)

    def type(self, line: str) -> str:
        """A line, and what it answers."""
        self.child.send(line + "\r")
        return self.wait()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    save_checkpoint(tmp_path / "toy", num_hidden_layers=4)
    one = Terminal(["repl", "toy"], tmp_path)
    yield one
    one.child.close(force=True)


@pytest.mark.slow
def test_start_patch_undo_sweep_save_quit(terminal, tmp_path):
    assert "toy: LlamaForCausalLM, 4 layers" in terminal.banner
    assert "guide() lists what there is" in terminal.banner
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
    assert "error: undo: there is no edit to take back" in terminal.type("undo()")
    shown = terminal.type('sweep("resid")')
    assert "pos \\ layer" in shown
    assert "5 ' e'" in shown or "5 'e'" in shown
    file = re.search(r"figure: (\S+\.png)", shown.replace("\n", ""))
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
    shown = terminal.type('clean = m.prompt("a b c")')
    assert "error" not in shown
    assert "corrupt is still the earlier prompt, of 6 tokens; assign corrupt too" in shown
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
    """The sweep is slowed so that there is time for a hand to reach the keys."""
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


def test_help_imports_neither_ipython_nor_torch():
    code = (
        "import sys\nfrom phaselens.cli.app import app\n"
        "try: app(['repl', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('IPython', 'torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.endswith("[]\n")


def test_help_says_what_it_opens():
    from phaselens.cli.app import app

    shown = CliRunner().invoke(app, ["repl", "--help"])
    assert shown.exit_code == 0
    assert "Patch activations by hand, in IPython." in shown.output


def test_a_model_that_is_not_there_ends_before_ipython_starts(tmp_path):
    from phaselens.cli.outcome import run_to_exit_code

    assert run_to_exit_code(["repl", str(tmp_path / "nothing")]) == 3
    assert run_to_exit_code(["repl", "rope", "--positions", "other=nope"]) == 2


@pytest.mark.parametrize(("argument", "label"), [("gpt2", "gpt2"), ("mine=gpt2@main", "mine")])
def test_a_hub_id_without_an_owner_opens_a_session(argument, label, tmp_path, monkeypatch):
    """From a cache; the shell itself is left out."""
    from phaselens.cli.outcome import run_to_exit_code

    opened = {}

    class Shell:
        def __init__(self, session, loads, **options):
            opened.update(models=session.models, loads=loads, **options)

        def show_banner(self):
            opened["shown"] = True

        def mainloop(self):
            opened["ran"] = True

    monkeypatch.setattr("phaselens.repl.shell.make_shell", Shell)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    save_in_hub_cache(tmp_path, "gpt2", "gpt2")
    assert run_to_exit_code(["repl", argument]) == 0
    assert (list(opened["models"]), opened["shown"], opened["ran"]) == ([label], True, True)
    assert opened["models"][label].info.source == "gpt2"
    assert opened["banner"].startswith(f"{label}: GPT2LMHeadModel, 2 layers")
    extra = "" if label == "gpt2" else ", label='mine', revision='main'"
    assert opened["loads"] == {label: f"phaselens.load('gpt2'{extra})"}


def test_a_hub_id_that_is_not_cached_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    from phaselens.cli.outcome import run_to_exit_code

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run_to_exit_code(["repl", "gpt2"]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("phaselens: error: model 'gpt2': neither one of")
    assert "nor a hub id in the local cache, and HF_HUB_OFFLINE is set" in shown.err
    assert shown.err.count("\n") == 1
