"""What metrics choose before a phase, as tasks: sequences of their own, or conditions on texts and on prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from phaselens.data import TokenizedText
from phaselens.plugin import CausalMetric
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.condition_passes import ConditionsTask, prepare, run_conditions
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.observer import Observer
from phaselens.runs.prepared_tasks import PreparedMetric, PreparedPhase, PreparedTask
from phaselens.runs.sequences import SequencePlan, plan_all_sequences, read_sequences
from phaselens.runs.shard_store import CONDITIONS, OBSERVATIONS
from phaselens.runs.shards import Shard, cut_shards

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


class PhaseTasks:
    """Makes the tasks of a model's phases.

    Args:
        model: the model and the texts.
        factory: creates the metrics.
        shards: the shards of the texts.
        sizes: tokens in a shard and in a batch, for the prompts of metrics.
        observer: receives the progress.
        keeps_states: whether the results of shards are stored, so that each metric's state before them is needed.
    """

    def __init__(
        self,
        model: MeasuredModel,
        factory: MetricFactory,
        shards: Sequence[Shard],
        sizes: tuple[int, int],
        *,
        observer: Observer,
        keeps_states: bool,
    ) -> None:
        self._model = model
        self._factory = factory
        self._shards = shards
        self._sizes = sizes
        self._observer = observer
        self._keeps_states = keeps_states

    def prepare_sequences(self, active_metrics: Iterable[ActiveMetric]) -> PreparedPhase:
        """Ask metrics for the sequences that they read, which they make from all texts."""
        lens, texts = self._model.lens, self._model.tokenized_texts
        phase = PreparedPhase({}, {})
        for active in active_metrics:
            name = active.metric.name
            plans = plan_all_sequences(lens, [active], texts, range(len(texts)), self._sizes[1])
            with guarded(active.result, self._factory.model.label, "state"):
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
        keeps_state = self._keeps_states or len(shards) > 1
        metrics = {name: PreparedMetric.of(active, keeps_state=keeps_state)}
        return PreparedTask(OBSERVATIONS, plan.tokenized, shards, run, name, metrics)

    def prepare_conditions(self, observed: Mapping[str, CausalMetric[Any]]) -> PreparedPhase:
        """Choose the conditions of causal metrics that have observed all texts."""
        phase = PreparedPhase(
            {"": self._conditions_task(ConditionsTask.of_texts(self._model.tokenized_texts))}, {}
        )
        for name, metric in observed.items():
            result = self._factory.empty_result(name)
            with guarded(result, self._factory.model.label, "conditions"):
                prompts = prepare(self._model.lens, metric)
                chosen = [phase.tasks[""]] if prompts is None or metric.also_on_texts else []
                if prompts or (prompts is not None and self._keeps_states):
                    phase.tasks[name] = self._conditions_task(ConditionsTask.of_prompts(prompts), name)
                    chosen.append(phase.tasks[name])
                n_shards = sum(len(task.shards) for task in chosen)
                keeps_state = self._keeps_states or n_shards > 1
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

        shards = cut_shards(texts.tokenized_texts, *self._sizes) if prompts_of else self._shards
        return PreparedTask(CONDITIONS, texts.tokenized_texts, shards, run, prompts_of)
