"""The code of the tutorial for plugin authors runs from top to bottom."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from tools.plugin_reference import PAGE

from phaselens.cli.entry import run_to_exit_code
from phaselens.plugin import plugins
from tests.toys import save_checkpoint

FOLDER = PAGE.parent
BLOCK = re.compile(
    r"^```(?P<kind>python|sh)(?: title=(?P<title>\S+))?\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@pytest.mark.slow
def test_the_tutorials_code_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the code in an empty folder, with two tiny checkpoints in place of the bundled pair."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for seed, name in enumerate(("rope", "drope")):
        save_checkpoint(tmp_path / "tiny" / name, seed=seed)
    executed_blocks = []
    for block in BLOCK.finditer((FOLDER / "tutorial.md").read_text()):
        code = re.sub(r'"(rope|drope)"(?=[,\]])(?=.*metrics)', r'"tiny/\1"', block["code"])
        executed_blocks.append(block["title"] or block["kind"])
        if block["title"]:
            Path(block["title"]).write_text(code)
        elif block["kind"] == "python":
            exec(compile(code, "tutorial.md", "exec"), {"__name__": "tutorial"})
        else:
            plugins.cache_clear()
            for line in code.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "phaselens"
                arguments = [
                    f"tiny/{argument}" if argument in ("rope", "drope") else argument
                    for argument in arguments
                ]
                assert run_to_exit_code(arguments) == 0, capsys.readouterr()
    plugins.cache_clear()
    for module in ("diffuseness", "intervals", "parameters", "silence"):
        sys.modules.pop(module, None)
    assert executed_blocks == [
        "diffuseness.py",
        "sh",
        "sh",
        "sh",
        "intervals.py",
        "sh",
        "python",
        "python",
        "parameters.py",
        "sh",
        "silence.py",
        "sh",
        "sh",
    ]
    assert (tmp_path / "diffuseness.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "phaselens-my-diffuseness" / "pyproject.toml").is_file()
    output = capsys.readouterr().out
    assert "diffuseness of attention" in output
    assert "leave earlier queries out" in output
    assert "values at the first token silenced" in output


def test_the_causal_example_is_at_most_twenty_lines() -> None:
    (code,) = [
        block["code"]
        for block in BLOCK.finditer((FOLDER / "tutorial.md").read_text())
        if block["title"] == "silence.py"
    ]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
