"""Properties that need a separate process: its imports, its duration and its end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lens.test_frequencies import N_CTX, ROPE_TYPES
from tests.toys import letters, save_checkpoint

HEAVY = (
    "torch", "transformers", "transformer_lens", "numpy", "pyarrow", "matplotlib", "scipy", "rich", "phaselens.runs",
)  # fmt: skip


def start(*arguments: object, **options: int) -> "subprocess.Popen[str]":
    call = "from phaselens.cli import main; main()"
    command = [sys.executable, "-c", call, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=options.get("stdout", subprocess.PIPE), stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins"], ["--version"], ["run", "-p", "sinks", "--help"]]
)
def test_frequent_commands_import_nothing_heavy(arguments: list[str]) -> None:
    look = (
        "import sys; from phaselens.cli.entry import run_to_exit_code as run; "
        f"code = run({arguments!r}); print(code, sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    ).replace(repr(HEAVY), f"set({HEAVY!r})")
    process = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert process.stderr == "0 []\n"
    assert process.stdout


@pytest.mark.slow
def test_a_closed_reader_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reading, writing = os.pipe()
    os.close(reading)
    process = start("plugins", stdout=writing)
    os.close(writing)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.slow
def test_a_full_disk_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with Path("/dev/full").open("w") as full_disk:
        process = start("plugins", stdout=full_disk.fileno())
        _, errors = process.communicate(timeout=60)
    assert errors == (
        "phaselens: error: No space left on device: standard output; free some space, or name another place\n"
    )
    assert process.returncode == 2


@pytest.mark.slow
def test_json_is_alone_on_the_stdout_of_a_process(checkpoint: Path, texts: Path) -> None:
    process = start("run", checkpoint, "-p", "sinks", "--texts", texts, "--format", "json")
    out, errors = process.communicate(timeout=300)
    assert errors == ""
    assert process.returncode == 0
    assert json.loads(out)["schema"] == "phaselens.run/1"


@pytest.mark.slow
def test_a_text_has_the_same_rows_as_in_a_separate_process(tmp_path: Path) -> None:
    """Use dynamic rotation, and texts below, above and at the trained length of 32, in two orders and batchings."""
    parameters = {"rope_theta": 1e4} | ROPE_TYPES["dynamic"]
    folder = save_checkpoint(
        tmp_path / "dynamic", dtype=torch.float64, max_position_embeddings=N_CTX, rope_parameters=parameters
    )

    def rows(lengths: Sequence[int], *options: object) -> dict[int, list[list[Any]]]:
        """Return the rows of tables by text, without the text's name, by the text's tokens."""
        texts = tmp_path / "texts.txt"
        texts.write_text("\n".join(letters(n_tokens - 1, n_tokens) for n_tokens in lengths))
        process = start("run", folder, "-p", "sinks", "--texts", texts, "--format", "json", *options)
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        run = json.loads(out)
        n_tokens = {text["id"]: text["n_tokens"] for text in run["texts"]}
        by_text: dict[int, list[list[Any]]] = {}
        for name in ("texts", "strongest"):
            table = run["metrics"]["sinks"]["tables"][name]
            assert [column["name"] for column in table["columns"]][:2] == ["model", "text"]
            for row in table["rows"]:
                by_text.setdefault(n_tokens[row[1]], []).append([name, *row[2:]])
        return by_text

    lengths = (20, 64, 32)
    backwards = rows(lengths[::-1], "--batch-tokens", 1)
    # In that process, no text is beside or before the longest one.
    single_text_rows = {64: backwards[64]} | {n_tokens: rows([n_tokens])[n_tokens] for n_tokens in (20, 32)}
    for batch_rows in (backwards, rows(lengths)):
        assert batch_rows.keys() == single_text_rows.keys()
        for n_tokens, expected in single_text_rows.items():
            assert len(batch_rows[n_tokens]) == len(expected) > 0
            for row, expected_row in zip(batch_rows[n_tokens], expected, strict=True):
                assert row == [
                    pytest.approx(cell, rel=1e-6) if isinstance(cell, float) else cell
                    for cell in expected_row
                ]


@pytest.mark.slow
def test_ctrl_c_ends_a_run_at_once_with_code_130(checkpoint: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.txt"
    many.write_text("a b c d e f\n" * 200_000)
    process = start("run", checkpoint, "-p", "sinks", "--texts", many, "--batch-tokens", 8, "--quiet")
    time.sleep(15)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert errors == "phaselens: error: interrupted\n"


@pytest.mark.slow
def test_ctrl_c_during_the_imports_shows_no_traceback() -> None:
    """Interrupts in the first tenth of a second, after Python itself has started."""
    call = "print('begun', flush=True); from phaselens_command import main; main()"
    for milliseconds in range(0, 100, 10):
        process = subprocess.Popen(
            [sys.executable, "-c", call, "plugins"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.002 + milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        assert process.returncode in (-signal.SIGINT, 130, 0)


@pytest.mark.slow
def test_a_session_without_an_output_is_an_error_of_one_line() -> None:
    call = "import sys; sys.stdout = None; from phaselens.cli import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", call, "repl"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert process.stderr.startswith("phaselens: error: stdout is closed, and a session needs it")
    assert (process.stderr.count("\n"), process.returncode) == (1, 2)
