"""`phaselens run --shards` computes parts without tables, and `phaselens merge` prints what one run would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phaselens.runs.shard_work import ShardWork
from tests.cli.conftest import ErrorLine, Phaselens


def part(checkpoint: Path, texts: Path, out: Path, number: int) -> list[Any]:
    arguments = ["run", checkpoint, "-p", "sinks", "--texts", texts, "--shard-tokens", "12", "--out", out]
    return [*arguments, "--shards", f"{number}/2"]


@pytest.mark.slow
def test_parts_print_a_note_and_merge_prints_the_run(
    phaselens: Phaselens, error_line: ErrorLine, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r"
    first = phaselens(*part(checkpoint, texts, out, 1))
    assert (first.code, first.out) == (0, "")
    assert first.err.splitlines()[-1] == (
        f"phaselens: note: part 1/2: 2 shards were computed; when all parts are, phaselens merge {out} makes the tables"
    )
    assert "1 shards are missing (observations: 1); run their parts again" in error_line(2, "merge", out)
    assert phaselens(*part(checkpoint, texts, out, 2), "--quiet").err == ""
    merged = phaselens("merge", out, "--format", "json")
    assert merged.code == 0
    plain = phaselens(*part(checkpoint, texts, out, 1)[:-4], "--format", "json")
    assert merged.out == plain.out
    assert phaselens("merge", out, "--quiet", "--format", "json").out == plain.out
    assert (out / "figures" / "sinks.png").is_file()


@pytest.mark.slow
def test_a_shard_that_failed_twice_is_one_line_and_exit_code_1(
    phaselens: Phaselens, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = ShardWork.observe

    def fail(self: ShardWork, shard: Any, active_metrics: Any) -> Any:
        if shard.index == 0:
            raise RuntimeError("its own fault")
        return observe(self, shard, active_metrics)

    monkeypatch.setattr(ShardWork, "observe", fail)
    result = phaselens(*part(checkpoint, texts, tmp_path / "r", 1), "--quiet")
    line = (
        "phaselens: error: tiny: shard 0 (observations) was not computed: it failed twice: RuntimeError: its own "
        "fault; 1 texts are missing: 'four:2'; to try again, repeat its command\n"
    )
    assert (result.code, result.out, result.err) == (1, "", line)
    phaselens(*part(checkpoint, texts, tmp_path / "r", 2), "--quiet")
    merged = phaselens("merge", tmp_path / "r", "--quiet", "--table", "texts", "--format", "csv")
    assert (merged.code, merged.err) == (1, line)
    assert merged.out.count("\n") > 3
    listed = phaselens("runs", tmp_path / "r")
    assert "failed: 1 shards" in " ".join(listed.out.split())


def test_a_folder_without_a_run_is_refused(error_line: ErrorLine, tmp_path: Path) -> None:
    assert "holds no run.json" in error_line(2, "merge", tmp_path)
