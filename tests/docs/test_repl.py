"""The page on the session: its lines can be typed, and it lists the verbs as `guide()` does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.page_blocks import ROOT, blocks, same_output

PAGE = (ROOT / "docs" / "repl.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_lines_can_be_typed_and_the_verbs_are_those_of_the_guide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import phaselens
    from phaselens.repl.session import Session

    session = Session({"rope": phaselens.load("rope")}, str(tmp_path), quiet=True)
    capsys.readouterr()
    session.names["guide"]()
    _, typed, verbs = blocks(PAGE)
    assert same_output(verbs.code, capsys.readouterr().out), "paste what guide() prints"
    for line in typed.code.splitlines():
        exec(line, session.names)
        session.show_new_prompts()
    assert "patch" in capsys.readouterr().out
    assert list(tmp_path.glob("*.png"))
