"""Metrics that have chosen what to run (sequences of their own, or conditions), and are run shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from phaselens.data import TokenizedText
from phaselens.errors import InputError
from phaselens.plugin import CausalMetric, Condition, ConditionKey, Metric, NestedState
from phaselens.plugin.author_errors import is_of_plugin
from phaselens.plugin.states import changes, same_value
from phaselens.runs.active_metrics import ActiveMetric
from phaselens.runs.result import Failure
from phaselens.runs.shard_parts import ShardPart
from phaselens.runs.shard_store import PhasePlan, ShardStore, TaskPlan
from phaselens.runs.shards import Shard, shard_key


@dataclass
class PreparedMetric:
    """A metric that has chosen what to run, and then records one shard after the other.

    `state` is its state before the first shard; None if there is one shard only, whose result is the metric itself.
    `backup` is the state then, to begin anew if memory runs out; None if it cannot be stored.
    """

    active: ActiveMetric
    conditions: dict[ConditionKey, Condition]
    attributes: frozenset[str]
    state: NestedState | None = None
    backup: NestedState | None = None

    @classmethod
    def of(cls, active: ActiveMetric, *, keeps_state: bool) -> PreparedMetric:
        """Return the metric after it has chosen its sequences or its conditions."""
        metric = active.metric
        conditions = metric.losses.conditions if isinstance(metric, CausalMetric) else {}
        state = NestedState(metric.state()) if keeps_state else None
        backup = _storable_state(metric) if state is None else state
        return cls(active, conditions, frozenset(vars(metric)), state, backup)

    def reset(self) -> None:
        """Forget everything that was recorded since the choice, where there are several shards."""
        if self.state is not None:
            self._load(self.state)

    def begin_anew(self) -> bool:
        """Forget what an attempt has recorded; return whether that is possible."""
        if self.backup is not None:
            self._load(self.backup)
        return self.backup is not None

    def _load(self, state: NestedState) -> None:
        metric = self.active.metric
        for name in vars(metric).keys() - self.attributes:
            delattr(metric, name)
        metric.load_state(state)
        if isinstance(metric, CausalMetric):
            metric.losses.conditions = self.conditions

    def part(self) -> ShardPart:
        """Return what was recorded since the last reset."""
        if self.state is None:
            return ShardPart(self.active.metric)
        return ShardPart(changed=changes(self.active.metric.state(), self.state))


def _storable_state(metric: Metric[Any]) -> NestedState | None:
    """Return a metric's state; None where it cannot be stored, which a metric of one shard does not need."""
    try:
        return NestedState(metric.state())
    except BaseException as error:
        if not is_of_plugin(error):
            raise
        return None


@dataclass(frozen=True)
class PreparedTask:
    """Texts in shards, and the metrics that are ready to be run on them; `run` runs metrics on one shard.

    `texts_of` names the metric whose sequences or prompts the texts are; it is empty for the run's texts.
    """

    phase: str
    tokenized_texts: Sequence[TokenizedText]
    shards: Sequence[Shard]
    run: Callable[[Sequence[ActiveMetric], Shard], None]
    texts_of: str = ""
    metrics: dict[str, PreparedMetric] = field(default_factory=dict)

    @property
    def plan(self) -> TaskPlan:
        """The task without the metrics."""
        keys = tuple(shard_key(self.tokenized_texts, shard) for shard in self.shards)
        n_forwards = 1 + sum(len(prepared.conditions) for prepared in self.metrics.values())
        return TaskPlan(self.phase, tuple(self.metrics), tuple(self.shards), keys, n_forwards, self.texts_of)


@dataclass(frozen=True)
class PreparedPhase:
    """The tasks of a phase by the metric whose texts they have, and the failures of metrics that could not choose."""

    tasks: dict[str, PreparedTask]
    failures: dict[str, Failure]

    @property
    def plan(self) -> PhasePlan:
        """The phase without the metrics."""
        tasks = [task for task in self.tasks.values() if task.metrics]
        states = {
            name: prepared.state
            for task in tasks
            for name, prepared in task.metrics.items()
            if prepared.state is not None
        }
        return PhasePlan(tuple(task.plan for task in tasks), states, self.failures)


@dataclass(frozen=True)
class Phase:
    """A phase before it is prepared.

    Attributes:
        name: `observations` or `conditions`.
        basis: a digest of what the phase follows from.
        names: the metrics that may take part.
        prepare: has the metrics choose what to run.
    """

    name: str
    basis: str
    names: Sequence[str]
    prepare: Callable[[], PreparedPhase]


class PreparedAtNeed:
    """A phase that is prepared at the first use of one of its tasks, or at once if its plan is not stored."""

    def __init__(self, phase: Phase, store: ShardStore) -> None:
        self._phase = phase
        self._store = store
        self._tasks: dict[str, PreparedTask] | None = None
        stored = store.load_plan(phase.name, phase.basis)
        self.plan = self._make_plan(None) if stored is None else stored

    def _make_plan(self, stored: PhasePlan | None) -> PhasePlan:
        prepared = self._phase.prepare()
        self._tasks = prepared.tasks
        plan = prepared.plan
        if stored is not None:
            require_same_plan(stored, plan)
        else:
            self._store.save_plan(self._phase.name, plan)
        return plan

    def task(self, texts_of: str) -> PreparedTask:
        """Return the task with the texts of a metric, or with the run's texts (`""`).

        Raises:
            InputError: if the metrics choose something else than in the stored plan.
        """
        if self._tasks is None:
            self._make_plan(self.plan)
        assert self._tasks is not None
        return self._tasks[texts_of]


def require_same_plan(plan: PhasePlan, new_plan: PhasePlan) -> None:
    """Raise InputError if conditions that were chosen again differ from those of the finished shards."""
    for name, state in plan.states.items():
        if not same_value(state, new_plan.states.get(name)):
            raise InputError(
                f"metric {name!r} chose other conditions or sequences than in the finished shards, from the same "
                "texts; start over with --fresh, and draw random numbers from a generator made with self.seed"
            )
