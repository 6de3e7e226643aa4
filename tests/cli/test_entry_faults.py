"""Faults of the machine and of the user: signals, limits, full and read-only disks, a missing home, odd terminals."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
CALL = "from phaselens_command import main; main()"
ROOT = Path(__file__).parents[2]
WATCH_WRITES = """
import os, sys

with open(os.environ["WRITES"], "a") as log:
    log.write("watching\\n")

def watch(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith({folder!r}):
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "__pycache__" not in args[0]:
            descriptor = os.open(os.environ["WRITES"], os.O_WRONLY | os.O_APPEND)
            os.write(descriptor, (args[0] + "\\n").encode())
            os.close(descriptor)

sys.addaudithook(watch)
"""


def start(
    *arguments: object,
    python: tuple[str, ...] = (),
    environment: Mapping[str, str | None] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start a command line; `environment` replaces variables, or removes them where it says None."""
    variables: dict[str, str | None] = {**os.environ, "PYTHONUNBUFFERED": None, **(environment or {})}
    return subprocess.Popen(
        [sys.executable, *python, "-c", CALL, *map(str, arguments)],
        text=True,
        env={name: value for name, value in variables.items() if value is not None},
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def ended(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a process."""
    out, errors = process.communicate(timeout=seconds)
    return process.returncode, out or "", errors or ""


def measurement(checkpoint: Path, texts: Path) -> list[object]:
    return ["run", checkpoint, "-p", "sinks", "--texts", texts, "--quiet"]


def in_shards(checkpoint: Path, texts: Path) -> list[object]:
    return [*measurement(checkpoint, texts), "--shard-tokens", "8", "--format", "json"]


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, texts: Path) -> dict[str, Any]:
    """The metrics of a run that nothing disturbs."""
    code, out, errors = ended(start(*in_shards(checkpoint, texts)))
    assert (code, errors) == (0, "")
    metrics: dict[str, Any] = json.loads(out)["metrics"]
    return metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_continues_after_a_signal_at_a_random_moment(
    checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: dict[str, Any], number: signal.Signals
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    command = in_shards(checkpoint, texts)
    process = start(*command, "--out", tmp_path / "run")
    time.sleep(moments.uniform(0, 8))
    process.send_signal(number)
    code, _, errors = ended(process)
    assert "Traceback" not in errors
    assert errors.count("\n") <= 3
    assert code in (0, 130, -number)
    code, out, errors = ended(start(*command, "--out", tmp_path / "run"))
    assert code == 0, errors
    assert json.loads(out)["metrics"] == undisturbed


def test_little_memory_is_one_line(checkpoint: Path, texts: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (400 << 20, 400 << 20))

    code, out, errors = ended(start(*measurement(checkpoint, texts), preexec_fn=limit))
    assert code != 0
    assert out == ""
    assert code < 0 or errors.strip()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--out", "File too large"),
        ("--report", "File too large"),
        ("--figures", "File too large"),
    ],
)
def test_a_disk_that_is_full_leaves_no_half_of_a_file(
    checkpoint: Path, texts: Path, tmp_path: Path, option: str, message: str
) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    target = tmp_path / "target.html"
    code, _, errors = ended(start(*measurement(checkpoint, texts), option, target, preexec_fn=limit))
    assert code == 2, errors
    assert message in errors
    assert (errors.count("\n"), "Traceback" in errors) == (1, False)
    files = [target] if target.is_file() else list(target.rglob("*.p*"))
    assert all(file.suffix not in (".png", ".html", ".partial") for file in files)


def test_a_folder_that_cannot_be_written_to_is_one_line(checkpoint: Path, texts: Path) -> None:
    for option, target in (("--out", "run"), ("--figures", "figures"), ("--report", "report.html")):
        command = start(*measurement(checkpoint, texts), option, Path("/proc/self/fdinfo") / target)
        code, _, errors = ended(command)
        assert code == 2, errors
        assert (errors.count("\n"), "Traceback" in errors, "unforeseen" in errors) == (1, False, False)


ENVIRONMENTS: dict[str, tuple[dict[str, str | None], tuple[str, ...]]] = {
    "no home": ({"HOME": None, "XDG_CACHE_HOME": None, "USER": None, "LOGNAME": None}, ()),
    "ASCII": ({"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ()),
    "a dumb terminal of 20 columns": ({"TERM": "dumb", "COLUMNS": "20", "LINES": "5"}, ()),
    "no assertions": ({}, ("-O",)),
}


def test_nothing_is_written_into_the_installation(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """Root may write to folders that are read-only, so the interpreter itself reports each file opened for writing."""
    site = tmp_path / "site"
    for source in ("src", "plugins"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, site, dirs_exist_ok=True, ignore=ignored)
    (site / "sitecustomize.py").write_text(WATCH_WRITES.format(folder=str(site)), encoding="utf-8")
    writes = tmp_path / "writes"
    environment = {"PYTHONPATH": str(site), "WRITES": str(writes)}
    out = tmp_path / "out"
    command = [*measurement(checkpoint, texts), "--out", out, "--figures", tmp_path / "figures"]
    for arguments in (command, ["report", out, tmp_path / "report.html"], ["plugins"]):
        code, _, errors = ended(start(*arguments, environment=environment))
        assert code == 0, errors
    reported = writes.read_text(encoding="utf-8").splitlines()
    assert "watching" in reported
    assert set(reported) == {"watching"}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_odd_environment_changes_no_number(
    checkpoint: Path, texts: Path, undisturbed: dict[str, Any], name: str
) -> None:
    environment, python = ENVIRONMENTS[name]
    command = in_shards(checkpoint, texts)
    code, out, errors = ended(start(*command, environment=environment, python=python))
    assert (code, errors) == (0, "")
    assert json.loads(out)["metrics"] == undisturbed
    code, out, errors = ended(start(*command[:-2], environment=environment, python=python))
    assert (code, errors) == (0, "")
    assert "sinks" in out


@pytest.mark.parametrize(
    ("streams", "code"), [(">&-", 0), ("2>&-", 0), ("<&-", 0), (">&- 2>&- <&-", 0), ("> /dev/full", 2)]
)
def test_closed_and_full_streams(checkpoint: Path, texts: Path, streams: str, code: int) -> None:
    words = [sys.executable, "-c", f"'{CALL}'", *map(str, measurement(checkpoint, texts))]
    process = subprocess.run(
        ["/bin/bash", "-c", f"{' '.join(words)} {streams}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.count("\n") == (1 if code else 0)


def test_a_working_directory_that_is_gone(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    command = "import os; os.rmdir(os.getcwd()); " + CALL
    process = subprocess.run(
        [sys.executable, "-c", command, *map(str, measurement(checkpoint, texts)), "--format", "json"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in process.stderr
    assert process.stderr.count("\n") <= 1
    assert process.returncode in (0, 2, 3), process.stderr
    assert not process.stdout or json.loads(process.stdout)


def test_two_runs_into_one_folder_give_one_whole_run(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    command = [*measurement(checkpoint, texts), "--format", "json", "--out", tmp_path / "run"]
    results = [ended(process) for process in [start(*command), start(*command)]]
    outputs = [out for code, out, _ in results if code == 0]
    assert outputs, results
    for code, out, errors in results:
        assert "Traceback" not in errors
        assert code == 0 or (code == 2 and not out and errors.count("\n") == 1), errors
    code, out, errors = ended(start(*command))
    assert code == 0, errors
    assert json.loads(out)["metrics"] == json.loads(outputs[0])["metrics"]


NAMES: list[Callable[[Path], bytes]] = [
    lambda folder: os.fsencode(folder) + b"/caf\xe9",
    lambda folder: os.fsencode(folder) + "/naïve 模型".encode(),
    lambda folder: os.fsencode(folder) + b"/line\nend",
]


@pytest.mark.parametrize("name", NAMES, ids=["latin-1", "utf-8", "line end"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_folder_with_any_name_works_or_is_one_line(
    checkpoint: Path, texts: Path, tmp_path: Path, name: Callable[[Path], bytes], locale: str
) -> None:
    folder = os.fsdecode(name(tmp_path))
    shutil.copytree(checkpoint, folder)
    environment = {"LC_ALL": locale, "PYTHONUTF8": None}
    for options in (["--format", "json"], []) if locale == "C" else (["--format", "csv"],):
        command = [*measurement(Path(folder), texts), *options]
        code, out, errors = ended(start(*command, environment=environment, errors="surrogateescape"))
        assert (code, errors) == (0, "") or (code in (2, 3) and errors.count("\n") == 1), errors
        assert "unforeseen" not in errors
        assert code != 0 or out
