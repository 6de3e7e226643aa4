"""A worker: loads a model when an order needs it, and computes one shard after the other into the run's directory."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from phaselens.errors import InputError, PhaseLensError
from phaselens.plugin import CausalMetric
from phaselens.plugin.author_errors import describe_error
from phaselens.runs.batches import BatchTooLarge
from phaselens.runs.crew import Crew, UnitName
from phaselens.runs.directory_store import DirectoryStore
from phaselens.runs.observer import Observer
from phaselens.runs.prepared_tasks import PreparedAtNeed
from phaselens.runs.resumable import ResumableRun
from phaselens.runs.run_directory import RunDirectory, slug
from phaselens.runs.shard_store import OBSERVATIONS
from phaselens.runs.shard_work import ShardWork
from phaselens.runs.worker_job import Order, WorkerJob


class ShardFailed(Exception):  # noqa: N818 - named after what happened to the shard
    """A shard could not be computed; the worker must be replaced, because its model may be in any state."""


class ModelWork:
    """The work on one model, with the phases that were prepared for it."""

    def __init__(self, work: ShardWork, store: DirectoryStore, crew: Crew) -> None:
        self.work = work
        self.store = store
        self.crew = crew
        self.phases: dict[tuple[str, frozenset[UnitName]], PreparedAtNeed] = {}


class ShardWorker:
    """Computes the units of a run that it is told to.

    Args:
        job: the run.
        observer: receives the progress.
    """

    def __init__(self, job: WorkerJob, observer: Observer) -> None:
        self._job = job
        self._observer = observer
        self._sessions = job.sessions(observer)
        self._directory = directory = RunDirectory(job.out)
        if not directory.has_record:
            raise InputError(
                f"this worker does not see the directory {job.out!r} of the run; put --out on a file system that all "
                "machines share"
            )
        self._run = ResumableRun(directory, self._sessions, job.metrics, job.options, job.texts)
        if job.verifies:
            self._run.require_recorded()
        else:
            self._run.adopt()
        self._current: tuple[int, ModelWork] | None = None
        self._has_loaded = False
        self._loading_since = 0.0

    def execute(self, order: Order) -> float:
        """Carry an order out, and return the seconds that it took, without the loading of the model.

        Raises:
            PhaseLensError: for what would end every other order too: the model, the disk, or a metric that chooses
                other conditions than before.
            ShardFailed: for anything else.
        """
        model_work = self._load(order)
        start = time.monotonic()
        with _shard_failures():
            if order.shard is None:
                self._phase(model_work, order)  # which stores the plan
            else:
                self._compute(model_work, order)
        return time.monotonic() - start

    def _load(self, order: Order) -> ModelWork:
        """Return the work on the order's model, which is the only one in memory."""
        if self._current is not None and self._current[0] != order.model:
            self._sessions[self._current[0]].release()
            self._current = None
        if self._current is None:
            self._loading_since = time.time()
            session = self._sessions[order.model]
            try:
                session.lens, session.tokenized_texts  # noqa: B018 - loads them
            except PhaseLensError:
                raise
            except Exception as error:
                raise PhaseLensError(
                    f"a worker cannot load {session.label}: {describe_error(error)}"
                ) from error
            self._record("start", session.label, self._seconds_to_load())
            crew = Crew()
            work, store = self._run.work(order.model, self._observer, crew)
            self._current = order.model, ModelWork(work, store, crew)
        model_work = self._current[1]
        model_work.crew.lost = set(order.lost)
        return model_work

    def _seconds_to_load(self) -> float:
        """Return how long this process took to have its model: for the first one, since the process began."""
        import psutil

        since = self._loading_since
        if not self._has_loaded:
            since = psutil.Process().create_time()
            self._has_loaded = True
        return time.time() - since

    def _record(self, event: str, label: str, seconds: float) -> None:
        """Write down how long something took that is no shard."""
        host, process = platform.node(), os.getpid()
        times = {
            "event": event,
            "model": label,
            "seconds": round(seconds, 6),
            "host": host,
            "process": process,
        }
        name = f"times/{event}.{slug(label)}.{slug(host)}.{process}.json"
        self._directory.write(name, (json.dumps(times) + "\n").encode())

    def _compute(self, model_work: ModelWork, order: Order) -> None:
        work = model_work.work
        if order.phase == OBSERVATIONS and not order.texts_of:
            unit = work.units[order.shard or 0]
            if not model_work.store.has(unit):
                work.observe_unit(unit, order.names)
            return
        prepared = self._phase(model_work, order)
        unit = next(
            unit
            for task in prepared.plan.tasks
            for unit in task.units
            if unit.name == (order.phase, order.texts_of, order.shard)
        )
        if not model_work.store.has(unit):
            work.run_unit(prepared.task(unit.texts_of), unit, order.names)

    def _phase(self, model_work: ModelWork, order: Order) -> PreparedAtNeed:
        """Return the phase of an order, prepared once: from the texts, or from the stored observations."""
        key = order.phase, frozenset(unit for unit in order.lost if unit[0] == OBSERVATIONS)
        if key not in model_work.phases:
            start = time.monotonic()
            work = model_work.work
            if order.phase == OBSERVATIONS:
                phase = work.sequences_phase(order.names)
            else:
                phase = work.conditions_phase(self._observed(work, order.model))
            assert phase is not None
            prepared = model_work.phases[key] = PreparedAtNeed(phase, model_work.store)
            if order.shard is not None:
                prepared.task(order.texts_of)
            self._record(f"prepare-{order.phase}", work.label, time.monotonic() - start)
        return model_work.phases[key]

    def _observed(self, work: ShardWork, model: int) -> dict[str, CausalMetric[Any]]:
        """Return the causal metrics with the observations of all shards, from their files."""
        description = self._run.description(model)
        results = work.empty_results()
        metrics = work.observe_all(
            description.names,
            results,
            observes=description.observes,
            without_values=description.without_values,
        )
        with_values = {
            name: metric for name, metric in metrics.items() if name not in description.without_values
        }
        return work.causal_metrics(with_values, results)


@contextmanager
def _shard_failures() -> Iterator[None]:
    """Tell what ends one shard from what ends the run.

    Raises:
        ShardFailed: for what need not happen to another shard.
        PhaseLensError: for anything that would.
    """
    try:
        yield
    except BatchTooLarge as error:
        raise ShardFailed(str(error)) from error
    except PhaseLensError:
        raise
    except Exception as error:
        raise ShardFailed(describe_error(error)) from error
