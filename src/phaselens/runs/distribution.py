"""How the shards of a run are distributed: over workers of this machine or of a Ray cluster, or over parts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches, require_text, require_whole
from phaselens.plugin import CausalMetric
from phaselens.runs.crew import Crew
from phaselens.runs.observer import Observer
from phaselens.runs.parts import PHASES, Part, PartCrew
from phaselens.runs.run_directory import RunDirectory
from phaselens.runs.run_options import SelectedMetric

if TYPE_CHECKING:
    from phaselens.runs.worker_job import WorkerJob
    from phaselens.runs.workers import Workers

ENGINES = ("processes", "ray")


@dataclass(frozen=True)
class Distribution:
    """The choices that decide who computes which shards; none of them changes a number.

    Attributes:
        workers: number of workers; None computes in this process, or with Ray on every GPU or node.
        engine: `processes` of this machine, or actors of a `ray` cluster.
        address: the address of a Ray cluster; None for the one of the environment, or a new one on this machine.
        part: compute this part only.
        phase: compute this phase of the part only.
    """

    workers: int | None = None
    engine: str = "processes"
    address: str | None = None
    part: Part | None = None
    phase: str | None = None

    @classmethod
    def parse(
        cls, workers: object, engine: object, address: object, part: object, phase: object, out: object
    ) -> Distribution:
        """Return the checked choices.

        Raises:
            InputError: for choices that do not exist, or do not go together.
        """
        if workers is not None:
            require_whole("workers", workers, 1)
        require_text("engine", engine)
        if engine not in ENGINES:
            raise InputError(f"engine {engine!r} is not known; {close_matches(str(engine), ENGINES)}")
        if address is not None:
            require_text("address", address)
            if engine != "ray":
                raise InputError("--address is that of a Ray cluster; add --engine ray")
        if phase is not None and phase not in PHASES:
            raise InputError(f"phase {phase!r} is not known; {close_matches(str(phase), PHASES)}")
        if phase is not None and part is None:
            raise InputError("--phase limits what a part computes; add --shards PART/PARTS")
        if out is None and (part is not None or engine == "ray"):
            option = "--shards" if part is not None else "--engine ray"
            raise InputError(f"{option} needs a directory for the results of all; add --out DIR")
        parsed = None if part is None else Part.parse(part)
        if engine == "ray":
            from phaselens.runs.ray_workers import require_ray

            require_ray()
        return cls(workers, str(engine), address, parsed, phase)  # type: ignore[arg-type]

    def describe_part(self, n_computed: int, out: object) -> str:
        """Return what a part has done, and what comes next."""
        done = f"part {self.part}: {n_computed} shards were computed"
        if self.phase == PHASES[0]:
            return f"{done}; when all parts are, run them without --phase, and then phaselens merge {out}"
        return f"{done}; when all parts are, phaselens merge {out} makes the tables"

    @property
    def uses_workers(self) -> bool:
        """Whether shards are computed by other processes."""
        return self.workers is not None or self.engine == "ray"

    @contextlib.contextmanager
    def directory(self, directory: RunDirectory | None) -> Iterator[RunDirectory | None]:
        """Yield the directory that workers share: the run's own, or one that is removed at the end."""
        if directory is not None or not self.uses_workers:
            yield directory
            return
        with tempfile.TemporaryDirectory(prefix="phaselens-") as folder:
            yield RunDirectory.to_write(Path(folder) / "run")

    @contextlib.contextmanager
    def crew(
        self, job: WorkerJob | None, metrics: Sequence[SelectedMetric], observer: Observer
    ) -> Iterator[Crew]:
        """Yield the crew that computes the shards; its workers, which get the `job`, end with the context."""
        from phaselens.runs.worker_crew import WorkerCrew

        with contextlib.ExitStack() as stack:
            crew = Crew()
            if job is not None:
                worker_crew = WorkerCrew(lambda: self._workers(job), observer)
                stack.callback(worker_crew.close)
                crew = worker_crew
            if self.part is not None:
                has_conditions = any(issubclass(selected.metric, CausalMetric) for selected in metrics)
                crew = PartCrew(self.part, crew, has_conditions=has_conditions, only_phase=self.phase)
            yield crew

    def _workers(self, job: WorkerJob) -> Workers:
        if self.engine == "ray":
            from phaselens.runs.ray_workers import RayWorkers

            return RayWorkers(job, self.workers, self.address)
        from phaselens.runs.local_workers import LocalWorkers

        assert self.workers is not None
        return LocalWorkers(job, self.workers)

    def job(self, directory: RunDirectory, **values: Any) -> WorkerJob | None:
        """Return what workers have to know; None without any. `values` are further fields of `WorkerJob`."""
        if not self.uses_workers:
            return None
        from phaselens.runs.worker_job import WorkerJob, reference_to, require_specs

        values["models"] = require_specs(values["models"])
        for metric in values["metrics"]:
            reference_to(metric)
        return WorkerJob(out=str(directory.path.resolve()), verifies=self.engine == "ray", **values)
