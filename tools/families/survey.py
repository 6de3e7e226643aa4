"""Trials of many model types, each in a child process with limits on memory and time."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.families.trial import Trial

_SECONDS = 60
_MEMORY = 3 << 30
"""Bytes of address space that a trial may use beyond those of its imports."""
# Audit events of compilers and other programs that start, and of connections to other machines.
_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
    "socket.getaddrinfo",
)


@dataclass
class _Child:
    model_type: str
    process: ForkServerProcess
    results: Connection
    deadline: float


def survey(model_types: Iterable[str], *, n_processes: int = 1, **options: Any) -> Iterator[Trial]:
    """Try each model type, and yield the results in the order in which they finish.

    Args:
        n_processes: the number of trials that run at the same time.
        options: more arguments of `try_model_type`.
    """
    context = multiprocessing.get_context("forkserver")
    # Every trial forks from a process that has imported the libraries, and has run nothing.
    context.set_forkserver_preload(["tools.families.trial"])
    waiting = list(model_types)[::-1]
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and len(running) < n_processes:
                running.append(_start(context, waiting.pop(), options))
            timeout = max(0.0, min(child.deadline for child in running) - time.monotonic())
            wait([child.results for child in running], timeout)
            for child in list(running):
                if child.results.poll() or time.monotonic() > child.deadline:
                    running.remove(child)
                    yield _result(child)
    finally:
        for child in running:
            child.process.kill()


def _start(context: ForkServerContext, model_type: str, options: dict[str, Any]) -> _Child:
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_with_limits, args=(sender, model_type, options))
    process.start()
    sender.close()
    return _Child(model_type, process, results, time.monotonic() + _SECONDS)


def _result(child: _Child) -> Trial:
    """Return the trial of a child that has finished, died, or run out of time."""
    from tools.families.configs import class_name_of
    from tools.families.trial import Trial

    problem = f"no result within {_SECONDS} s"
    try:
        if child.results.poll():
            trial: Trial = child.results.recv()
            return trial
    except EOFError:
        child.process.join(5)
        problem = f"the process ended with exit code {child.process.exitcode}"
    finally:
        child.process.kill()
        child.process.join()
        child.results.close()
    return Trial(child.model_type, class_name_of(child.model_type), problems={"float32": problem})


def _try_with_limits(sender: Connection, model_type: str, options: dict[str, Any]) -> None:
    """Try a model type in this process, which was made for it, and send the result."""
    import warnings

    import torch
    from tools.families.trial import try_model_type
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    sys.addaudithook(_refuse_other_programs)
    sender.send(try_model_type(model_type, **options))


def _refuse_other_programs(event: str, arguments: tuple[object, ...]) -> None:
    """Raise RuntimeError if a model starts a program or opens a connection; an audit hook."""
    if event in _FORBIDDEN:
        raise RuntimeError(f"{event} {arguments}: a model must not start a program or open a connection")
