"""Results of shards as files of states in a run directory, named by a digest of everything that determines them."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaselens.plugin import DamagedState, NestedState, read_state, write_state
from phaselens.runs.model_description import shard_as_dict, shard_from_dict
from phaselens.runs.result import Failure
from phaselens.runs.run_directory import RunDirectory, slug
from phaselens.runs.shard_parts import ShardPart
from phaselens.runs.shard_store import CONDITIONS, PhasePlan, ShardStore, TaskPlan, WorkUnit
from phaselens.runs.shards import digest_of


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
        #: Digest of what the units of each phase follow from, besides the model and their own content.
        self._bases: dict[str, str] = {}
        self.damaged: list[str] = []
        self.n_saved = 0

    def name(self, unit: WorkUnit) -> str:
        """Return the path of a unit's file in the directory."""
        # The run's texts follow from nothing, but sequences and conditions do.
        basis = self._bases[unit.phase] if unit.phase == CONDITIONS or unit.texts_of else ""
        digest = digest_of(
            [self._model.digest, unit.phase, basis, unit.texts_of, unit.key, unit.shard.batches]
        )
        phase = f"{unit.phase}.{slug(unit.texts_of)}" if unit.texts_of else unit.phase
        return f"shards/{self._model.prefix}.{phase}.{unit.shard.index:05d}.{digest[:16]}.safetensors"

    def load(self, unit: WorkUnit) -> dict[str, ShardPart] | None:
        tree = self._read(self.name(unit))
        if tree is None:
            return None
        return {
            name: ShardPart(
                changed=part["changed"],
                failure=None if part["failure"] is None else Failure(**part["failure"]),
                is_halved=part.get("is_halved", False),
            )
            for name, part in tree.items()
        }

    def exists(self, unit: WorkUnit) -> bool:
        name = self.name(unit)
        return name not in self.damaged and (self._directory.path / name).is_file()

    def save(self, unit: WorkUnit, parts: Mapping[str, ShardPart], seconds: float) -> None:
        tree = {
            name: NestedState(
                changed=part.changed,
                failure=None if part.failure is None else part.failure.as_dict(),
                **({"is_halved": True} if part.is_halved else {}),
            )
            for name, part in parts.items()
        }
        self._write(self.name(unit), tree, phase=unit.phase, shard=str(unit.shard.index))
        self._directory.write(f"times/{Path(self.name(unit)).stem}.json", self._times(unit, seconds))
        self.n_saved += 1

    def _times(self, unit: WorkUnit, seconds: float) -> bytes:
        """Return what is known about the computation of a unit, as the content of a file."""
        times = {
            "model": self._model.label,
            "phase": unit.phase,
            "texts_of": unit.texts_of,
            "shard": unit.shard.index,
            "n_texts": len(unit.shard.members),
            "n_tokens": unit.shard.n_tokens,
            "seconds": round(seconds, 6),
            "host": platform.node(),
            "process": os.getpid(),
            "finished": time.time(),
        }
        return (json.dumps(times) + "\n").encode()

    def load_plan(self, phase: str, basis: str) -> PhasePlan | None:
        self._bases[phase] = basis
        tree = self._read(self._plan_name(phase))
        if tree is None:
            return None
        tasks = tuple(
            TaskPlan(
                phase,
                tuple(task["names"]),
                tuple(shard_from_dict(index, shard) for index, shard in enumerate(task["shards"])),
                tuple(task["keys"]),
                task["n_forwards"],
                task["texts_of"],
            )
            for task in tree["tasks"]
        )
        failures = {name: Failure(**failure) for name, failure in tree["failures"].items()}
        return PhasePlan(tasks, tree["states"], failures)

    def save_plan(self, phase: str, plan: PhasePlan) -> None:
        tasks = [
            {
                "names": list(task.names),
                "shards": [shard_as_dict(shard) for shard in task.shards],
                "keys": list(task.keys),
                "n_forwards": task.n_forwards,
                "texts_of": task.texts_of,
            }
            for task in plan.tasks
        ]
        failures = {name: failure.as_dict() for name, failure in plan.failures.items()}
        tree = {"tasks": tasks, "states": NestedState(plan.states), "failures": failures}
        self._write(self._plan_name(phase), tree, phase=phase)

    def _plan_name(self, phase: str) -> str:
        digest = digest_of([self._model.digest, "plan", phase, self._bases[phase]])
        return f"shards/{self._model.prefix}.{phase}-plan.{digest[:16]}.safetensors"

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
