"""`--bos` of the REPL: a session's prompts, its notes, and the script that recreates it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.cli.entry import run_to_exit_code
from phaselens.data.tokens import BOS_POLICIES
from phaselens.repl.script import script
from phaselens.repl.session import Session
from phaselens.testing import tiny_model, tiny_tokenizer
from tests.runs.metrics import probe
from tests.toys import save_checkpoint


class RecordingShell:
    """A shell that records its session and reads no lines."""

    def __init__(self, session: Session, loads: dict[str, str], **_: Any) -> None:
        RecordingShell.session, RecordingShell.loads = session, loads

    def show_banner(self) -> None: ...

    def mainloop(self) -> None: ...


@pytest.mark.slow
def test_the_bos_policy_applies_to_all_prompts_and_to_the_script(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("phaselens.repl.shell.make_shell", RecordingShell)
    folder = save_checkpoint(tmp_path / "toy")
    assert run_to_exit_code(["repl", str(folder), "--bos", "never", "--quiet"]) == 0
    session, names = RecordingShell.session, RecordingShell.session.names
    assert session.first_model.info.bos == "never"
    exec('clean, corrupt = m.prompt("a b"), m.prompt("a c", bos="auto")', names)
    assert names["clean"].ids == (3, 4)
    assert names["corrupt"].ids == (0, 3, 5)
    exec('corrupt = m.prompt("a c")', names)
    text = script(session, RecordingShell.loads)
    assert f"lens = phaselens.load({str(folder)!r}, bos='never')" in text
    assert "clean = prompt(lens, 'a b')" in text


def test_new_prompts_are_shown_with_their_notes(tmp_path: Path, capsys: Any) -> None:
    lens = phaselens.load(
        tiny_model("llama"), label="m", tokenizer=tiny_tokenizer(adds_eos=True), check=False
    )
    session = Session({"m": lens}, str(tmp_path), quiet=True)
    exec('clean = m.prompt("<s>to be")', session.names)
    session.show_new_prompts()
    output = " ".join(capsys.readouterr().out.split())
    assert "6 tokens of 'm': 0'<s>' 1't' 2'o' 3' ' 4'b' 5'e' note: the tokenizer appends '</s>'" in output
    assert "note: text 'prompt' itself begins with BOS '<s>'; no second one is added" in output


@pytest.mark.slow
@pytest.mark.parametrize("bos", BOS_POLICIES)
@pytest.mark.parametrize("options", [{}, {"adds_bos": False}], ids=["adds BOS", "adds none"])
def test_a_prompt_has_the_tokens_of_a_run_and_of_the_lens(
    tmp_path: Path, options: dict[str, Any], bos: str
) -> None:
    tokenizer = tiny_tokenizer(**options)
    lens = phaselens.load(tiny_model("llama"), label="m", tokenizer=tokenizer, bos=bos, check=False)
    session = Session({"m": lens}, str(tmp_path), quiet=True)
    for text in ("to be", "<s>to be"):
        exec(f"clean = m.prompt({text!r})", session.names)
        ids = session.names["clean"].ids
        plain = tuple(tokenizer("to be", add_special_tokens=False)["input_ids"])
        has_bos = text.startswith("<s>") or bos == "always" or (bos == "auto" and not options)
        assert ids == ((0, *plain) if has_bos else plain)
        assert tuple(lens.to_tokens(text)[0].tolist()) == ids
        assert lens.to_str_tokens(text) == [tokenizer.decode([token]) for token in ids]
        measured_ids: list[tuple[int, ...]] = []
        reader = probe(
            update=lambda self, layer, ids_list=measured_ids: ids_list.append(
                tuple(layer.batch.tokens[0].tolist())
            )
        )
        run = phaselens.run(lens, metrics=[reader], texts=[text])
        assert set(measured_ids) == {ids}
        assert run.models[0].bos == session.names["clean"].bos == bos
