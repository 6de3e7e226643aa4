"""A warm process that runs each command line in a forked child, with limits and a record of what it touches.

`python -m tests.fuzz.case_process` reads one JSON object per line on stdin, {"arguments", "folder", "logs", "seconds"},
and answers each with one line, {"code", "seconds"}. The folder `logs` then holds the child's stdout and stderr, and
`events`: one JSON list per file that it opened or changed, process that it started, and socket that it used.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

#: Bytes of address space that a case may take on top of what the warm process has.
MEMORY = 3 << 30
_MODULES = (
    "transformers", "transformer_lens", "pyarrow.parquet", "scipy.stats", "matplotlib.pyplot", "rich.console",
    "phaselens.cli.app",
    "phaselens.cli.entry", "phaselens.lens.loading", "phaselens.report.formats", "phaselens.runs",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit events of Python that change the file system, and the places of the paths among their arguments.
_CHANGES = {
    "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1,
}  # fmt: skip
_PROCESSES = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
)
_SOCKETS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


class EventRecorder:
    """An audit hook that writes each event about files, sockets and processes as a line of JSON to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike):
                self._record("write" if (flags or 0) & _WRITES else "read", path)
        elif event in _CHANGES:
            for path in arguments[: _CHANGES[event]]:
                if isinstance(path, str | bytes | os.PathLike):
                    folder = None if event == "os.truncate" else arguments[-1]
                    self._record("write", _in_folder(path, folder))
        elif event in _PROCESSES:
            self._record("process", repr(arguments[:2]))
        elif event in _SOCKETS:
            self._record("socket", repr(arguments[1:]))

    def _record(self, kind: str, subject: str | bytes | os.PathLike[Any]) -> None:
        text = os.fsdecode(subject) if kind in ("read", "write") else str(subject)
        os.write(self._descriptor, json.dumps([kind, text[:4096]]).encode() + b"\n")


def _in_folder(path: str | bytes | os.PathLike[Any], descriptor: object) -> str:
    """Return the path of a change, whose last argument is the folder that it is relative to, as a descriptor, or -1."""
    if isinstance(descriptor, int) and descriptor >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(path))
    return os.fsdecode(path)


def serve() -> None:
    """Answer requests on stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up()
    answers.write('{"ready": true}\n')
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _warm_up() -> None:
    """Import what most commands need, so that it is imported once."""
    import torch

    torch.set_num_threads(1)
    for name in _MODULES:
        importlib.import_module(name)
    from phaselens.plugin import plugins
    from phaselens.testing import tiny_lens

    tiny_lens("llama")
    plugins()
    sys.dont_write_bytecode = True


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request in a child, and return its exit code (negative: the signal that ended it)."""
    logs = Path(request["logs"])
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_case(request, logs)
    watch = os.pidfd_open(child)
    finished, _, _ = select.select([watch], [], [], request["seconds"])
    if not finished:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(watch)
    return {
        "code": os.waitstatus_to_exitcode(status) if finished else None,
        "seconds": round(time.monotonic() - start, 3),
    }


def _become_case(request: dict[str, Any], logs: Path) -> None:
    """Turn the forked process into the command of a case; never returns."""
    code = 70
    try:
        for descriptor, name, flags in (
            (1, "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            opened = os.open(logs / name, flags, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        events = os.open(logs / "events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.chdir(request["folder"])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from phaselens.cli import main

        sys.addaudithook(EventRecorder(events))
        try:
            main(request["arguments"])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - shown as the traceback that no case may have
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
