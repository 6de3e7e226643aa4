"""Who computes the shards that are missing: this process, or others whose results appear in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from phaselens.runs.result import FailedShard
from phaselens.runs.shard_store import WorkUnit

#: What names a unit among those of one model: its phase, the metric whose texts it has, and the number of its shard.
UnitName = tuple[str, str, int]


#: How often a shard is tried.
N_TRIES = 2


def failed_twice(reasons: Iterable[str]) -> str:
    """Return why a shard is given up, from the reasons of its tries.

    >>> failed_twice(["out of memory", "out of memory"])
    'it failed twice: out of memory'
    """
    return f"it failed twice: {' and then '.join(dict.fromkeys(reasons))}"


@dataclass(frozen=True)
class UnitJob:
    """Units of one model and phase that are not in the store.

    Attributes:
        phase: `observations` or `conditions`.
        names: metrics to run.
        units: the units, in order.
        compute: computes a unit in this process, and puts the result into the store.
        exists: returns whether a unit's result is in the store by now.
    """

    phase: str
    names: Sequence[str]
    units: Sequence[WorkUnit]
    compute: Callable[[WorkUnit], object]
    exists: Callable[[WorkUnit], bool]


@dataclass(eq=False)
class Crew:
    """Base class of those who compute units. This one leaves all of them to its caller, which computes them in order.

    Attributes:
        lost: units of the current model that are left out of the results, because they cannot be computed, or not by
            this process.
        failed_shards: those that could not be computed, for the reports of the run.
        number, label: of the current model.
        text_ids: ids of the run's texts.
    """

    lost: set[UnitName] = field(default_factory=set)
    failed_shards: list[FailedShard] = field(default_factory=list)
    number: int = 0
    label: str = ""
    text_ids: Sequence[str] = ()

    #: Whether `make_plan` has the plans of phases made by others.
    makes_plans = False

    @property
    def computes_here(self) -> bool:
        """Whether the caller computes all units, so that it loads the models."""
        return type(self) is Crew

    #: Whether the results of all units are there in the end, from which tables are made.
    makes_tables = True
    #: Number of units that this crew has computed.
    n_computed = 0
    #: Seconds for which it has waited for others.
    seconds = 0.0

    def begin_model(self, number: int, label: str, text_ids: Sequence[str]) -> None:
        """Learn which model comes next: its number and label in the run, and the ids of the run's texts."""
        self.number, self.label, self.text_ids = number, label, text_ids
        self.lost.clear()

    def goes_on_to_conditions(self) -> bool:
        """Return whether the conditions of causal metrics are run after the observations."""
        return True

    def select(self, units: Sequence[WorkUnit]) -> Sequence[WorkUnit]:
        """Return the units among the missing ones that this process waits for, to announce its progress."""
        return units

    def make_plan(self, phase: str, names: Sequence[str]) -> None:
        """Have the plan of a phase made and stored."""

    def compute(self, job: UnitJob) -> None:
        """Have units computed and stored; add those that are left out to `lost`."""

    def give_up(self, units: Iterable[WorkUnit], reason: str) -> None:
        """Leave units out of the results, and report them."""
        for unit in units:
            texts = () if unit.texts_of else tuple(self.text_ids[index] for index in unit.shard.members)
            self.failed_shards.append(
                FailedShard(self.label, unit.phase, unit.shard.index, texts, reason, unit.texts_of)
            )
            self.leave_out([unit])

    def leave_out(self, units: Iterable[WorkUnit]) -> None:
        """Leave units out of the results."""
        self.lost.update(unit.name for unit in units)
