"""`--bos` of the REPL: a session's prompts, its notes, and the script that makes it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import phaselens
from phaselens.cli.outcome import run_to_exit_code
from phaselens.repl.script import script
from phaselens.repl.session import Session
from phaselens.testing import tiny_model, tiny_tokenizer
from tests.toys import save_checkpoint


class Shell:
    """Takes what `phaselens repl` makes, and reads no lines."""

    def __init__(self, session: Session, loads: dict[str, str], **_: Any) -> None:
        Shell.session, Shell.loads = session, loads

    def show_banner(self) -> None: ...

    def mainloop(self) -> None: ...


def test_the_policy_is_that_of_all_prompts_and_of_the_script(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("phaselens.repl.shell.make_shell", Shell)
    folder = save_checkpoint(tmp_path / "toy")
    assert run_to_exit_code(["repl", str(folder), "--bos", "never", "--quiet"]) == 0
    session, names = Shell.session, Shell.session.names
    assert session.first.info.bos == "never"
    exec('clean, corrupt = m.prompt("a b"), m.prompt("a c", bos="auto")', names)
    assert names["clean"].ids == (3, 4)
    assert names["corrupt"].ids == (0, 3, 5)
    exec('corrupt = m.prompt("a c")', names)
    text = script(session, Shell.loads)
    assert f"lens = phaselens.load({str(folder)!r}, bos='never')" in text
    assert "clean = prompt(lens, 'a b')" in text


def test_new_prompts_are_shown_with_their_notes(tmp_path: Path, capsys: Any) -> None:
    lens = phaselens.load(
        tiny_model("llama"), label="m", tokenizer=tiny_tokenizer(adds_eos=True), check=False
    )
    session = Session({"m": lens}, str(tmp_path), quiet=True)
    exec('clean = m.prompt("<s>to be")', session.names)
    session.after_line()
    shown = " ".join(capsys.readouterr().out.split())
    assert "6 tokens of 'm': 0'<s>' 1't' 2'o' 3' ' 4'b' 5'e' note: the tokenizer appends '</s>'" in shown
    assert (
        "note: text 'prompt' begins with the BOS token '<s>' as written; BOS is there exactly once" in shown
    )
