"""`phaselens run --plan`, and the note before a long run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phaselens.runs import planning
from tests.cli.conftest import ErrorLine, Phaselens


@pytest.mark.slow
def test_a_plan_measures_and_writes_nothing(
    phaselens: Phaselens, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    run = ("run", checkpoint, "-p", "sinks,bos-mlp", "--texts", texts, "--out", tmp_path / "run", "--plan")
    printed = phaselens(*run)
    assert (printed.code, printed.err) == (0, "")
    assert "unedited model" in printed.out
    assert "in this process, from the largest batch: 32 tokens (tiny)" in printed.out
    assert not (tmp_path / "run").exists()
    plan = json.loads(phaselens(*run, "--format", "json").out)
    assert [planned["name"] for planned in plan["models"][0]["passes"]] == ["unedited model", "conditions"]
    assert plan["models"][0]["n_texts"] == 4


@pytest.mark.slow
def test_a_long_run_prints_its_plan_as_a_note(
    phaselens: Phaselens, checkpoint: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_FEWEST_BATCHES", 1)
    monkeypatch.setattr(planning, "_LONG_SECONDS", 0.0)
    run = ("run", checkpoint, "-p", "sinks", "--texts", texts)
    assert "note: tiny: 4 texts, 32 tokens, 1 shards; unedited model (sinks)" in phaselens(*run).err
    assert phaselens(*run, "--quiet").err == ""


def test_a_plan_refuses_what_a_run_refuses(error_line: ErrorLine, checkpoint: Path, tmp_path: Path) -> None:
    message = error_line(2, "run", checkpoint, "-p", "sinks", "--texts", tmp_path / "no.txt", "--plan")
    assert "does not exist" in message
