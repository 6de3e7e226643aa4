"""What a run will take: texts, shards, forwards, memory and time, from one batch that is measured in full."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, TextFields
from phaselens.errors import require_flag, require_kind
from phaselens.lens.memory import PeakMemory, available_memory
from phaselens.plugin import CausalMetric
from phaselens.runs.batches import BatchTooLarge
from phaselens.runs.document_windows import cut_documents
from phaselens.runs.engine import LoadedModel
from phaselens.runs.layer_pass import group_by_pass
from phaselens.runs.memory_limits import fitting_batch_tokens
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.model_session import ModelSession
from phaselens.runs.observer import Observer
from phaselens.runs.prepared_tasks import PreparedTask
from phaselens.runs.result import MetricResult
from phaselens.runs.run_inputs import RunInputs, Source, checked_observer
from phaselens.runs.run_options import DEFAULT_MODELS, MetricRequests, RunOptions, SelectedMetric
from phaselens.runs.shard_work import ShardWork
from phaselens.runs.shards import Shard, cut_shards

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

#: A probe that takes less is repeated, because the first forward of a model is slower than others.
_SHORT_PROBE_SECONDS = 2.0
#: A run of fewer batches is not probed: one batch more would be a part of it that one notices.
_FEWEST_BATCHES = 32
#: A run that takes longer is announced.
_LONG_SECONDS = 300.0


@dataclass(frozen=True)
class PlannedPass:
    """Forwards of one kind.

    Attributes:
        name: what is forwarded: `unedited model`, or conditions or sequences of metrics.
        metrics: the metrics that take part.
        n_texts: texts, prompts or sequences.
        n_tokens: their tokens.
        n_shards: their shards.
        n_forwards: forwards per condition: one per batch.
        n_conditions: how often each batch is forwarded, the baseline of conditions included. Conditions resume at their
            lowest edited layer.
        seconds: the estimated time, from one batch.
    """

    name: str
    metrics: tuple[str, ...]
    n_texts: int
    n_tokens: int
    n_shards: int
    n_forwards: int
    n_conditions: int
    seconds: float


@dataclass(frozen=True)
class ModelPlan:
    """What one model of a run will take.

    `memory` is the peak in bytes on `device`, measured with the largest batch, and `available` what the process can
    have there; `failures` names the metrics that failed on that batch.
    """

    label: str
    device: str
    n_texts: int
    n_cut: int
    n_tokens: int
    n_shards: int
    load_seconds: float
    probe_tokens: int
    memory: int
    available: int
    passes: tuple[PlannedPass, ...]
    failures: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The estimated time of loading and of all passes."""
        return self.load_seconds + sum(planned.seconds for planned in self.passes)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        passes = [vars(planned) | {"metrics": list(planned.metrics)} for planned in self.passes]
        return vars(self) | {"passes": passes, "failures": list(self.failures), "seconds": self.seconds}


