"""The work on the shards of one model: observe the unedited model, then run the conditions that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from phaselens.data import TokenizedText
from phaselens.errors import InputError
from phaselens.plugin import CausalMetric, Condition, ConditionKey, Metric, NestedState
from phaselens.plugin.states import changes, same_value
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch
from phaselens.runs.condition_passes import ConditionsTask, prepare, run_conditions
from phaselens.runs.layer_pass import activate, forward, group_by_pass
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.observer import Observer
from phaselens.runs.result import Failure, MetricResult
from phaselens.runs.shard_parts import ShardCollector, ShardPart
from phaselens.runs.shard_store import OBSERVATIONS, ConditionsPlan, ShardStore, TaskPlan, WorkUnit
from phaselens.runs.shards import Shard, cut_shards, shard_key

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer


class MeasuredModel(Protocol):
    """A model and the run's texts as its tokens; both may be made at their first use."""

    @property
    def lens(self) -> HookedTransformer:
        """The loaded model."""

    @property
    def tokenized_texts(self) -> Sequence[TokenizedText]:
        """The texts as tokens."""


@dataclass
class PreparedMetric:
    """A causal metric with its conditions, which records one shard after the other.

    `state` is its state before the first shard; None if there is one shard only, whose result is the metric itself.
    """

    metric: CausalMetric[Any]
    conditions: dict[ConditionKey, Condition]
    attributes: frozenset[str]
    state: NestedState | None = None
    is_used: bool = False

    @classmethod
    def of(cls, metric: CausalMetric[Any], *, keeps_state: bool) -> PreparedMetric:
        """Return the metric after its conditions were chosen."""
        state = NestedState(metric.state()) if keeps_state else None
        return cls(metric, metric.losses.conditions, frozenset(vars(metric)), state)

    def reset(self) -> None:
        """Forget everything that was recorded since the conditions were chosen."""
        if self.is_used and self.state is not None:
            for name in vars(self.metric).keys() - self.attributes:
                delattr(self.metric, name)
            self.metric.load_state(self.state)
            self.metric.losses.conditions = self.conditions
        self.is_used = True

    def part(self) -> ShardPart:
        """Return what was recorded since the last reset."""
        if self.state is None:
            return ShardPart(self.metric)
        return ShardPart(changed=changes(self.metric.state(), self.state))


@dataclass(frozen=True)
class PreparedTask:
    """Texts or prompts in shards, and the metrics that are ready to run their conditions on them."""

    texts: ConditionsTask
    shards: Sequence[Shard]
    prompts_of: str = ""
    metrics: dict[str, PreparedMetric] = field(default_factory=dict)

    @property
    def plan(self) -> TaskPlan:
        """The task without the metrics."""
        keys = tuple(shard_key(self.texts.tokenized_texts, shard) for shard in self.shards)
        n_forwards = 1 + sum(len(prepared.conditions) for prepared in self.metrics.values())
        return TaskPlan(tuple(self.metrics), tuple(self.shards), keys, n_forwards, self.prompts_of)


