"""The work on the shards of one model: observe the unedited model, then run the conditions that follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from phaselens.plugin import CausalMetric, Metric
from phaselens.plugin.state_codec import encode_state
from phaselens.plugin.states import changes
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch
from phaselens.runs.crew import Crew, UnitJob
from phaselens.runs.layer_pass import activate, forward, group_by_pass
from phaselens.runs.memory_limits import BatchHalving
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.observer import Observer
from phaselens.runs.phase_tasks import MeasuredModel, PhaseTasks
from phaselens.runs.prepared_tasks import Phase, PreparedAtNeed, PreparedTask
from phaselens.runs.result import MetricResult
from phaselens.runs.shard_parts import ShardCollector, ShardPart
from phaselens.runs.shard_store import CONDITIONS, OBSERVATIONS, ShardStore, TaskPlan, WorkUnit
from phaselens.runs.shards import Shard, digest_of


class ShardWork:
    """The work on one model.

    Args:
        model: the model and the texts; they are used only where a shard is not stored.
        factory: creates the metrics.
        shards: the shards of the texts.
        sizes: tokens in a shard and in a batch, for the prompts of metrics.
        observer: receives the progress.
        store: keeps the results of shards.
        keys: digests of the content of the shards, for the store.
        crew: computes the shards that are not stored, or leaves them to this object.
        n_passes: how often each text is read; None to find out with the model.
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
        crew: Crew | None = None,
        n_passes: int | None = None,
    ) -> None:
        self._model = model
        self._factory = factory
        self._observer = observer
        self._store = ShardStore() if store is None else store
        self._crew = Crew() if crew is None else crew
        self._n_passes = n_passes
        self._halving = BatchHalving()
        #: Notes on what a reader of the results should know.
        self.notes: list[str] = []
        self.tasks = PhaseTasks(
            model, factory, shards, sizes, observer=observer, keeps_states=self._store.keeps
        )
        self.units = [
            WorkUnit(OBSERVATIONS, shard, key="" if keys is None else keys[shard.index]) for shard in shards
        ]

    @property
    def label(self) -> str:
        """The model's label."""
        return self._factory.model.label

    def construct(self, results: Mapping[str, MetricResult]) -> dict[str, ActiveMetric]:
        """Return an instance of each metric that can be made for this model; record why others cannot."""
        active_metrics = {}
        for name in self._factory.selected:
            with guarded(results[name], self.label, "construct"):
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
        metrics = self.observe_all(
            names, results, observes=observes, without_values=without_values, unused=unused
        )
        with_values = {name: metric for name, metric in metrics.items() if name not in without_values}
        metrics |= self._run_all_conditions(with_values, results)
        return {name: metrics[name] for name in names if not self._has_failed(name, results)}

    def observe_all(
        self,
        names: Sequence[str],
        results: Mapping[str, MetricResult],
        *,
        observes: bool,
        without_values: Collection[str] = (),
        unused: Mapping[str, ActiveMetric] | None = None,
    ) -> dict[str, Metric[Any]]:
        """Return an instance of each metric that has observed the unedited model, before any conditions."""
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
            return metrics | self._observe_texts(on_texts, results, unused)
        return metrics | {
            name: unused[name].metric if name in unused else self._factory.new(name) for name in on_texts
        }

    def _has_failed(self, name: str, results: Mapping[str, MetricResult]) -> bool:
        return any(failure.model == self.label for failure in results[name].failures)

    def _read_all_sequences(
        self, names: Sequence[str], results: Mapping[str, MetricResult], unused: Mapping[str, ActiveMetric]
    ) -> dict[str, Metric[Any]]:
        """Return the metrics that read sequences of their own, after they have read them."""
        phase = self.sequences_phase(names, unused)
        return {} if phase is None else self._run_phase(phase, results)

    def sequences_phase(
        self, names: Iterable[str], unused: Mapping[str, ActiveMetric] | None = None
    ) -> Phase | None:
        """Return the phase in which metrics read sequences of their own; None if none of `names` has any."""
        readers = [name for name in names if self._factory.selected[name].metric.reads_own_sequences()]
        if not readers:
            return None
        made = unused or {}
        return Phase(
            OBSERVATIONS,
            digest_of([[unit.key, unit.shard.members] for unit in self.units]),
            readers,
            lambda: self.tasks.prepare_sequences([made.get(name) or self.new(name) for name in readers]),
        )

    def _observe_texts(
        self, names: Sequence[str], results: Mapping[str, MetricResult], unused: dict[str, ActiveMetric]
    ) -> dict[str, Metric[Any]]:
        """Return the metrics after they have observed the texts of all shards."""
        collector = ShardCollector(self._factory, names, results)
        self._compute_missing(
            self.units,
            names,
            lambda unit: self.observe_unit(unit, names),
            lambda: self._count_passes(names, unused),
        )
        for unit in self.units:
            if unit.name in self._crew.lost:
                continue
            parts = self._store.load(unit)
            if parts is None or not parts.keys() >= set(collector.working):
                parts = self.observe_unit(unit, collector.working, unused)
            collector.add(parts)
        self._note_halving(collector.n_halved, len(self.units), OBSERVATIONS)
        return collector.finish()

    def _count_passes(self, names: Sequence[str], unused: Mapping[str, ActiveMetric]) -> int:
        """Return how often each text is read; a process that has not loaded the model takes it from the record."""
        if self._n_passes is not None:
            return self._n_passes
        return len(group_by_pass([unused.get(name) or self.new(name) for name in names]))

    def _compute_missing(
        self,
        units: Sequence[WorkUnit],
        names: Sequence[str],
        compute: Callable[[WorkUnit], object],
        count_forwards: Callable[[], int],
    ) -> None:
        """Report how many tokens are to be read, and have the crew compute the units that are not stored."""
        missing = [unit for unit in units if unit.name not in self._crew.lost and not self._store.has(unit)]
        if not missing:
            return
        label = f"{self.label}, conditions" if missing[0].phase == CONDITIONS else self.label
        n_tokens = sum(unit.shard.n_tokens for unit in self._crew.select(missing))
        self._observer.measuring(label, count_forwards() * n_tokens)
        self._crew.compute(UnitJob(missing[0].phase, names, missing, compute, self._store.exists))

    def observe_unit(
        self, unit: WorkUnit, names: Iterable[str], unused: dict[str, ActiveMetric] | None = None
    ) -> dict[str, ShardPart]:
        """Observe one shard of the run's texts with new instances, or with `unused` ones, and store the result."""
        unused = {} if unused is None else unused
        start = time.monotonic()
        instances = [unused.pop(name) if name in unused else self.new(name) for name in names]
        parts = self.observe(unit.shard, instances)
        self._store.save(unit, parts, time.monotonic() - start)
        return parts

    def observe(self, shard: Shard, active_metrics: Sequence[ActiveMetric]) -> dict[str, ShardPart]:
        """Measure the unedited model on one shard with new instances of metrics."""
        instances = list(active_metrics)

        def renew() -> bool:
            instances[:] = [self.new(active.metric.name) for active in instances]
            return True

        is_halved = self._halving.run(shard, lambda fitting: self._read(fitting, instances), renew)
        return {active.metric.name: self._part(active, self._observed, is_halved) for active in instances}

    def _read(self, shard: Shard, active_metrics: Sequence[ActiveMetric]) -> None:
        lens, texts = self._model.lens, self._model.tokenized_texts
        for sink_position, members in group_by_pass(active_metrics).items():
            for indices in shard.batches:
                forward(lens, make_batch(lens, texts, indices), members, sink_position, self._observer)
                self._observer.advance(sum(len(texts[index].ids) for index in indices))

    def _observed(self, metric: Metric[Any]) -> ShardPart:
        if not self._store.keeps:
            return ShardPart(metric)
        return ShardPart(changed=changes(metric.state(), self._factory.empty_state(metric.name)))

    def _part(
        self, active: ActiveMetric, collected: Callable[[Any], ShardPart], is_halved: bool
    ) -> ShardPart:
        """Return what a metric collected in a shard, or its failure."""
        part = ShardPart()
        if active.works:
            with guarded(active.result, self.label, "state"):
                part = collected(active.metric)
        for failure in active.result.failures[:1]:
            part = ShardPart(failure=failure)
        return replace(part, is_halved=True) if is_halved else part

    def _run_all_conditions(
        self, metrics: Mapping[str, Metric[Any]], results: Mapping[str, MetricResult]
    ) -> dict[str, Metric[Any]]:
        """Return the causal metrics after their conditions were run on all shards."""
        observed = self.causal_metrics(metrics, results)
        if not observed or not self._crew.goes_on_to_conditions():
            return {}
        return self._run_phase(self.conditions_phase(observed), results)

    def causal_metrics(
        self, metrics: Mapping[str, Metric[Any]], results: Mapping[str, MetricResult]
    ) -> dict[str, CausalMetric[Any]]:
        """Return the causal ones among metrics that have not failed."""
        return {
            name: metric
            for name, metric in metrics.items()
            if isinstance(metric, CausalMetric) and not self._has_failed(name, results)
        }

    def empty_results(self) -> dict[str, MetricResult]:
        """Return results without tables, which receive the failures of metrics."""
        return {name: self._factory.empty_result(name) for name in self._factory.selected}

    def conditions_phase(self, observed: Mapping[str, CausalMetric[Any]]) -> Phase:
        """Return the phase in which causal metrics, which have observed all texts, run their conditions."""
        basis = ""
        if self._store.keeps:
            basis = digest_of(
                [[name, encode_state(metric.state()).digest] for name, metric in observed.items()]
            )
        return Phase(CONDITIONS, basis, list(observed), lambda: self.tasks.prepare_conditions(observed))

    def _run_phase(self, phase: Phase, results: Mapping[str, MetricResult]) -> dict[str, Metric[Any]]:
        """Run all tasks of a phase, and return their metrics; prepare it only if a part is not stored."""
        if self._crew.makes_plans and self._store.load_plan(phase.name, phase.basis) is None:
            self._crew.make_plan(phase.name, phase.names)
        prepared = PreparedAtNeed(phase, self._store)
        plan = prepared.plan
        for name, failure in plan.failures.items():
            results[name].failures.append(failure)
        merged = dict.fromkeys(name for task in plan.tasks for name in task.names)
        collector = ShardCollector(self._factory, merged, results, plan.states)
        for task in plan.tasks:
            self._run_task(task, prepared, collector)
        return collector.finish()

    def _run_task(self, task: TaskPlan, prepared: PreparedAtNeed, collector: ShardCollector) -> None:
        """Run the metrics of a task on all its shards, and add the parts to the collector."""
        n_halved = collector.n_halved
        self._crew.leave_out(unit for unit in task.units if self._lacks_observations(unit))
        self._compute_missing(
            task.units,
            task.names,
            lambda unit: self.run_unit(prepared.task(task.texts_of), unit, task.names),
            lambda: task.n_forwards,
        )
        for unit in task.units:
            if unit.name in self._crew.lost:
                continue
            parts = self._store.load(unit)
            working = [name for name in task.names if name in collector.working]
            if parts is None or not parts.keys() >= set(working):
                parts = self.run_unit(prepared.task(task.texts_of), unit, working)
            collector.add(parts)
        self._note_halving(collector.n_halved - n_halved, len(task.units), task.phase)

    def _lacks_observations(self, unit: WorkUnit) -> bool:
        """Return whether a unit has texts that were left out of the observations."""
        return not unit.texts_of and (OBSERVATIONS, "", unit.shard.index) in self._crew.lost

    def run_unit(self, task: PreparedTask, unit: WorkUnit, names: Iterable[str]) -> dict[str, ShardPart]:
        """Run these metrics of a task on one shard, and store the result."""
        start = time.monotonic()
        parts = self.run_shard(task, unit.shard, names)
        self._store.save(unit, parts, time.monotonic() - start)
        return parts

    def run_shard(self, task: PreparedTask, shard: Shard, names: Iterable[str]) -> dict[str, ShardPart]:
        """Run these metrics of a task on one shard."""
        members = [task.metrics[name] for name in names]
        active_metrics = []
        for prepared in members:
            prepared.reset()
            result = self._factory.empty_result(prepared.active.metric.name)
            active_metrics.append(replace(prepared.active, result=result))

        def renew() -> bool:
            for active in active_metrics:
                active.result.failures.clear()
            return all(prepared.begin_anew() for prepared in members)

        is_halved = False
        if task.phase == CONDITIONS:  # sequences that a metric compares stay in one batch
            is_halved = self._halving.run(shard, lambda fitting: task.run(active_metrics, fitting), renew)
        else:
            task.run(active_metrics, shard)
        return {
            active.metric.name: self._part(active, lambda metric: task.metrics[metric.name].part(), is_halved)
            for active in active_metrics
        }

    def _note_halving(self, n_halved: int, n_shards: int, phase: str) -> None:
        """Note that shards were read in smaller batches than the run's options say."""
        if n_halved:
            which = "1 shard was" if n_halved == 1 else f"{n_halved} shards were"
            of_phase = ", conditions" if phase == CONDITIONS else ""
            self.notes.append(
                f"{self.label}{of_phase}: memory ran out; {which} read in batches of half the size, of {n_shards}"
            )
