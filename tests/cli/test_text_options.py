"""Options for texts: labels that group tables, and windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import ErrorLine, Phaselens
from tests.toys import letters


@pytest.mark.slow
def test_labels_group_the_tables_of_every_command(
    phaselens: Phaselens, error_line: ErrorLine, checkpoint: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "texts.jsonl", tmp_path / "run"
    records = [
        {"id": f"t{n}", "text": letters(4 + 3 * n), "kind": "odd" if n % 2 else "even"} for n in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    run = ("run", checkpoint, "-p", "sinks", "--texts", file)
    printed = phaselens(*run, "--label-field", "kind", "--by", "label", "--window", 8, "--out", out)
    assert printed.code == 0
    assert "sinks by label, tiny: score, share of attention; mean over the label's texts" in printed.out
    assert "2 documents were cut into 4 windows of up to 8 tokens" in printed.out
    assert phaselens("show", out, "--by", "label").out == printed.out
    lines = phaselens("export", out, "--format", "csv", "--by", "label", "--quiet").out.splitlines()
    assert lines[0].startswith("model,label,value,unit,")
    assert {line.split(",")[1] for line in lines[1:]} == {"odd", "even"}
    assert "name the field that holds them: --label-field NAME" in error_line(2, *run, "--by", "label")
    message = error_line(2, *run, "--window", 9, "--max-tokens", 8)
    assert (
        message
        == "--window 9 is longer than --max-tokens 8, which would cut every window; leave --max-tokens out"
    )
    phaselens(*run, "--out", tmp_path / "plain")
    assert "the run's texts have no labels" in error_line(2, "show", tmp_path / "plain", "--by", "label")
