"""Results are alone on stdout, whatever plugins write, and messages are short lines on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phaselens.cli.streams import MessageStream, only_results, print_message, results_stream
from phaselens.plugin import plugins


@pytest.fixture(autouse=True)
def fresh_plugins() -> Iterator[None]:
    """Forget the files that a test has added."""
    yield
    plugins.cache_clear()


HEAD = """
import os, subprocess, sys
from phaselens.plugin import Column, Metric, TableSpec

class Noisy(Metric):
    name = "noisy"
    version = "1"
    tables = (TableSpec("texts", (Column("text", str), Column("layer", int), Column("value", float))),)

    def hooks(self):
        return ["blocks.{layer}.hook_resid_post"]

    def update(self, layer):
        self.per_text.add(layer, value=layer["hook_resid_post"].float().mean((1, 2)))

    def compute(self):
        return {"texts": self.table("texts", [])}
"""


def run_with(
    plugin: str, folder: Path, checkpoint: Path, texts: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    (folder / "noisy.py").write_text(HEAD + plugin)
    call = "from phaselens.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", call, "run", str(checkpoint), "--plugin-file", str(folder / "noisy.py"),
         "-p", "sinks,noisy", "--texts", str(texts), "--quiet", *options],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_json_stays_clean_while_a_plugin_writes_to_every_stream(
    tmp_path: Path, checkpoint: Path, texts: Path
) -> None:
    process = run_with(
        """
    @classmethod
    def define(cls, params):
        print("JUNK")
        sys.__stdout__.write("JUNK")
        return "noise"

    def compute(self):
        os.write(1, b"JUNK")
        subprocess.run(["echo", "JUNK"])
        sys.stdout.close()
        sys.__stdout__.close()
        sys.stderr.close()
        return {"texts": self.table("texts", [])}
""",
        tmp_path, checkpoint, texts, "--format", "json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "JUNK" not in process.stdout
    run = json.loads(process.stdout)
    assert run["metrics"]["sinks"]["tables"]["texts"]["rows"]
    assert "JUNK" in process.stderr


@pytest.mark.slow
def test_the_results_of_others_are_complete_whatever_a_metric_raises_or_returns(
    phaselens: Any, tmp_path: Path, checkpoint: Path, texts: Path
) -> None:
    mistakes = [
        "class Odd(BaseException):\n        def __str__(self): raise SystemExit(5)\n"
        "    def compute(self): raise self.Odd()",
        "def compute(self): raise GeneratorExit()",
        "@classmethod\n    def define(cls, params): return object()",
        "def compute(self):\n        self.warnings = None\n        return {'texts': self.table('texts', [])}",
        "def compute(self):\n        table = self.table('texts', [])\n        table.rows = [3]\n"
        "        return {'texts': table}",
    ]  # fmt: skip
    for number, mistake in enumerate(mistakes):
        plugins.cache_clear()
        file = tmp_path / f"mistake{number}.py"
        file.write_text(f"{HEAD}\n    {mistake}\n")
        result = phaselens(
            "run", checkpoint, "--plugin-file", file, "-p", "sinks,noisy", "--texts", texts, "--quiet",
            "--format", "json",
        )  # fmt: skip
        assert result.code == 1, mistake
        assert result.err.count("\n") == 1, result.err
        assert json.loads(result.out)["metrics"]["sinks"]["tables"]["texts"]["rows"]


@pytest.mark.slow
def test_cells_that_a_metric_writes_past_the_checks_are_checked(
    phaselens: Any, tmp_path: Path, checkpoint: Path, texts: Path
) -> None:
    file = tmp_path / "direct.py"
    file.write_text(
        HEAD
        + """
    def compute(self):
        table = self.table("texts", [])
        table.rows = [(self.per_text.texts[0], None, float("nan"))]
        return {"texts": table}
"""
    )
    for options in (["--format", "json"], []):
        plugins.cache_clear()
        result = phaselens(
            "run",
            checkpoint,
            "--plugin-file",
            file,
            "-p",
            "sinks,noisy",
            "--texts",
            texts,
            "--quiet",
            *options,
        )
        assert (result.code, result.err) == (0, "")
        assert "1 values were NaN or infinite" in result.out


def test_long_messages_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_message("error", f"the id {'9' * 100_000!r} is taken; give each its own")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 400
    assert error.endswith("is taken; give each its own\n")
    print_message("error", "a " * 100_000)
    assert len(capsys.readouterr().err) < 2100


def test_a_message_is_printed_after_a_plugin_has_closed_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    previous = sys.stderr
    sys.stderr = open(os.dup(2), "w")  # noqa: SIM115 - closed at once
    sys.stderr.close()
    try:
        print_message("error", "it failed")
    finally:
        sys.stderr = previous
    assert capfd.readouterr().err == "phaselens: error: it failed\n"


def test_a_command_prints_its_results_past_what_plugins_print(capsys: pytest.CaptureFixture[str]) -> None:
    @only_results
    def command() -> None:
        assert isinstance(sys.stdout, MessageStream)
        print("from a plugin")
        sys.stdout.close()
        stream = results_stream()
        assert stream is not None
        stream.write("result")

    command()
    output = capsys.readouterr()
    assert (output.out, output.err) == ("result", "from a plugin\n")
    assert results_stream() is sys.stdout