@dataclass(frozen=True)
class RunPlan:
    """What a run will take, model by model; `notes` are about the texts."""

    models: tuple[ModelPlan, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The estimated time of all models, one after the other."""
        return sum(model.seconds for model in self.models)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "models": [model.as_dict() for model in self.models],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def plan(
    models: Source | HookedTransformer | Iterable[Source | HookedTransformer] = DEFAULT_MODELS,
    *,
    metrics: MetricRequests,
    texts: Source | Iterable[str | Text] = "bundled",
    text_fields: TextFields | None = None,
    options: RunOptions | None = None,
    automatic_batches: bool = False,
    observer: Observer | None = None,
) -> RunPlan:
    """Return what a run with these arguments will take; nothing but one batch per model and pass is measured.

    Args:
        models, metrics, texts, text_fields: as in `phaselens.run`.
        options: the options of the run.
        automatic_batches: take `batch_tokens` from free memory, as `batch_tokens="auto"` of `phaselens.run`.
        observer: learns which model is loaded.

    Raises:
        InputError, ModelError: as `phaselens.run`; a batch that does not fit into memory is an InputError.

    >>> from phaselens.runs import plan
    >>> planned = plan("rope", metrics=["sinks"], texts=["Call me Ishmael.", "It was a dark night."])
    >>> planned.models[0].n_texts, planned.models[0].passes[0].n_forwards
    (2, 1)
    """
    observer = checked_observer(observer)
    options = RunOptions() if options is None else options
    require_kind("options", options, RunOptions, "such as RunOptions(max_tokens=256)")
    inputs = RunInputs.read(models, metrics, texts, text_fields, options)
    sessions = inputs.sessions(options, observer)
    corpus = cut_documents(inputs.corpus, sessions, options)
    require_flag("automatic_batches", automatic_batches)
    if automatic_batches:
        options = replace(options, batch_tokens=fitting_batch_tokens(sessions[0].lens))
        corpus.notes.append(f"batches of {options.batch_tokens:,} tokens, by free memory")
    plans = []
    for session in sessions:
        plans.append(plan_model(session, inputs.metrics, options))
        session.release()
    return RunPlan(tuple(plans), tuple(corpus.notes))


def plan_model(session: ModelSession, metrics: Sequence[SelectedMetric], options: RunOptions) -> ModelPlan:
    """Return what one model will take, from its largest batch."""
    start = time.monotonic()
    lens, texts = session.lens, session.tokenized_texts
    load_seconds = time.monotonic() - start
    sizes = (options.shard_tokens, options.batch_tokens)
    shards = cut_shards(texts, *sizes)
    batches = [batch for shard in shards for batch in shard.batches]
    members = [
        texts[index] for index in max(batches, key=lambda batch: len(batch) * len(texts[batch[0]].ids))
    ]
    probe = Shard(
        0, tuple(range(len(members))), (tuple(range(len(members))),), sum(len(t.ids) for t in members)
    )
    n_tokens = sum(shard.n_tokens for shard in shards)
    factory = MetricFactory(lens.info, metrics, seed=options.seed, bos=session.bos)
    work = ShardWork(LoadedModel(lens, members), factory, [probe], sizes, observer=Observer())
    results = work.empty_results()
    scale = _ProbeScale(probe, len(texts), n_tokens, len(shards), len(batches))
    with PeakMemory(lens.device) as peak:
        planned = tuple(_passes(work, results, scale))
    failures = [f"{name}: {failure}" for name, result in results.items() for failure in result.failures]
    return ModelPlan(
        session.label,
        str(lens.device),
        len(texts),
        sum(text.cut for text in texts),
        n_tokens,
        len(shards),
        load_seconds,
        probe.n_tokens,
        peak.n_bytes,
        available_memory(lens.device),
        planned,
        tuple(failures),
    )


def announce_plan(
    session: ModelSession, metrics: Sequence[SelectedMetric], options: RunOptions, n_batches: int
) -> None:
    """Report the plan of a model to the session's observer, if it will take long; short runs are not probed."""
    observer = session.observer
    if not getattr(observer, "wants_plans", False) or n_batches < _FEWEST_BATCHES:
        return
    try:
        planned = plan_model(session, metrics, options)
    except BatchTooLarge:  # the run itself will say so
        return
    if planned.seconds >= _LONG_SECONDS:
        observer.planned(planned)


@dataclass(frozen=True)
class _ProbeScale:
    """The batch that is measured, and how many texts, tokens, shards and batches the run has."""

    probe: Shard
    n_texts: int
    n_tokens: int
    n_shards: int
    n_batches: int

    def planned(self, name: str, metrics: Iterable[str], n_conditions: int, seconds: float) -> PlannedPass:
        """Return the pass over the run's texts, of which the probe took `seconds`."""
        estimate = seconds * self.n_tokens / self.probe.n_tokens
        return PlannedPass(
            name,
            tuple(metrics),
            self.n_texts,
            self.n_tokens,
            self.n_shards,
            self.n_batches,
            n_conditions,
            estimate,
        )


def _passes(
    work: ShardWork, results: Mapping[str, MetricResult], scale: _ProbeScale
) -> Iterator[PlannedPass]:
    """Measure the probe in each pass of the run, and yield what the pass will take."""
    active_metrics = work.construct(results)
    with_values = {name: active for name, active in active_metrics.items() if active.has_values}
    own_sequences = {name for name, active in with_values.items() if active.metric.reads_own_sequences()}
    observed = [name for name in with_values if name not in own_sequences]
    metrics = {name: with_values[name].metric for name in observed}
    readers = [name for name in observed if with_values[name].points]
    if readers:
        n_passes = len(group_by_pass([with_values[name] for name in readers]))
        instances = [with_values[name] for name in observed]
        seconds = _seconds(lambda: work.observe(scale.probe, instances))
        if seconds < _SHORT_PROBE_SECONDS:
            again = [work.new(name) for name in observed]
            seconds = _seconds(lambda: work.observe(scale.probe, again))
        yield scale.planned("unedited model", readers, n_passes, seconds)
    for name in own_sequences:
        phase = work.tasks.prepare_sequences([with_values[name]])
        for task in phase.tasks.values():
            seconds, share = _probe_task(work, task)
            # Sequences are made from the texts, of which only the probe's were given.
            yield scale.planned(f"sequences of {name}", [name], 1, seconds / share)
        metrics[name] = with_values[name].metric
        results[name].failures.extend(phase.failures.values())
    for active in with_values.values():
        results[active.metric.name].failures.extend(active.result.failures)
    causal = work.causal_metrics(metrics, results)
    if causal:
        yield from _condition_passes(work, causal, results, scale)


def _condition_passes(
    work: ShardWork,
    causal: Mapping[str, CausalMetric[Any]],
    results: Mapping[str, MetricResult],
    scale: _ProbeScale,
) -> Iterator[PlannedPass]:
    phase = work.tasks.prepare_conditions(causal)
    for name, failure in phase.failures.items():
        results[name].failures.append(failure)
    for texts_of, task in phase.tasks.items():
        if not task.metrics:
            continue
        n_conditions = task.plan.n_forwards
        seconds, share = _probe_task(work, task)
        if not texts_of:
            yield scale.planned("conditions", task.metrics, n_conditions, seconds)
        else:
            n_texts = sum(len(shard.members) for shard in task.shards)
            n_batches = sum(len(shard.batches) for shard in task.shards)
            n_tokens = sum(shard.n_tokens for shard in task.shards)
            yield PlannedPass(
                f"prompts of {texts_of}", tuple(task.metrics), n_texts, n_tokens, len(task.shards), n_batches,
                n_conditions, seconds / share,
            )  # fmt: skip


def _probe_task(work: ShardWork, task: PreparedTask) -> tuple[float, float]:
    """Run the metrics of a task on one batch; return the seconds, and the batch's share of the task's tokens."""
    n_tokens = sum(shard.n_tokens for shard in task.shards)
    batch = task.shards[0].batches[0] if task.shards else ()
    if not batch:
        return 0.0, 1.0
    n_batch = sum(len(task.tokenized_texts[index].ids) for index in batch)
    probe = Shard(0, tuple(batch), (tuple(batch),), n_batch)
    return _seconds(lambda: work.run_shard(task, probe, list(task.metrics))), n_batch / n_tokens


def _seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.monotonic()
    run()
    return time.monotonic() - start
