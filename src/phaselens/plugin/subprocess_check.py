"""Check whether plugins can be loaded, each in its own process: one that hangs, exits or prints affects no other."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from phaselens.plugin.author_errors import describe_error
from phaselens.plugin.plugin_loading import LoadedPlugin
from phaselens.plugin.registry import RegisteredPlugin

#: Seconds that importing a plugin may take before it counts as failed.
TIMEOUT = 20.0

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from phaselens.plugin.subprocess_check import report_facts; report_facts(sys.argv[2], sys.argv[3])"
)


def check_in_subprocesses(plugins: Iterable[RegisteredPlugin]) -> list[RegisteredPlugin]:
    """Import all plugins at once, and return each with what it offers, or as failed with the reason."""
    deadline = time.monotonic() + TIMEOUT
    processes = [(plugin, _start(plugin)) for plugin in plugins]
    try:
        return [_result(plugin, process, deadline) for plugin, process in processes]
    finally:
        for _, process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def _start(plugin: RegisteredPlugin) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), plugin.name, plugin.module]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _result(plugin: RegisteredPlugin, process: subprocess.Popen[str], deadline: float) -> RegisteredPlugin:
    # Past the deadline `communicate` would also time out for a process that has ended.
    timeout = TIMEOUT if process.poll() is not None else max(0.0, deadline - time.monotonic())
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return plugin.with_status("failed", f"importing it took more than {TIMEOUT:g} s")
    if not output:
        return plugin.with_status("failed", f"importing it ended the process with code {process.returncode}")
    report = json.loads(output)
    if "error" in report:
        return plugin.with_status("failed", report["error"])
    return replace(plugin, **{**report, "offers": tuple(report["offers"])})


def report_facts(name: str, module: str) -> None:
    """Run in the child process: import the plugin, and write one JSON object to the original stdout."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        report: dict[str, str | Sequence[str]] = LoadedPlugin.by_name(module).facts(name)
    except BaseException as error:  # noqa: BLE001 - reported to the parent process
        report = {"error": describe_error(error)}
    with contextlib.suppress(OSError), os.fdopen(stdout, "w") as pipe:
        pipe.write(json.dumps(report))
    os._exit(0)  # does not wait for threads that the plugin left behind
