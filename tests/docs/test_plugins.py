"""The pages for authors of plugins: the tutorial's code runs, the reference is the code's, nothing is left out."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from tools.plugin_reference import PAGE, page

import phaselens.plugin
from phaselens import testing
from phaselens.cli.outcome import run_to_exit_code
from phaselens.plugin import hookspecs, plugins
from phaselens.testing import fixtures
from tests.toys import save_checkpoint

FOLDER = PAGE.parent
BLOCK = re.compile(
    r"^```(?P<kind>python|sh)(?: title=(?P<title>\S+))?\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@pytest.mark.slow
def test_the_tutorials_code_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder; two tiny checkpoints stand for the bundled pair."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for seed, name in enumerate(("rope", "drope")):
        save_checkpoint(tmp_path / "tiny" / name, seed=seed)
    ran = []
    for block in BLOCK.finditer((FOLDER / "tutorial.md").read_text()):
        code = re.sub(r'"(rope|drope)"(?=[,\]])(?=.*metrics)', r'"tiny/\1"', block["code"])
        ran.append(block["title"] or block["kind"])
        if block["title"]:
            Path(block["title"]).write_text(code)
        elif block["kind"] == "python":
            exec(compile(code, "tutorial.md", "exec"), {"__name__": "tutorial"})
        else:
            plugins.cache_clear()
            for line in code.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "phaselens"
                arguments = [f"tiny/{each}" if each in ("rope", "drope") else each for each in arguments]
                assert run_to_exit_code(arguments) == 0, capsys.readouterr()
    plugins.cache_clear()
    for module in ("diffuseness", "parameters", "silence"):
        sys.modules.pop(module, None)
    assert ran == [
        "diffuseness.py",
        "sh",
        "sh",
        "sh",
        "python",
        "parameters.py",
        "sh",
        "silence.py",
        "sh",
        "sh",
    ]
    assert (tmp_path / "diffuseness.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "phaselens-my-diffuseness" / "pyproject.toml").is_file()
    out = capsys.readouterr().out
    assert "diffuseness of attention" in out
    assert "leave earlier queries out" in out
    assert "values at the first token silenced" in out


def test_the_causal_example_is_at_most_twenty_lines() -> None:
    (code,) = [
        block["code"]
        for block in BLOCK.finditer((FOLDER / "tutorial.md").read_text())
        if block["title"] == "silence.py"
    ]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_the_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text() == page(), "run python -m tools.plugin_reference"


def test_every_hook_and_every_public_name_is_in_the_reference() -> None:
    text = PAGE.read_text()
    hooks = [name for name in vars(hookspecs) if name.startswith("phaselens_")]
    assert len(hooks) == 5
    for name in (*hooks, *phaselens.plugin.__all__):
        assert re.search(rf"^### `{name}\b", text, re.MULTILINE), name


def test_every_check_every_truth_and_every_fixture_is_explained() -> None:
    from phaselens.testing._checks import CHECKS

    text = (FOLDER / "testing.md").read_text()
    assert re.findall(r"^\| ([a-z].*?|strict JSON) \| ", text, re.MULTILINE)[1:] == [
        "a usable class",
        *CHECKS,
    ]
    assert all(f'`"{kind}"`' in text for kind in testing.PLANTED)
    assert all(f"`{name}(" in text for name in vars(fixtures) if name.startswith("phaselens_"))
