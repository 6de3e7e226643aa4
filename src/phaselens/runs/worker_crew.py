"""Hands the units of a run out to workers, replaces workers that end, and tries each shard twice."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from phaselens.errors import PhaseLensError
from phaselens.runs.crew import N_TRIES, Crew, UnitJob, failed_twice
from phaselens.runs.observer import Observer
from phaselens.runs.shard_store import WorkUnit
from phaselens.runs.worker_job import Order
from phaselens.runs.workers import Report, Workers


class WorkerCrew(Crew):
    """Has units computed by workers. Models are loaded there alone.

    Args:
        make_workers: starts nothing yet, but makes the group of workers; called when the first one is needed.
        observer: receives the progress of all workers together.
    """

    makes_plans = True

    def __init__(self, make_workers: Callable[[], Workers], observer: Observer) -> None:
        super().__init__()
        self._make_workers = make_workers
        self._observer = observer
        self._workers: Workers | None = None
        self._idle: list[int] = []
        self._starting: set[int] = set()
        self._busy: dict[int, Order] = {}
        self._n_early_ends = 0
        self._advanced: dict[int, float] = defaultdict(float)

    def make_plan(self, phase: str, names: Sequence[str]) -> None:
        order = Order(self.number, phase, "", None, tuple(names), self._lost_units())
        failures = self._carry_out([order])
        if failures:
            raise PhaseLensError(
                f"{self.label}: the {phase} of {', '.join(names)} could not be prepared: {failures[order]}"
            )

    def compute(self, job: UnitJob) -> None:
        lost = self._lost_units()
        units: dict[Order, WorkUnit] = {
            Order(self.number, job.phase, unit.texts_of, unit.shard.index, tuple(job.names), lost): unit
            for unit in job.units
        }
        failures = self._carry_out(list(units), lambda order: job.exists(units[order]))
        for order, reason in failures.items():
            self.give_up([units[order]], reason)
        self.n_computed += len(units) - len(failures)

    def _lost_units(self) -> tuple[tuple[str, str, int], ...]:
        return tuple(sorted(self.lost))

    def _carry_out(
        self, orders: Sequence[Order], is_done: Callable[[Order], bool] = lambda order: False
    ) -> dict[Order, str]:
        """Have all orders carried out, and return why the others were not."""
        start = time.monotonic()
        try:
            return self._hand_out(orders, is_done)
        finally:
            self.seconds += time.monotonic() - start

    def _hand_out(self, orders: Sequence[Order], is_done: Callable[[Order], bool]) -> dict[Order, str]:
        if self._workers is None:
            self._workers = self._make_workers()
        waiting, failures = deque(orders), {}
        reasons: dict[Order, list[str]] = defaultdict(list)
        while waiting or self._busy:
            while waiting and self._idle:
                order = waiting.popleft()
                if not is_done(order):
                    worker = self._idle.pop(0)
                    self._busy[worker] = order
                    self._workers.send(worker, order)
            if not waiting and not self._busy:
                break
            self._grow(len(waiting))
            report = self._workers.wait()
            failed = self._take(report)
            if failed is not None:
                reasons[failed].append(report.text)
                if len(reasons[failed]) < N_TRIES:
                    waiting.append(failed)  # after the others, which may be computed meanwhile
                else:
                    failures[failed] = failed_twice(reasons[failed])
        return failures

    def _grow(self, n_waiting: int) -> None:
        """Start workers for orders that wait, up to the number of workers."""
        assert self._workers is not None
        n_present = len(self._busy) + len(self._idle) + len(self._starting)
        n_useful = len(self._busy) + n_waiting
        for _ in range(min(self._workers.n_workers, n_useful) - n_present):
            self._starting.add(self._workers.start())

    def _take(self, report: Report) -> Order | None:
        """Follow a report; return the order that failed by it."""
        worker = report.worker
        if report.kind == "ready":
            self._starting.discard(worker)
            self._idle.append(worker)
            self._n_early_ends = 0
        elif report.kind == "advanced":
            self._advanced[worker] += report.amount
            self._observer.advance(int(report.amount))
        elif report.kind == "done":
            del self._busy[worker]
            self._advanced.pop(worker, None)
            self._idle.append(worker)
        elif report.kind == "refused":
            raise report.exception()
        else:
            return self._lose(report)
        return None

    def _lose(self, report: Report) -> Order | None:
        """Forget a worker that failed or ended; return the order that it had."""
        worker = report.worker
        order = self._busy.pop(worker, None)
        if order is not None:
            self._observer.advance(-int(self._advanced.pop(worker, 0)))  # it will be read again
        if worker in self._idle:
            self._idle.remove(worker)
        if worker in self._starting:
            self._starting.discard(worker)
            self._n_early_ends += 1
            if self._n_early_ends > N_TRIES and not self._busy and not self._idle:
                raise PhaseLensError(f"no worker can start: {report.text}")
        return order

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
