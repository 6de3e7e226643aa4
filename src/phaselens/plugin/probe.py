"""Looks whether plugins can be loaded, each in a process of its own: one that hangs, exits or prints hurts nobody."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from phaselens.plugin.loading import Loaded, told
from phaselens.plugin.registry import Registered

#: Seconds that importing a plugin may take before it counts as failed.
PATIENCE = 20.0

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from phaselens.plugin.probe import report; report(sys.argv[2], sys.argv[3])"
)


class Probes:
    """Processes that were started at once, one for each plugin, and are asked later."""

    def __init__(self, plugins: Iterable[Registered]) -> None:
        self._deadline = time.monotonic() + PATIENCE
        self._running = [(one, _start(one)) for one in plugins]

    def results(self) -> list[Registered]:
        """Each plugin with what was found. Waits for those that still run, until their time is over."""
        return [_finish(one, process, self._deadline) for one, process in self._running]

    def failures(self, wait: float = 1.0) -> list[Registered]:
        """Those that are known to have failed, after `wait` seconds more at most."""
        deadline = time.monotonic() + wait
        failed = []
        for one, process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
                found = _finish(one, process, deadline)
                failed += [found] if found.status == "failed" else []
        return failed

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *exception: object) -> None:
        for _, process in self._running:
            if process.poll() is None:
                process.kill()
            process.communicate()


def _start(one: Registered) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), one.name, one.module]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _finish(one: Registered, process: subprocess.Popen[str], deadline: float) -> Registered:
    try:
        out, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return one.without("failed", f"importing it took more than {PATIENCE:g} s")
    if not out:
        return one.without("failed", f"importing it ended the process with code {process.returncode}")
    found = json.loads(out)
    return (
        one.without("failed", found["error"])
        if "error" in found
        else replace(one, offers=tuple(found["offers"]))
    )


def report(name: str, module: str) -> None:
    """In the process of its own: import the plugin, and write one JSON object to what was stdout."""
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        found: dict[str, str | Sequence[str]] = {"offers": Loaded.by_name(module).offers(name)}
    except BaseException as error:  # noqa: BLE001 - told to whoever started this process
        found = {"error": told(error)}
    with contextlib.suppress(OSError), os.fdopen(out, "w") as pipe:
        pipe.write(json.dumps(found))
    os._exit(0)  # threads that the plugin left behind are not waited for
