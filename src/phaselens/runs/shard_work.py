"""The work on the shards of one model: observe the unedited model, then run the conditions that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaselens.data import TokenizedText
from phaselens.plugin import CausalMetric, Condition, ConditionKey, Metric, NestedState
from phaselens.plugin.return_checks import require_definition
from phaselens.plugin.states import changes
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch
from phaselens.runs.condition_passes import ConditionsTask, prepare, run_conditions
from phaselens.runs.layer_pass import activate, forward, group_by_pass
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.observer import Observer
from phaselens.runs.result import MetricResult
from phaselens.runs.sequences import SequencePlan, plan_all_sequences, read_sequences
from phaselens.runs.shard_parts import ShardCollector, ShardPart
from phaselens.runs.shard_store import CONDITIONS, OBSERVATIONS, ShardStore, WorkUnit
from phaselens.runs.shards import Shard, cut_shards

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer


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
class ShardedTask:
    """Texts or prompts in shards, and the metrics whose conditions are run on them.

    `prompts_of` names the metric whose prompts they are; it is empty for the run's texts.
    """

    task: ConditionsTask
    shards: Sequence[Shard]
    prompts_of: str = ""
    metrics: dict[str, PreparedMetric] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens of all forwards, the baseline's included."""
        n_forwards = 1 + sum(len(prepared.conditions) for prepared in self.metrics.values())
        return n_forwards * sum(shard.n_tokens for shard in self.shards)


