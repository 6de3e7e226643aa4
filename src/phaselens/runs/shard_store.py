"""The interface through which the results of shards are kept; this one keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import Metric, NestedState
from phaselens.runs.result import Failure
from phaselens.runs.shard_parts import ShardPart
from phaselens.runs.shards import Shard

OBSERVATIONS, CONDITIONS = "observations", "conditions"


@dataclass(frozen=True)
class WorkUnit:
    """A piece of work whose result is one file: one phase of one shard.

    `phase` is `OBSERVATIONS` or `CONDITIONS`. `prompts_of` names the metric whose prompts the shard holds; it is empty
    for the run's texts. `key` is a digest of the shard's content, for stores.
    """

    phase: str
    shard: Shard
    prompts_of: str = ""
    key: str = ""


@dataclass(frozen=True)
class TaskPlan:
    """Texts or prompts in shards on which the conditions of some metrics are run.

    `prompts_of` names the metric whose prompts they are; it is empty for the run's texts. `keys` are digests of the
    content of each shard; `n_forwards` is the number of forwards on each text.
    """

    names: tuple[str, ...]
    shards: tuple[Shard, ...]
    keys: tuple[str, ...]
    n_forwards: int
    prompts_of: str = ""

    @property
    def units(self) -> list[WorkUnit]:
        """The task's pieces of work, in order."""
        return [
            WorkUnit(CONDITIONS, shard, self.prompts_of, key)
            for shard, key in zip(self.shards, self.keys, strict=True)
        ]


@dataclass(frozen=True)
class ConditionsPlan:
    """What follows from the observations of all shards: the state of each causal metric, and what is to be run.

    `states` are the metrics' states after their conditions were chosen; `failures` are those of metrics that could not
    choose them.
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

    def save(self, unit: WorkUnit, parts: Mapping[str, ShardPart]) -> None:
        """Keep the parts of a unit; they hold changes of states, not instances."""

    def has(self, unit: WorkUnit) -> bool:
        """Return whether the parts of a unit are kept, and intact."""
        return self.load(unit) is not None

    def load_plan(self, observed: Mapping[str, Metric[Any]]) -> ConditionsPlan | None:
        """Return the kept plan for the metrics as they are after all observations; None without one."""
        return None

    def save_plan(self, plan: ConditionsPlan) -> None:
        """Keep the plan for the metrics of the last `load_plan`."""
