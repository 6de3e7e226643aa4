"""The interface through which the results of shards are kept; this one keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phaselens.plugin import NestedState
from phaselens.runs.result import Failure
from phaselens.runs.shard_parts import ShardPart
from phaselens.runs.shards import Shard

OBSERVATIONS, CONDITIONS = "observations", "conditions"


@dataclass(frozen=True)
class WorkUnit:
    """A piece of work whose result is one file: one phase of one shard.

    `phase` is `OBSERVATIONS` or `CONDITIONS`. `texts_of` names the metric whose sequences or prompts the shard holds;
    it is empty for the run's texts. `key` is a digest of the shard's content, for stores.
    """

    phase: str
    shard: Shard
    texts_of: str = ""
    key: str = ""

    @property
    def name(self) -> tuple[str, str, int]:
        """What names the unit among those of one model: phase, `texts_of` and the number of the shard."""
        return self.phase, self.texts_of, self.shard.index


@dataclass(frozen=True)
class TaskPlan:
    """Texts in shards that some metrics are run on: those of the run, or sequences or prompts of one metric.

    `texts_of` names that metric; it is empty for the run's texts. `keys` are digests of the content of each shard;
    `n_forwards` is the number of forwards on each text.
    """

    phase: str
    names: tuple[str, ...]
    shards: tuple[Shard, ...]
    keys: tuple[str, ...]
    n_forwards: int
    texts_of: str = ""

    @property
    def units(self) -> list[WorkUnit]:
        """The task's pieces of work, in order."""
        return [
            WorkUnit(self.phase, shard, self.texts_of, key)
            for shard, key in zip(self.shards, self.keys, strict=True)
        ]


@dataclass(frozen=True)
class PhasePlan:
    """What metrics chose before a phase: sequences of their own to read, or conditions to run.

    `states` are the metrics' states after that; `failures` are those of metrics that failed.
    """

    tasks: tuple[TaskPlan, ...]
    states: Mapping[str, NestedState]
    failures: Mapping[str, Failure]


class ShardStore:
    """Base class of stores. The results of a run without one are only in memory."""

    #: Whether results are kept, so that every part must be storable.
    keeps = False

    def load(self, unit: WorkUnit) -> dict[str, ShardPart] | None:
        """Return the kept parts of a unit by metric; None without them."""
        return None

    def save(self, unit: WorkUnit, parts: Mapping[str, ShardPart], seconds: float) -> None:
        """Keep the parts of a unit, which hold changes of states, not instances, and the time that it took."""

    def has(self, unit: WorkUnit) -> bool:
        """Return whether the parts of a unit are kept, and intact."""
        return self.load(unit) is not None

    def exists(self, unit: WorkUnit) -> bool:
        """Return whether the parts of a unit are kept, without reading them."""
        return self.has(unit)

    def load_plan(self, phase: str, basis: str) -> PhasePlan | None:
        """Return the kept plan of a phase, if it was made from the same: `basis` is a digest of what it follows from.

        The store takes the units of the phase to follow from that, too.
        """
        return None

    def save_plan(self, phase: str, plan: PhasePlan) -> None:
        """Keep the plan of a phase, for the basis of its last `load_plan`."""
