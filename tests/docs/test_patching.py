"""The page and the notebook on patching: all their code runs and does what they claim."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.notebook_pages import stored_notebook

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "patching.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.mark.slow
def test_every_block_of_the_page_runs_in_order(folder, monkeypatch, capsys):
    """Run the blocks with their assertions, which state what the text claims."""
    monkeypatch.chdir(folder)
    scope: dict[str, object] = {"__name__": "page"}
    for kind, code in BLOCKS:
        if kind == "python":
            exec(compile(code, "patching.md", "exec"), scope)
    assert "attribution against patching, 24 cells" in capsys.readouterr().out
    for name in ("mlp", "heads"):
        assert (folder / f"{name}.png").is_file()


@pytest.mark.slow
def test_the_session_of_the_page_can_be_typed(folder, monkeypatch, capsys):
    import phaselens
    from phaselens.repl.script import script
    from phaselens.repl.session import Session

    monkeypatch.chdir(folder)
    session = Session({"rope": phaselens.load("rope")}, str(folder), quiet=True)
    (typed,) = [code for kind, code in BLOCKS if kind == "text"]
    for line in typed.splitlines():
        if line.startswith("%save_session"):
            assert "experiment.condition" in script(session, {"rope": "phaselens.load('rope')"})
        else:
            exec(line, session.names)
            session.show_new_prompts()
    assert "1. condition bos-mlp: " in capsys.readouterr().out


def test_the_pages_figures_and_link_targets_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (DOCS / link).exists(), link
    assert {kind for kind, _ in BLOCKS} == {"python", "text"}


def test_the_notebook_is_the_page():
    stored = stored_notebook("patching")
    assert all(cell.outputs or cell.execution_count for cell in stored.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    from tools.notebooks import execute, notebook

    done = execute(notebook("patching"), tmp_path)
    printed = "".join(
        output.get("text", "") for cell in done.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "key alone +0." in printed
    assert (tmp_path / "heads.png").is_file()
