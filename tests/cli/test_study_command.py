"""`phaselens study run`, `list`, `show` and `check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import ErrorLine, Phaselens
from tests.runs.studies import study_text


@pytest.fixture
def file(tmp_path: Path, checkpoint: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(study_text(checkpoint))
    return path


@pytest.mark.slow
def test_a_study_is_run_and_printed(phaselens: Phaselens, file: Path, checkpoint: Path) -> None:
    result = phaselens("study", "run", file, "--models", checkpoint, checkpoint, "--quiet")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[:2] == ["A small study", "A paper"]
    assert sum("sink rate by layer" in line for line in lines) == 2
    assert "  1 more value of layers that the measured models lack" in lines
    assert any(line.startswith("(1) ") for line in lines)
    answer = phaselens("study", "run", file, "--models", f"{checkpoint},{checkpoint}", "--format", "json")
    table = json.loads(answer.out)
    assert [column["name"] for column in table["columns"]][4:9] == [
        "published", "measured", "difference", "comparable", "why",
    ]  # fmt: skip
    assert len(table["rows"]) == 5


def test_a_study_is_checked_and_shown_without_a_model(phaselens: Phaselens, file: Path) -> None:
    assert phaselens("study", "check", file).out == "small: ok (2 models, 1 runs, 5 values)\n"
    shown = phaselens("study", "show", file).out
    assert "run published: two texts" in shown
    assert "sinks: include_query0 = True, strongest = False" in shown
    assert "rope-vs-drope" in phaselens("study", "list").out


def test_mistakes_are_one_line(error_line: ErrorLine, file: Path, tmp_path: Path) -> None:
    assert "no study 'x.toml'" in error_line(2, "study", "run", "x.toml")
    assert "name models with --models" in error_line(2, "study", "run", file, "rope")
    file.write_text(file.read_text().replace('["a b c d e", "f g h i"]', '"missing.txt"'))
    assert f"no texts '{tmp_path / 'missing.txt'}'" in error_line(2, "study", "check", file)
