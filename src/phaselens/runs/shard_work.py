"""The work on the shards of one model: observe the unedited model, then run the conditions that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from phaselens.data import TokenizedText
from phaselens.plugin import CausalMetric, Metric
from phaselens.plugin.state_codec import encode_state
from phaselens.plugin.states import changes
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch
from phaselens.runs.condition_passes import ConditionsTask, prepare, run_conditions
from phaselens.runs.layer_pass import activate, forward, group_by_pass
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.observer import Observer
from phaselens.runs.prepared_tasks import PreparedMetric, PreparedPhase, PreparedTask, require_same_plan
from phaselens.runs.result import MetricResult
from phaselens.runs.sequences import SequencePlan, plan_all_sequences, read_sequences
from phaselens.runs.shard_parts import ShardCollector, ShardPart
from phaselens.runs.shard_store import CONDITIONS, OBSERVATIONS, ShardStore, TaskPlan, WorkUnit
from phaselens.runs.shards import Shard, cut_shards, digest_of

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
        without_values: Collection[str] = (),
        unused: Mapping[str, ActiveMetric] | None = None,
    ) -> dict[str, Metric[Any]]:
        """Return an instance of each metric that has measured all texts; record the failures of others.

        Args:
            names: the metrics.
            results: receives the failures.
            observes: whether any metric reads the unedited model.
            without_values: metrics whose hook points the model lacks.
            unused: instances that were made already; the first shard that is observed takes them.
        """
        names = list(names)
        unused = dict(unused or {})
        metrics = {
            name: unused[name].metric if name in unused else self._factory.new(name)
            for name in without_values
        }
        measured = [name for name in names if name not in metrics]
        own_sequences = self._read_all_sequences(measured, results, unused)
        metrics |= own_sequences
        on_texts = [
            name for name in measured if name not in own_sequences and not self._has_failed(name, results)
        ]
        if observes and on_texts:
            metrics |= self._observe_all(on_texts, results, unused)
        else:
            metrics |= {
                name: unused[name].metric if name in unused else self._factory.new(name) for name in on_texts
            }
        with_values = {name: metric for name, metric in metrics.items() if name not in without_values}
        metrics |= self._run_all_conditions(with_values, results)
        return {name: metrics[name] for name in names if not self._has_failed(name, results)}

    def _has_failed(self, name: str, results: Mapping[str, MetricResult]) -> bool:
        return any(failure.model == self._label for failure in results[name].failures)

    def _read_all_sequences(
        self, names: Sequence[str], results: Mapping[str, MetricResult], unused: Mapping[str, ActiveMetric]
    ) -> dict[str, Metric[Any]]:
        """Return the metrics that read sequences of their own, after they have read them."""
        candidates = [name for name in names if self._factory.selected[name].metric.reads_own_sequences()]
        if not candidates:
            return {}
        basis = digest_of([[unit.key, unit.shard.members] for unit in self.units])

        def prepare_sequences() -> PreparedPhase:
            return self.prepare_sequences([unused.get(name) or self.new(name) for name in candidates])

        return self._run_phase(OBSERVATIONS, basis, prepare_sequences, results)

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
        observed = {
            name: metric
            for name, metric in metrics.items()
            if isinstance(metric, CausalMetric) and not self._has_failed(name, results)
        }
        if not observed:
            return {}
        basis = ""
        if self._store.keeps:
            basis = digest_of(
                [[name, encode_state(metric.state()).digest] for name, metric in observed.items()]
            )
        return self._run_phase(CONDITIONS, basis, lambda: self.prepare_conditions(observed), results)

    def _run_phase(
        self,
        phase: str,
        basis: str,
        prepare_phase: Callable[[], PreparedPhase],
        results: Mapping[str, MetricResult],
    ) -> dict[str, Metric[Any]]:
        """Run all tasks of a phase, and return their metrics; prepare it only if a part is not stored.

        `basis` is a digest of what the phase follows from.
        """
        plan = self._store.load_plan(phase, basis)
        tasks: dict[str, PreparedTask] = {}
        if plan is None or not all(self._store.has(unit) for task in plan.tasks for unit in task.units):
            prepared = prepare_phase()
            tasks, new_plan = prepared.tasks, prepared.plan
            if plan is not None:
                require_same_plan(plan, new_plan)
            self._store.save_plan(phase, new_plan)
            plan = new_plan
        for name, failure in plan.failures.items():
            results[name].failures.append(failure)
        names = dict.fromkeys(name for task in plan.tasks for name in task.names)
        collector = ShardCollector(self._factory, names, results, plan.states)
        for task in plan.tasks:
            self._run_task(task, tasks.get(task.texts_of), collector)
        return collector.finish()

    def prepare_sequences(self, active_metrics: Iterable[ActiveMetric]) -> PreparedPhase:
        """Ask metrics for the sequences that they read, which they make from all texts."""
        lens, texts = self._model.lens, self._model.tokenized_texts
        phase = PreparedPhase({}, {})
        for active in active_metrics:
            name = active.metric.name
            plans = plan_all_sequences(lens, [active], texts, range(len(texts)), self._sizes[1])
            with guarded(active.result, self._label, "state"):
                for plan in plans.values():
                    phase.tasks[name] = self._sequences_task(active, plan)
            if active.result.failures:
                phase.failures[name] = active.result.failures[0]
                phase.tasks.pop(name, None)
        return phase

    def _sequences_task(self, active: ActiveMetric, plan: SequencePlan) -> PreparedTask:
        def run(active_metrics: Sequence[ActiveMetric], shard: Shard) -> None:
            for reader in active_metrics:
                read_sequences(self._model.lens, reader, plan, shard.batches, self._observer)

        name, shards = active.metric.name, plan.shards(self._sizes[0])
        keeps_state = self._store.keeps or len(shards) > 1
        metrics = {name: PreparedMetric.of(active, keeps_state=keeps_state)}
        return PreparedTask(OBSERVATIONS, plan.tokenized, shards, run, name, metrics)

    def prepare_conditions(self, observed: Mapping[str, CausalMetric[Any]]) -> PreparedPhase:
        """Choose the conditions of causal metrics that have observed all texts."""
        phase = PreparedPhase(
            {"": self._conditions_task(ConditionsTask.of_texts(self._model.tokenized_texts))}, {}
        )
        for name, metric in observed.items():
            result = self._factory.empty_result(name)
            with guarded(result, self._label, "conditions"):
                prompts = prepare(self._model.lens, metric)
                chosen = [phase.tasks[""]] if prompts is None or metric.also_on_texts else []
                if prompts or (prompts is not None and self._store.keeps):
                    phase.tasks[name] = self._conditions_task(ConditionsTask.of_prompts(prompts), name)
                    chosen.append(phase.tasks[name])
                n_shards = sum(len(task.shards) for task in chosen)
                keeps_state = self._store.keeps or n_shards > 1
                for task in chosen:  # one after the other, with the same instance
                    task.metrics[name] = PreparedMetric.of(
                        ActiveMetric(metric, result), keeps_state=keeps_state
                    )
            if result.failures:
                phase.failures[name] = result.failures[0]
        return phase

    def _conditions_task(self, texts: ConditionsTask, prompts_of: str = "") -> PreparedTask:
        def run(active_metrics: Sequence[ActiveMetric], shard: Shard) -> None:
            run_conditions(self._model.lens, texts, active_metrics, shard.batches, self._observer)

        shards = [unit.shard for unit in self.units]
        if prompts_of:
            shards = cut_shards(texts.tokenized_texts, *self._sizes)
        return PreparedTask(CONDITIONS, texts.tokenized_texts, shards, run, prompts_of)

    def _run_task(self, task: TaskPlan, prepared: PreparedTask | None, collector: ShardCollector) -> None:
        """Run the metrics of a task on all its shards, and add the parts to the collector."""
        missing = [unit for unit in task.units if not self._store.has(unit)]
        if missing:
            n_tokens = task.n_forwards * sum(unit.shard.n_tokens for unit in missing)
            suffix = ", conditions" if task.phase == CONDITIONS else ""
            self._observer.measuring(f"{self._label}{suffix}", n_tokens)
        for unit in task.units:
            parts = self._store.load(unit)
            working = [name for name in task.names if name in collector.working]
            if parts is None or not parts.keys() >= set(working):
                assert prepared is not None
                parts = self.run_shard(prepared, unit.shard, working)
                self._store.save(unit, parts)
            collector.add(parts)

    def run_shard(self, task: PreparedTask, shard: Shard, names: Iterable[str]) -> dict[str, ShardPart]:
        """Run these metrics of a task on one shard."""
        active_metrics = []
        for name in names:
            prepared = task.metrics[name]
            prepared.reset()
            active_metrics.append(replace(prepared.active, result=self._factory.empty_result(name)))
        task.run(active_metrics, shard)
        return {
            active.metric.name: self._part(active, lambda metric: task.metrics[metric.name].part())
            for active in active_metrics
        }