class ShardWork:
    """The work on one model.

    Args:
        model: the model and the texts; they are used only where a shard is not stored.
        factory: creates the metrics.
        shards: the shards of the texts.
        sizes: tokens in a shard and in a batch, for the prompts of metrics.
        observer: receives the progress.
        store: keeps the results of shards.
    """

    def __init__(
        self,
        model: MeasuredModel,
        factory: MetricFactory,
        shards: Sequence[Shard],
        sizes: tuple[int, int],
        *,
        observer: Observer,
        store: ShardStore | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        self._model = model
        self._factory = factory
        self._sizes = sizes
        self._observer = observer
        self._store = ShardStore() if store is None else store
        self.units = [
            WorkUnit(OBSERVATIONS, shard, key="" if keys is None else keys[shard.index]) for shard in shards
        ]

    @property
    def _label(self) -> str:
        return self._factory.model.label

    def construct(self, results: Mapping[str, MetricResult]) -> dict[str, ActiveMetric]:
        """Return an instance of each metric that can be made for this model; record why others cannot."""
        active_metrics = {}
        for name in self._factory.selected:
            with guarded(results[name], self._label, "construct"):
                # First, so that no metric is constructed from parameters that it cannot define.
                self._factory.require_definition(name)
                active_metrics[name] = self.new(name)
        return active_metrics

    def new(self, name: str) -> ActiveMetric:
        """Return a new instance of a metric, with the hook points that it reads."""
        return activate(self._model.lens, self._factory.new(name), self._factory.empty_result(name))

    def measure(
        self,
        names: Iterable[str],
        results: Mapping[str, MetricResult],
        *,
        observes: bool,
        unused: Mapping[str, ActiveMetric] | None = None,
    ) -> dict[str, Metric[Any]]:
        """Return an instance of each metric that has measured all texts; record the failures of others.

        Args:
            names: the metrics.
            results: receives the failures.
            observes: whether any metric reads the unedited model.
            unused: instances that were made already; the first shard that is observed takes them.
        """
        names = list(names)
        unused = dict(unused or {})
        if observes:
            metrics = self._observe_all(names, results, unused)
        else:
            metrics = {
                name: unused[name].metric if name in unused else self._factory.new(name) for name in names
            }
        metrics |= self._run_all_conditions(metrics, results)
        failed = {
            name for name in names if any(failure.model == self._label for failure in results[name].failures)
        }
        return {name: metrics[name] for name in names if name not in failed}

    def _observe_all(
        self, names: Sequence[str], results: Mapping[str, MetricResult], unused: dict[str, ActiveMetric]
    ) -> dict[str, Metric[Any]]:
        """Return the metrics after they have observed all shards."""
        collector = ShardCollector(self._factory, names, results)
        missing = [unit for unit in self.units if not self._store.has(unit)]
        if missing:
            probes = [unused.get(name) or self.new(name) for name in names]
            n_passes = len(group_by_pass(probes))
            self._observer.measuring(self._label, n_passes * sum(unit.shard.n_tokens for unit in missing))
        for unit in self.units:
            parts = self._store.load(unit)
            if parts is None or not parts.keys() >= set(collector.working):
                instances = [
                    unused.pop(name) if name in unused else self.new(name) for name in collector.working
                ]
                parts = self.observe(unit.shard, instances)
                self._store.save(unit, parts)
            collector.add(parts)
        return collector.finish()

    def observe(self, shard: Shard, active_metrics: Sequence[ActiveMetric]) -> dict[str, ShardPart]:
        """Measure the unedited model on one shard with new instances of metrics."""
        lens, texts = self._model.lens, self._model.tokenized_texts
        for sink_position, members in group_by_pass(active_metrics).items():
            for indices in shard.batches:
                forward(lens, make_batch(lens, texts, indices), members, sink_position)
                self._observer.advance(sum(len(texts[index].ids) for index in indices))
        return {active.metric.name: self._part(active, self._observed) for active in active_metrics}

    def _observed(self, metric: Metric[Any]) -> ShardPart:
        if not self._store.keeps:
            return ShardPart(metric)
        return ShardPart(changed=changes(metric.state(), self._factory.empty_state(metric.name)))

    def _part(self, active: ActiveMetric, collected: Callable[[Any], ShardPart]) -> ShardPart:
        """Return what a metric collected in a shard, or its failure."""
        part = ShardPart()
        if active.works:
            with guarded(active.result, self._label, "state"):
                part = collected(active.metric)
        for failure in active.result.failures[:1]:
            part = ShardPart(failure=failure)
        return part

    def _run_all_conditions(
        self, metrics: Mapping[str, Metric[Any]], results: Mapping[str, MetricResult]
    ) -> dict[str, Metric[Any]]:
        """Return the causal metrics after their conditions were run on all shards."""
        observed = {name: metric for name, metric in metrics.items() if isinstance(metric, CausalMetric)}
        if not observed:
            return {}
        plan = self._store.load_plan(observed)
        tasks: dict[str, PreparedTask] = {}
        if plan is None or not all(self._store.has(unit) for task in plan.tasks for unit in task.units):
            tasks, new_plan = self.prepare(observed)
            if plan is not None:
                _require_same_plan(plan, new_plan)
            self._store.save_plan(new_plan)
            plan = new_plan
        for name, failure in plan.failures.items():
            results[name].failures.append(failure)
        finished: dict[str, Metric[Any]] = {}
        for task in plan.tasks:
            finished |= self._run_task(task, tasks.get(task.prompts_of), plan, results)
        return finished

    def prepare(
        self, observed: Mapping[str, CausalMetric[Any]]
    ) -> tuple[dict[str, PreparedTask], ConditionsPlan]:
        """Choose the conditions of the causal metrics; return the tasks by the metric whose prompts they run."""
        tasks = {"": PreparedTask(ConditionsTask.of_texts(self._model.tokenized_texts), self._shards)}
        failures: dict[str, Failure] = {}
        for name, metric in observed.items():
            result = self._factory.empty_result(name)
            with guarded(result, self._label, "conditions"):
                prompts = prepare(self._model.lens, metric)
                if prompts is not None and not prompts and not self._store.keeps:
                    continue  # there is nothing to run
                task = tasks[""]
                if prompts is not None:
                    texts = ConditionsTask.of_prompts(prompts)
                    task = PreparedTask(texts, cut_shards(texts.tokenized_texts, *self._sizes), name)
                    tasks[name] = task
                keeps_state = self._store.keeps or len(task.shards) > 1
                task.metrics[name] = PreparedMetric.of(metric, keeps_state=keeps_state)
            if result.failures:
                failures[name] = result.failures[0]
        tasks = {name: task for name, task in tasks.items() if task.metrics}
        states = {
            name: prepared.state
            for task in tasks.values()
            for name, prepared in task.metrics.items()
            if prepared.state is not None
        }
        return tasks, ConditionsPlan(tuple(task.plan for task in tasks.values()), states, failures)

    @property
    def _shards(self) -> list[Shard]:
        return [unit.shard for unit in self.units]

    def _run_task(
        self,
        task: TaskPlan,
        prepared: PreparedTask | None,
        plan: ConditionsPlan,
        results: Mapping[str, MetricResult],
    ) -> dict[str, Metric[Any]]:
        """Return the metrics of a task after their conditions were run on all its shards."""
        collector = ShardCollector(self._factory, task.names, results, plan.states)
        missing = [unit for unit in task.units if not self._store.has(unit)]
        if missing:
            n_tokens = task.n_forwards * sum(unit.shard.n_tokens for unit in missing)
            self._observer.measuring(f"{self._label}, conditions", n_tokens)
        for unit in task.units:
            parts = self._store.load(unit)
            if parts is None or not parts.keys() >= set(collector.working):
                assert prepared is not None
                parts = self.run_conditions(prepared, unit.shard, collector.working)
                self._store.save(unit, parts)
            collector.add(parts)
        return collector.finish()

    def run_conditions(self, task: PreparedTask, shard: Shard, names: Iterable[str]) -> dict[str, ShardPart]:
        """Run the conditions of these metrics on one shard."""
        active_metrics = []
        for name in names:
            prepared = task.metrics[name]
            prepared.reset()
            active_metrics.append(ActiveMetric(prepared.metric, self._factory.empty_result(name)))
        run_conditions(self._model.lens, task.texts, active_metrics, shard.batches, self._observer)
        return {
            active.metric.name: self._part(active, lambda metric: task.metrics[metric.name].part())
            for active in active_metrics
        }


def _require_same_plan(plan: ConditionsPlan, new_plan: ConditionsPlan) -> None:
    """Raise InputError if conditions that were chosen again differ from those of the finished shards."""
    for name, state in plan.states.items():
        if not same_value(state, new_plan.states.get(name)):
            raise InputError(
                f"metric {name!r} chose other conditions than in the finished shards, from the same observations; "
                "start over with --fresh, and draw random numbers from a generator made with self.seed"
            )
