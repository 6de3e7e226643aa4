"""Workers on this machine: one process per group of cores, or per GPU."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import IO, Any

from phaselens.runs.worker_job import Order, WorkerJob
from phaselens.runs.workers import WAITING_THREADS, Report, Workers

_SECONDS_TO_END = 5.0


class LocalWorkers(Workers):
    """Processes on this machine that share the files of models in memory, since these are mapped, not copied.

    Args:
        job: the run.
        n_workers: how many processes at most.
    """

    def __init__(self, job: WorkerJob, n_workers: int) -> None:
        self.n_workers = n_workers
        self._job = job.as_json()
        self._device = job.options.device
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._messages: dict[int, IO[bytes]] = {}
        self._readers: dict[int, threading.Thread] = {}
        #: Which group of cores or GPU each worker has.
        self._slots: dict[int, int] = {}
        self._n_started = 0

    def start(self) -> int:
        worker = self._n_started
        self._n_started += 1
        slot = min(set(range(self.n_workers)) - set(self._slots.values()), default=0)
        self._slots[worker] = slot
        messages = self._messages[worker] = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the worker has ended
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "phaselens.runs.worker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            encoding="utf-8",
            env=environment(slot, self._device),
        )
        self._processes[worker] = process
        self._readers[worker] = threading.Thread(target=self._read, args=(worker, process), daemon=True)
        self._readers[worker].start()
        self._write(worker, json.dumps({"cpus": group_of_cores(slot, self.n_workers)}))
        self._write(worker, self._job)
        return worker

    def send(self, worker: int, order: Order) -> None:
        self._write(worker, json.dumps(order))

    def _write(self, worker: int, line: str) -> None:
        stdin = self._processes[worker].stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is reported by `_read`
            stdin.write(line + "\n")
            stdin.flush()

    def wait(self) -> Report:
        report = self._reports.get()
        if report.kind in ("failed", "ended"):
            self._slots.pop(report.worker, None)
        return report

    def _read(self, worker: int, process: subprocess.Popen[str]) -> None:
        """Put the reports of one worker into the queue, and at last that it has ended."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # a line that was cut off when the process was killed
                    values = json.loads(line)
                    self._reports.put(Report(worker, **values))
        code = process.wait()
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._reports.put(
            Report(worker, "ended", text=f"the worker ended by {cause}{self._last_line(worker)}")
        )

    def _last_line(self, worker: int) -> str:
        """Return the last line that a worker has printed, for messages."""
        with contextlib.suppress(ValueError, OSError), self._messages[worker] as messages:
            messages.seek(0)
            lines = messages.read()[-4000:].decode(errors="replace").strip().splitlines()
            return f": {lines[-1][:200]}" if lines else ""
        return ""

    def close(self) -> None:
        for process in self._processes.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers.values():
            reader.join()


def group_of_cores(slot: int, n_groups: int) -> list[int]:
    """Return the cores of one of `n_groups` groups; none where there are fewer cores than groups, or no such choice."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    size, n_larger = divmod(len(cores), n_groups)
    if size == 0:
        return []
    start = slot * size + min(slot, n_larger)
    return cores[start : start + size + (slot < n_larger)]


def environment(slot: int, device: str, outer: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a worker: the modules of this process, and one GPU if the run uses any of them."""
    values: dict[str, Any] = {**WAITING_THREADS, **outer, "PYTHONPATH": os.pathsep.join(sys.path)}
    if device in ("auto", "cuda"):
        import torch

        visible = outer.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(index) for index in range(torch.cuda.device_count())]
        if gpus and visible:
            gpus = visible.split(",")
        if gpus:
            values["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return values
