"""Cases: a command line on inputs of its own, what came of it, and what must hold whatever the inputs are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
EXIT_CODES = (0, 1, 2, 3, 130)
_MOST_LINES = 3
#: Folders that Python, its packages and the system themselves are read from.
_OWN_FOLDERS = tuple(
    os.path.realpath(folder)
    for folder in {
        sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *filter(None, sys.path), str(ROOT / "src"),
        str(ROOT / "plugins"), str(Path(torch.__file__).parents[1]), "/proc", "/sys", "/etc", "/usr", "/lib",
        "/dev/null", "/dev/urandom",
    }
    if os.path.realpath(folder) != str(ROOT)
)  # fmt: skip


@dataclass(frozen=True)
class CaseFolders:
    """The folders of one case: `inputs`, where the command runs; `outputs` in it; and `logs`."""

    root: Path

    @property
    def inputs(self) -> Path:
        """Where the inputs lie, and the command runs."""
        return self.root / "in"

    @property
    def outputs(self) -> Path:
        """Where the command may write."""
        return self.inputs / "out"

    @property
    def logs(self) -> Path:
        """Where the process records what the command did."""
        return self.root / "logs"

    @property
    def secret(self) -> Path:
        """A file outside of the inputs, which no case may read."""
        return self.root / "secret.safetensors"

    def clear(self) -> None:
        """Make all folders anew."""
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in (self.inputs, self.logs):
            folder.mkdir(parents=True)
        self.secret.write_bytes(b"secret")


@dataclass(frozen=True)
class CaseOutcome:
    """What a command did: its exit code (None: it ran past its time), its output, and the events of its process."""

    arguments: list[str]
    code: int | None
    seconds: float
    stdout: str
    stderr: str
    events: list[tuple[str, str]] = field(repr=False)

    def problems(self, folders: CaseFolders) -> list[str]:
        """Return what must not be, in words; nothing for a case that ended as it should."""
        problems = [] if self.code in EXIT_CODES else [f"exit code {self.code} after {self.seconds} s"]
        lines = [line for line in self.stderr.splitlines() if line.strip() and line != "JUNK"]
        if len(lines) > _MOST_LINES:
            problems.append(f"{len(lines)} lines on stderr")
        problems += [f"{word!r} on stderr" for word in ("Traceback", "unforeseen") if word in self.stderr]
        if "json" in self.arguments:
            problems += self._problems_of_json()
        for kind, subject in self.events:
            if kind in ("process", "socket"):
                problems.append(f"{kind}: {subject}")
            elif not _is_allowed(kind, subject, folders):
                problems.append(f"{kind} of {subject}")
        return problems

    def _problems_of_json(self) -> list[str]:
        if not self.stdout and self.code not in (0, 1):
            return []
        try:
            json.loads(self.stdout, parse_constant=_refuse_constant)
        except ValueError as error:
            # Without results, code 1 has one line on stderr alone.
            return [] if self.code == 1 and not self.stdout else [f"stdout is not JSON: {error}"]
        return []


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_allowed(kind: str, subject: str, folders: CaseFolders) -> bool:
    path = os.path.realpath(
        folders.inputs / os.fsencode(subject).decode("utf-8", "replace").replace("\0", "")
    )
    if kind == "write":
        parents = (str(folders.inputs), str(folders.root), *map(str, folders.root.parents))
        return path == os.devnull or path in parents or _is_within(path, str(folders.outputs))
    return _is_within(path, str(folders.inputs)) or any(_is_within(path, own) for own in _OWN_FOLDERS)


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


class CaseRunner:
    """The warm process, which runs one case after the other."""

    def __init__(self, folders: CaseFolders, seconds: float = 30.0) -> None:
        self.folders = folders
        self._seconds = seconds
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(ROOT)])),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(folders.outputs),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.case_process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def run(self, *arguments: str) -> CaseOutcome:
        """Run a command line in the folder of the inputs."""
        process, folders = self._process, self.folders
        assert process.stdin is not None
        assert process.stdout is not None
        request = {
            "arguments": list(arguments), "folder": str(folders.inputs), "logs": str(folders.logs),
            "seconds": self._seconds,
        }  # fmt: skip
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        events = (folders.logs / "events").read_text().splitlines()
        stdout, stderr = ((folders.logs / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return CaseOutcome(
            list(arguments),
            answer["code"],
            answer["seconds"],
            stdout,
            stderr,
            [(kind, subject) for kind, subject in map(json.loads, events)],
        )

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