class ShardWork:
    """The work on one model.

    Args:
        lens: the model.
        tokenized_texts: the run's texts.
        factory: creates the metrics.
        shard_tokens: tokens in a shard.
        batch_tokens: tokens in a batch, pads included.
        observer: receives the progress.
        store: keeps the results of shards.
    """

    def __init__(
        self,
        lens: HookedTransformer,
        tokenized_texts: Sequence[TokenizedText],
        factory: MetricFactory,
        *,
        shard_tokens: int,
        batch_tokens: int,
        observer: Observer,
        store: ShardStore | None = None,
    ) -> None:
        self._lens = lens
        self._texts = tokenized_texts
        self._factory = factory
        self._sizes = (shard_tokens, batch_tokens)
        self._observer = observer
        self._store = ShardStore() if store is None else store
        self.shards = cut_shards(tokenized_texts, *self._sizes)
        #: Names of metrics whose hook points the model lacks.
        self.without_values: set[str] = set()

    @property
    def _label(self) -> str:
        return self._lens.info.label

    def measure(self, results: Mapping[str, MetricResult]) -> dict[str, Metric[Any]]:
        """Return an instance of each metric that has measured all texts; record the failures of others."""
        active_metrics = self._construct(results)
        self.without_values = {name for name, active in active_metrics.items() if not active.has_values}
        plans = self._plan_sequences(active_metrics, results)
        reading_texts = {
            name: active for name, active in active_metrics.items() if name not in plans and active.works
        }
        metrics = self._observe_all(reading_texts, results)
        for name, plan in plans.items():
            metrics |= self._observe_sequences(active_metrics[name], plan, results)
        tasks = self._prepare_all(metrics, results)
        #: Metrics whose conditions have run on the texts, and still run on their prompts.
        on_both: dict[str, Metric[Any]] = {}
        for task in tasks:
            self._observer.measuring(f"{self._label}, conditions", task.n_tokens)
            for name, metric in self._run_task(task, results).items():
                if name in on_both:
                    metric.merge(on_both[name])
                elif task.metrics[name].metric.also_on_texts:
                    on_both[name] = metric
                metrics[name] = metric
        return {name: metrics[name] for name in active_metrics if name in metrics}

    def _construct(self, results: Mapping[str, MetricResult]) -> dict[str, ActiveMetric]:
        """Return an instance of each metric that can be made for this model; record why others cannot."""
        active_metrics = {}
        for name, selected in self._factory.selected.items():
            with guarded(results[name], self._label, "construct"):
                # First, so that no metric is constructed from parameters that it cannot define.
                require_definition(selected.metric, selected.params)
                metric = self._factory.new(name)
                active_metrics[name] = activate(self._lens, metric, self._factory.empty_result(name))
        return active_metrics

    def _observe_all(
        self, active_metrics: Mapping[str, ActiveMetric], results: Mapping[str, MetricResult]
    ) -> dict[str, Metric[Any]]:
        """Return the metrics after they have observed all shards."""
        n_passes = len(group_by_pass(list(active_metrics.values())))
        if not n_passes:
            return {name: active.metric for name, active in active_metrics.items()}
        self._observer.measuring(self._label, n_passes * sum(shard.n_tokens for shard in self.shards))
        collector = ShardCollector(self._factory, active_metrics, results)
        unused = dict(active_metrics)  # the first shard that is observed needs no further instances
        for shard in self.shards:
            unit = WorkUnit(OBSERVATIONS, shard)
            parts = self._store.load(unit)
            if parts is None or not parts.keys() >= set(collector.working):
                instances = [
                    unused.pop(name) if name in unused else self._new(name) for name in collector.working
                ]
                parts = self.observe(shard, instances)
                self._store.save(unit, parts)
            collector.add(parts)
        return collector.finish()

    def _plan_sequences(
        self, active_metrics: Mapping[str, ActiveMetric], results: Mapping[str, MetricResult]
    ) -> dict[str, SequencePlan]:
        """Return the sequences of the metrics that read their own; they are made from all texts."""
        plans = plan_all_sequences(
            self._lens, active_metrics.values(), self._texts, range(len(self._texts)), self._sizes[1]
        )
        for name, active in active_metrics.items():
            results[name].failures.extend(active.result.failures)
        return plans

    def _observe_sequences(
        self, active: ActiveMetric, plan: SequencePlan, results: Mapping[str, MetricResult]
    ) -> dict[str, Metric[Any]]:
        """Return the metric after it has read all its sequences."""
        name = active.metric.name
        shards = plan.shards(self._sizes[0])
        self._observer.measuring(self._label, plan.n_tokens)
        collector = ShardCollector(self._factory, [name], results)
        unused: ActiveMetric | None = active
        for shard in shards:
            unit = WorkUnit(OBSERVATIONS, shard, name)
            parts = self._store.load(unit)
            if parts is None and collector.working:
                reader, unused = unused or self._new(name), None
                read_sequences(self._lens, reader, plan, shard.batches, self._observer)
                parts = {name: self._part(reader, self._observed)}
                self._store.save(unit, parts)
            if parts is not None:
                collector.add(parts)
        return collector.finish()

    def _new(self, name: str) -> ActiveMetric:
        return activate(self._lens, self._factory.new(name), self._factory.empty_result(name))

    def observe(self, shard: Shard, active_metrics: Sequence[ActiveMetric]) -> dict[str, ShardPart]:
        """Measure the unedited model on one shard with new instances of metrics."""
        for sink_position, members in group_by_pass(active_metrics).items():
            for indices in shard.batches:
                forward(self._lens, make_batch(self._lens, self._texts, indices), members, sink_position)
                self._observer.advance(sum(len(self._texts[index].ids) for index in indices))
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

    def _prepare_all(
        self, metrics: Mapping[str, Metric[Any]], results: Mapping[str, MetricResult]
    ) -> list[ShardedTask]:
        """Choose the conditions of the causal metrics, and return the texts and prompts to run them on."""
        on_texts = ShardedTask(ConditionsTask.of_texts(self._texts), self.shards)
        tasks = [on_texts]
        for name, metric in metrics.items():
            if not isinstance(metric, CausalMetric) or name in self.without_values:
                continue
            with guarded(results[name], self._label, "conditions"):
                prompts = prepare(self._lens, metric)
                chosen_tasks = [on_texts] if prompts is None or metric.also_on_texts else []
                if prompts:
                    own_texts = ConditionsTask.of_prompts(prompts)
                    shards = cut_shards(own_texts.tokenized_texts, *self._sizes)
                    tasks.append(ShardedTask(own_texts, shards, name))
                    chosen_tasks.append(tasks[-1])
                for task in chosen_tasks:
                    keeps_state = self._store.keeps or len(task.shards) > 1 or len(chosen_tasks) > 1
                    task.metrics[name] = PreparedMetric.of(metric, keeps_state=keeps_state)
        return [task for task in tasks if task.metrics]

    def _run_task(self, task: ShardedTask, results: Mapping[str, MetricResult]) -> dict[str, Metric[Any]]:
        """Return the metrics of a task after their conditions were run on all its shards."""
        states = {name: prepared.state for name, prepared in task.metrics.items()}
        collector = ShardCollector(self._factory, states, results, states)
        for shard in task.shards:
            unit = WorkUnit(CONDITIONS, shard, task.prompts_of)
            parts = self._store.load(unit)
            if parts is None or not parts.keys() >= set(collector.working):
                parts = self.run_conditions(task, shard, collector.working)
                self._store.save(unit, parts)
            collector.add(parts)
        return collector.finish()

    def run_conditions(self, task: ShardedTask, shard: Shard, names: Iterable[str]) -> dict[str, ShardPart]:
        """Run the conditions of these metrics on one shard."""
        active_metrics = []
        for name in names:
            prepared = task.metrics[name]
            prepared.reset()
            active_metrics.append(ActiveMetric(prepared.metric, self._factory.empty_result(name)))
        run_conditions(self._lens, task.task, active_metrics, shard.batches, self._observer)
        return {
            active.metric.name: self._part(active, lambda metric: task.metrics[metric.name].part())
            for active in active_metrics
        }
