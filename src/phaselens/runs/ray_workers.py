"""Workers in a Ray cluster: actors with one model each, which get shards as tasks. Nothing else uses Ray."""

from __future__ import annotations

import contextlib
import queue
from typing import Any

from phaselens.errors import InputError, PhaseLensError
from phaselens.runs.observer import Observer
from phaselens.runs.shard_worker import ShardFailed, ShardWorker
from phaselens.runs.threads import fixed_threads
from phaselens.runs.worker_job import Order, WorkerJob
from phaselens.runs.workers import WAITING_THREADS, Report, Workers

#: Seconds between two looks at a cluster where nothing happens.
_PATIENCE = 1.0


def require_ray() -> Any:
    """Return the module `ray`; raise InputError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs Ray; pip install 'phaselens[ray]'") from error
    return ray


class TokenCounter(Observer):
    """Counts the tokens that were read."""

    n_tokens = 0

    def advance(self, n_tokens: int) -> None:
        self.n_tokens += n_tokens


class ShardActor:
    """What an actor does: it carries out orders, and returns reports instead of raising."""

    def __init__(self, job: str) -> None:
        self._refusal: dict[str, Any] | None = None
        self._threads = 1
        self._counter = TokenCounter()
        try:
            parsed = WorkerJob.from_json(job)
            self._threads = parsed.options.threads or 1
            with fixed_threads(self._threads):
                self._worker = ShardWorker(parsed, self._counter)
        except PhaseLensError as error:
            self._refusal = _refusal(error)

    def ready(self) -> dict[str, Any]:
        """Report that the actor takes orders, or why it does not."""
        return self._refusal or {"kind": "ready"}

    def execute(self, order: Order) -> dict[str, Any]:
        """Carry an order out, and return the report, with the number of `tokens` that were read."""
        self._counter.n_tokens = 0
        try:
            with fixed_threads(self._threads):
                seconds = self._worker.execute(order)
            return {"kind": "done", "amount": seconds, "tokens": self._counter.n_tokens}
        except ShardFailed as error:
            return {"kind": "failed", "text": str(error)}
        except PhaseLensError as error:
            return _refusal(error)


def _refusal(error: PhaseLensError) -> dict[str, Any]:
    return {"kind": "refused", "text": str(error), "error": type(error).__name__}


class RayWorkers(Workers):
    """Actors in a Ray cluster. They write into the run's directory, which all machines must see.

    Args:
        job: the run.
        n_workers: how many actors at most; None for one on each GPU, or on each node if the run uses the CPU.
        address: the cluster's address; None for that of the environment, or a new cluster on this machine.
    """

    def __init__(self, job: WorkerJob, n_workers: int | None, address: str | None) -> None:
        self._ray = ray = require_ray()
        self._is_own = not ray.is_initialized()
        if self._is_own:
            try:
                ray.init(address=address, log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(f"Ray cluster {address or 'on this machine'}: {error}") from error
        self._uses_gpus = job.options.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) > 0
        nodes = [node for node in ray.nodes() if node["Alive"]]
        n_gpus = int(ray.cluster_resources().get("GPU", 0))
        self.n_workers = n_workers or (n_gpus if self._uses_gpus else len(nodes))
        self._job = ray.put(job.as_json())
        self._actors: dict[int, Any] = {}
        #: What is awaited: a task, and the worker that carries it out.
        self._tasks: dict[Any, int] = {}
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._n_started = 0

    def start(self) -> int:
        worker = self._n_started
        self._n_started += 1
        # A CPU each, whatever the number of threads: a node with fewer CPUs than threads could not have an actor.
        actor_class = self._ray.remote(
            num_cpus=1,
            num_gpus=1 if self._uses_gpus else 0,
            scheduling_strategy="SPREAD",
            max_restarts=0,
            runtime_env={"env_vars": WAITING_THREADS},
        )(ShardActor)
        actor = self._actors[worker] = actor_class.remote(self._job)
        self._tasks[actor.ready.remote()] = worker
        return worker

    def send(self, worker: int, order: Order) -> None:
        self._tasks[self._actors[worker].execute.remote(order)] = worker

    def wait(self) -> Report:
        while self._reports.empty():
            finished, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=_PATIENCE)
            for task in finished:
                self._take(task)
        return self._reports.get()

    def _take(self, task: Any) -> None:
        """Put the report of a task that has ended into the queue."""
        worker = self._tasks.pop(task)
        try:
            values = self._ray.get(task)
            self._reports.put(Report(worker, "advanced", amount=values.pop("tokens", 0)))
            report = Report(worker, **values)
        except self._ray.exceptions.RayActorError as error:
            report = Report(worker, "ended", text=_one_line(f"the actor died: {error}"))
        except self._ray.exceptions.RayError as error:
            report = Report(worker, "failed", text=_one_line(str(error)))
        self._reports.put(report)
        if report.kind in ("failed", "ended"):
            self._end(self._actors.pop(worker))

    def _end(self, actor: Any) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor)

    def close(self) -> None:
        if not self._ray.is_initialized():
            return
        for actor in self._actors.values():
            self._end(actor)
        if self._is_own:
            self._ray.shutdown()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
