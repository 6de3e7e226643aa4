"""`phaselens run --out`: the directory, what continues it, and what the command says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ErrorLine, Phaselens


@pytest.mark.slow
def test_the_same_command_prints_the_same_output_again(
    phaselens: Phaselens, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ["run", checkpoint, "-p", "sinks", "--texts", texts, "--format", "json"]
    plain = phaselens(*arguments)
    for _ in range(2):
        result = phaselens(*arguments, "--out", tmp_path / "r")
        assert (result.code, result.out) == (0, plain.out)
        assert result.err.rstrip().endswith(f"note: the run is in {tmp_path / 'r'}")
    command = json.loads((tmp_path / "r" / "run.json").read_text())["command"]
    assert command == ["phaselens", *map(str, arguments), "--out", str(tmp_path / "r")]


@pytest.mark.slow
def test_another_command_is_refused_and_fresh_starts_over(
    phaselens: Phaselens, error_line: ErrorLine, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ["run", checkpoint, "-p", "sinks", "--texts", texts, "--out", tmp_path / "r", "--quiet"]
    assert phaselens(*arguments).code == 0
    message = error_line(2, *arguments, "--threshold", "0.5", "--shard-tokens", "9")
    assert (
        "was made with something else: --shard-tokens: 65536, now 9; sinks.threshold: 0.3, now 0.5" in message
    )
    assert phaselens(*arguments, "--threshold", "0.5", "--fresh").code == 0
    assert (tmp_path / "r-2" / "result.json").is_file()


def test_fresh_without_a_directory_is_refused(error_line: ErrorLine, checkpoint: Path) -> None:
    assert "name one with out (--out)" in error_line(2, "run", checkpoint, "-p", "sinks", "--fresh")


def test_nothing_is_written_without_out(
    phaselens: Phaselens, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert phaselens("run", checkpoint, "-p", "sinks", "--texts", texts).code == 0
    assert list(folder.iterdir()) == []


SLOWLY = """
import sys, time
from phaselens.cli import main
from phaselens.runs.directory_store import DirectoryStore
save = DirectoryStore.save

def slow_save(self, *arguments):
    save(self, *arguments)
    time.sleep(float(sys.argv[-1]))

DirectoryStore.save = slow_save
main(sys.argv[1:-1])
"""


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_the_same_command_continues(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    def command(out: Path) -> list[Any]:
        arguments = ["-p", "sinks,bos-mlp", "--texts", texts, "--shard-tokens", "8", "--format", "json"]
        return ["run", checkpoint, *arguments, "--out", out]

    def start(out: Path, seconds: str) -> Any:
        words = [sys.executable, "-c", SLOWLY, *map(str, command(out)), seconds]
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )

    process = start(tmp_path / "r", "0.5")
    while len(list(tmp_path.glob("r/shards/*observations*"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-2:] == [
        f"phaselens: note: finished shards are kept in {tmp_path / 'r'}; the same command continues from them",
        "phaselens: error: interrupted",
    ]
    continued, uninterrupted = start(tmp_path / "r", "0"), start(tmp_path / "whole", "0")
    outputs = [json.loads(run.communicate(timeout=60)[0]) for run in (continued, uninterrupted)]
    assert outputs[0] == outputs[1]
    tables = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "tables").iterdir()}
    assert tables == {path.name: path.read_bytes() for path in (tmp_path / "r" / "tables").iterdir()}
