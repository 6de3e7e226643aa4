"""What only a process of its own can show: what it imports, how long it takes, how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
