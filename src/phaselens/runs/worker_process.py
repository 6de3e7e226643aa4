"""The main function of a worker on this machine: orders on stdin, reports on stdout, one line of JSON each."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO

from phaselens.errors import PhaseLensError
from phaselens.runs.observer import Observer
from phaselens.runs.shard_worker import ShardFailed, ShardWorker
from phaselens.runs.threads import fixed_threads
from phaselens.runs.worker_job import Order, WorkerJob


class LineObserver(Observer):
    """Reports the tokens that were read, a line each."""

    def __init__(self, reports: TextIO) -> None:
        self._reports = reports

    def advance(self, n_tokens: int) -> None:
        report(self._reports, "advanced", amount=n_tokens)


def report(reports: TextIO, kind: str, **values: Any) -> None:
    """Write a report as a line of JSON."""
    reports.write(json.dumps({"kind": kind, **values}) + "\n")
    reports.flush()


def main() -> None:
    """Read the job, then carry out orders until stdin ends, which also ends the process in the middle of one."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes of a terminal; the first one decides
    # Whatever a library or a metric prints goes to stderr.
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    start = time.monotonic()
    settings = json.loads(sys.stdin.readline())
    use_cpus(settings["cpus"])
    orders = lines_of_stdin()
    try:
        job = WorkerJob.from_json(orders.get())
        with fixed_threads(job.options.threads or 1):
            worker = ShardWorker(job, LineObserver(reports))
            report(reports, "ready", amount=time.monotonic() - start)
            while True:
                seconds = worker.execute(Order.from_list(json.loads(orders.get())))
                report(reports, "done", amount=seconds)
    except ShardFailed as error:
        report(reports, "failed", text=str(error))
    except PhaseLensError as error:
        report(reports, "refused", text=str(error), error=type(error).__name__)
    os._exit(1)


def lines_of_stdin() -> queue.SimpleQueue[str]:
    """Return a queue of the lines of stdin, filled by a thread; the end of stdin ends the process."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # files appear complete or not at all, so that nothing is left half written

    threading.Thread(target=read, daemon=True).start()
    return lines


def use_cpus(cpus: Sequence[int]) -> None:
    """Run on these cores only, where the system can; none are all."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


if __name__ == "__main__":
    main()
