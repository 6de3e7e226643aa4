"""What only a process of its own can show: what it imports, how long it takes, how it ends."""

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

from phaselens.cli.outcome import insistent_interrupt, patient_interrupt
from tests.lens.test_frequencies import N_CTX, ROPE_TYPES
from tests.toys import letters, save_checkpoint

HEAVY = ("torch", "transformers", "transformer_lens", "numpy", "pyarrow", "matplotlib", "scipy")


def start(*arguments: object, **options: int) -> "subprocess.Popen[str]":
    call = "from phaselens.cli import main; main()"
    command = [sys.executable, "-c", call, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=options.get("stdout", subprocess.PIPE), stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins"], ["--version"], ["run", "-p", "sinks", "--help"]]
)
def test_what_is_asked_often_imports_nothing_heavy(arguments: list[str]) -> None:
    look = (
        "import sys; from phaselens.cli.outcome import run_to_exit_code as run; "
        f"code = run({arguments!r}); print(code, sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    ).replace(repr(HEAVY), f"set({HEAVY!r})")
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"
    assert done.stdout


def test_a_reader_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("plugins", stdout=writing)
    os.close(writing)
    _, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (0, "")


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        process = start("plugins", stdout=full.fileno())
        _, complaints = process.communicate(timeout=60)
    assert complaints == "phaselens: error: No space left on device: standard output\n"
    assert process.returncode == 2


@pytest.mark.slow
def test_json_of_a_real_process_stands_alone_on_stdout(checkpoint: Path, texts: Path) -> None:
    process = start("run", checkpoint, "-p", "sinks", "--texts", texts, "--format", "json")
    out, complaints = process.communicate(timeout=300)
    assert complaints == ""
    assert process.returncode == 0
    assert json.loads(out)["schema"] == "phaselens.run/1"


@pytest.mark.slow
def test_a_text_has_the_rows_of_a_process_of_its_own(tmp_path: Path) -> None:
    """Dynamic rotation, texts below, above and at the trained length of 32, in two orders and batch by batch."""
    parameters = {"rope_theta": 1e4} | ROPE_TYPES["dynamic"]
    folder = save_checkpoint(
        tmp_path / "dynamic", dtype=torch.float64, max_position_embeddings=N_CTX, rope_parameters=parameters
    )

    def rows(lengths: Sequence[int], *options: object) -> dict[int, list[list[Any]]]:
        """Rows of the tables that have texts, without the text's name, by the text's tokens."""
        texts = tmp_path / "texts.txt"
        texts.write_text("\n".join(letters(n_tokens - 1, n_tokens) for n_tokens in lengths))
        process = start("run", folder, "-p", "sinks", "--texts", texts, "--format", "json", *options)
        out, complaints = process.communicate(timeout=300)
        assert process.returncode == 0, complaints
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
    # Of the longest text nothing stands beside or before it in that process.
    alone = {64: backwards[64]} | {n_tokens: rows([n_tokens])[n_tokens] for n_tokens in (20, 32)}
    for together in (backwards, rows(lengths)):
        assert together.keys() == alone.keys()
        for n_tokens, expected in alone.items():
            assert len(together[n_tokens]) == len(expected) > 0
            for row, own in zip(together[n_tokens], expected, strict=True):
                assert row == [
                    pytest.approx(cell, rel=1e-6) if isinstance(cell, float) else cell for cell in own
                ]


@pytest.mark.slow
def test_ctrl_c_ends_a_run_at_once_with_code_130(checkpoint: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.txt"
    many.write_text("a b c d e f\n" * 200_000)
    process = start("run", checkpoint, "-p", "sinks", "--texts", many, "--batch-tokens", 8)
    time.sleep(15)
    process.send_signal(signal.SIGINT)
    out, complaints = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert complaints == "phaselens: error: interrupted\n"


def test_an_interrupt_that_a_finaliser_swallows_is_repeated() -> None:
    deaf = """
import os, signal, time
from phaselens.cli.outcome import insistent_interrupt

class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

try:
    with insistent_interrupt():
        Deaf()
        print("swallowed", flush=True)
        time.sleep(50)
except KeyboardInterrupt:
    print("heard", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", deaf], capture_output=True, text=True, check=True, timeout=40
    )
    assert (done.stdout, done.stderr) == ("swallowed\nheard\n", "")


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


def test_what_is_being_printed_is_printed_whole() -> None:
    """Also without a buffer, where a signal in the middle of a write loses what is left of it."""
    printing = """
from phaselens.cli.outcome import patient_interrupt
try:
    with patient_interrupt():
        print("x" * 1_000_000)
        print("whole")
except KeyboardInterrupt:
    print("interrupted")
"""
    command = [sys.executable, "-u", "-c", printing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"  # it is writing, and will fill the pipe
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        out, complaints = process.communicate(timeout=60)
    assert complaints == b""
    assert out == b"x" * 999_999 + b"\nwhole\ninterrupted\n"


def test_without_ctrl_c_nothing_is_raised_after_printing() -> None:
    before = signal.getsignal(signal.SIGINT)
    with patient_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def answered_by_an_error() -> None:
    try:
        ctrl_c()
    except KeyboardInterrupt:
        raise ImportError("cannot load module more than once per process") from None


def test_an_error_by_which_a_library_answers_an_interrupt_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), insistent_interrupt():
        answered_by_an_error()
    with pytest.raises(ImportError), insistent_interrupt():
        raise ImportError("its own")
