"""Runs on a tiny checkpoint for the tests of workers and parts, and workers that live in this process."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phaselens.data import Text
from phaselens.runs import Observer, Run
from phaselens.runs.shard_worker import ShardFailed, ShardWorker
from phaselens.runs.worker_job import Order, WorkerJob
from phaselens.runs.workers import Report, Workers
from tests.runs.metrics import Probe
from tests.toys import letters

TEXTS = [
    Text(str(index), letters(length, length), ("even", "odd")[length % 2])
    for index, length in enumerate((3, 17, 1, 8, 8, 30, 5, 12))
]
OPTIONS: dict[str, Any] = {
    "metrics": {"sinks": {}, "bos-mlp": {}, "qk-disruption": {"multiple": 1.2, "seeds": 1}},
    "texts": TEXTS,
    "shard_tokens": 20,
}


class SlowProbe(Probe):
    """A metric that takes its time, so that something can happen meanwhile."""

    name = "slow"

    def update(self, layer: Any) -> None:
        time.sleep(0.3)


class Deadly(Probe):
    """A metric that ends its process at one of the texts, as a crash in a library would."""

    name = "deadly"

    def update(self, layer: Any) -> None:
        if "5" in layer.batch.texts:
            print("this text is deadly", file=sys.stderr, flush=True)
            os._exit(7)


class WorkersInside(Workers):
    """Workers in this process: an order is carried out when it is sent.

    Args:
        job: the run.
        n_workers: how many at most.
        fails: returns `ended` or `failed` for an order that is to end so, and how often it was tried before.
    """

    def __init__(
        self, job: WorkerJob, n_workers: int, fails: Callable[[Order, int], str] = lambda order, n: ""
    ) -> None:
        self.n_workers = n_workers
        self.job = WorkerJob.from_json(job.as_json())
        self.fails = fails
        self.started: list[ShardWorker] = []
        self.orders: list[tuple[int, Order]] = []
        self.reports: deque[Report] = deque()

    def start(self) -> int:
        self.started.append(ShardWorker(self.job, Observer()))
        self.reports.append(Report(len(self.started) - 1, "ready"))
        return len(self.started) - 1

    def send(self, worker: int, order: Order) -> None:
        n_before = sum(sent[:4] == order[:4] for _, sent in self.orders)
        self.orders.append((worker, order))
        outcome = self.fails(order, n_before)
        if outcome:
            self.reports.append(Report(worker, outcome, text=f"it {outcome} on purpose"))  # type: ignore[arg-type]
            return
        try:
            seconds = self.started[worker].execute(order)
        except ShardFailed as error:
            self.reports.append(Report(worker, "failed", text=str(error)))
        else:
            self.reports.append(Report(worker, "done", seconds))

    def wait(self) -> Report:
        return self.reports.popleft()

    def close(self) -> None:
        self.n_workers = 0


def require_same_results(run: Run, expected: Run) -> None:
    """Compare everything that a run prints, to the bit."""
    assert run.to_dict() == expected.to_dict()


def tables_of(folder: Path) -> dict[str, bytes]:
    """The content of the table files of a run."""
    return {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}
