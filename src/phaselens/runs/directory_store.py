"""Results of shards as files of states in a run directory, named by a digest of everything that determines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaselens.plugin import DamagedState, Metric, NestedState, read_state, write_state
from phaselens.plugin.state_codec import encode_state
from phaselens.runs.model_description import digest_of, shard_as_dict, shard_from_dict
from phaselens.runs.result import Failure
from phaselens.runs.run_directory import RunDirectory, slug
from phaselens.runs.shard_parts import ShardPart
from phaselens.runs.shard_store import CONDITIONS, ConditionsPlan, ShardStore, TaskPlan, WorkUnit


@dataclass(frozen=True)
class ModelKey:
    """The name of a model in the names of its files, and a digest of all that its numbers depend on."""

    number: int
    label: str
    digest: str

    @property
    def prefix(self) -> str:
        """The beginning of the names of the model's files."""
        return f"{self.number}-{slug(self.label)}"


class DirectoryStore(ShardStore):
    """Results of one model's shards in the folder `shards` of a run directory. `damaged` lists files that were not
    intact; their shards are computed again."""

    keeps = True

    def __init__(self, directory: RunDirectory, model: ModelKey) -> None:
        self._directory = directory
        self._model = model
        #: Digest of the metrics' states after all observations, on which the conditions depend.
        self._observed = ""
        self.damaged: list[str] = []
        self.n_saved = 0

    def name(self, unit: WorkUnit) -> str:
        """Return the path of a unit's file in the directory."""
        observed = self._observed if unit.phase == CONDITIONS else ""
        digest = digest_of(
            [self._model.digest, unit.phase, observed, unit.prompts_of, unit.key, unit.shard.batches]
        )
        phase = f"{unit.phase}.{slug(unit.prompts_of)}" if unit.prompts_of else unit.phase
        return f"shards/{self._model.prefix}.{phase}.{unit.shard.index:05d}.{digest[:16]}.safetensors"

    def load(self, unit: WorkUnit) -> dict[str, ShardPart] | None:
        tree = self._read(self.name(unit))
        if tree is None:
            return None
        return {
            name: ShardPart(
                changed=part["changed"],
                failure=None if part["failure"] is None else Failure(**part["failure"]),
            )
            for name, part in tree.items()
        }

    def save(self, unit: WorkUnit, parts: Mapping[str, ShardPart]) -> None:
        tree = {
            name: NestedState(
                changed=part.changed, failure=None if part.failure is None else part.failure.as_dict()
            )
            for name, part in parts.items()
        }
        self._write(self.name(unit), tree, phase=unit.phase, shard=str(unit.shard.index))
        self.n_saved += 1

    def load_plan(self, observed: Mapping[str, Metric[Any]]) -> ConditionsPlan | None:
        self._observed = digest_of(
            {name: encode_state(NestedState(metric.state())).digest for name, metric in observed.items()}
        )
        tree = self._read(self._plan_name)
        if tree is None:
            return None
        tasks = tuple(
            TaskPlan(
                tuple(task["names"]),
                tuple(shard_from_dict(index, shard) for index, shard in enumerate(task["shards"])),
                tuple(task["keys"]),
                task["n_forwards"],
                task["prompts_of"],
            )
            for task in tree["tasks"]
        )
        failures = {name: Failure(**failure) for name, failure in tree["failures"].items()}
        return ConditionsPlan(tasks, tree["states"], failures)

    def save_plan(self, plan: ConditionsPlan) -> None:
        tasks = [
            {
                "names": list(task.names),
                "shards": [shard_as_dict(shard) for shard in task.shards],
                "keys": list(task.keys),
                "n_forwards": task.n_forwards,
                "prompts_of": task.prompts_of,
            }
            for task in plan.tasks
        ]
        failures = {name: failure.as_dict() for name, failure in plan.failures.items()}
        tree = {"tasks": tasks, "states": NestedState(plan.states), "failures": failures}
        self._write(self._plan_name, tree, phase="plan", shard="")

    @property
    def _plan_name(self) -> str:
        digest = digest_of([self._model.digest, "plan", self._observed])
        return f"shards/{self._model.prefix}.plan.{digest[:16]}.safetensors"

    def _read(self, name: str) -> NestedState | None:
        """Return the state in a file; None for a file that is missing or damaged."""
        try:
            return read_state(self._directory.path / name)
        except FileNotFoundError:
            return None
        except DamagedState:
            if name not in self.damaged:
                self.damaged.append(name)
            return None

    def _write(self, name: str, tree: Mapping[str, Any], **metadata: str) -> None:
        metadata |= {"model": self._model.label}

        def write(path: Path) -> bool:
            write_state(path, tree, metadata=metadata, replace=name in self.damaged)
            return True

        self._directory.write_by(name, write)
