"""Measure metrics on one model: observe each shard, choose conditions, run them on each shard, and make the tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.data import TokenizedText, pack
from phaselens.errors import InputError, MetricError, is_list_like, require_kind, require_wholes, short_form
from phaselens.lens.info import require_lens
from phaselens.plugin import CausalMetric, Metric, MetricWarning, Table
from phaselens.plugin.return_checks import require_definition
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch
from phaselens.runs.condition_passes import ConditionsTask, prepare, run_conditions
from phaselens.runs.layer_pass import activate, forward
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.model_tables import tables_of_metrics
from phaselens.runs.observer import Observer
from phaselens.runs.phase_tasks import MeasuredModel
from phaselens.runs.result import MetricResult
from phaselens.runs.run_options import SelectedMetric
from phaselens.runs.sequences import plan_all_sequences, read_sequences
from phaselens.runs.shard_work import ShardWork
from phaselens.runs.shards import DEFAULT_SHARD_TOKENS, cut_shards

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

#: Tokens in a batch of prompts that a metric is fed outside of a run.
_PROMPT_BATCH_TOKENS = 8192


def measure(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    selected_metrics: Sequence[SelectedMetric],
    results: Mapping[str, MetricResult],
    *,
    batch_tokens: int,
    seed: int,
    observer: Observer,
    bos: str | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
) -> tuple[dict[str, Mapping[str, Table]], list[MetricWarning]]:
    """Run all metrics on one model, and return their tables by metric and their warnings."""
    return measure_loaded(
        LoadedModel(lens, tokenized_texts),
        MetricFactory(lens.info, selected_metrics, seed=seed, bos=bos or lens.bos),
        results,
        sizes=(shard_tokens, batch_tokens),
        observer=observer,
    )


@dataclass(frozen=True)
class LoadedModel:
    """A model that is loaded, and texts as its tokens."""

    lens: HookedTransformer
    tokenized_texts: Sequence[TokenizedText]


def measure_loaded(
    model: MeasuredModel,
    factory: MetricFactory,
    results: Mapping[str, MetricResult],
    *,
    sizes: tuple[int, int],
    observer: Observer,
) -> tuple[dict[str, Mapping[str, Table]], list[MetricWarning]]:
    """Run all metrics on one model, and keep nothing but the results; `sizes` are tokens in a shard and in a batch."""
    shards = cut_shards(model.tokenized_texts, *sizes)
    work = ShardWork(model, factory, shards, sizes, observer=observer)
    active_metrics = work.construct(results)
    observes = any(active.points for active in active_metrics.values())
    without_values = [name for name, active in active_metrics.items() if not active.has_values]
    metrics = work.measure(
        active_metrics, results, observes=observes, without_values=without_values, unused=active_metrics
    )
    tables, warnings = tables_of_metrics(metrics, results, without_values)
    return tables, [*warnings, *map(MetricWarning, work.notes)]


def feed_metric(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    metric: Metric[Any],
    batches: Sequence[Sequence[int]],
) -> None:
    """Feed one metric outside of a run, without computing its tables; `batches` are indices of `tokenized_texts`.

    The conditions of a causal metric are not run; `feed_losses` does that.

    Raises:
        MetricError: with the traceback, if the metric raises.
    """
    _require_feedable(lens, tokenized_texts, metric, Metric, batches)
    result = MetricResult(type(metric), metric.params, "")
    require_definition(type(metric), metric.params)
    active = activate(lens, metric, result)
    fed = sorted(index for indices in batches for index in indices)
    plans = plan_all_sequences(lens, [active], tokenized_texts, fed)
    for plan in plans.values():
        read_sequences(lens, active, plan, plan.batches, Observer())
    for indices in [] if plans else batches:
        forward(lens, make_batch(lens, tokenized_texts, indices), [active], active.sink_position)
    _raise_failures(result)


def feed_losses(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    metric: CausalMetric[Any],
    batches: Sequence[Sequence[int]],
) -> None:
    """Run one causal metric's conditions outside of a run, after `feed_metric` has fed it the unedited model.

    Raises:
        MetricError: with the traceback, if the metric raises.
    """
    _require_feedable(lens, tokenized_texts, metric, CausalMetric, batches)
    result = MetricResult(type(metric), metric.params, "")
    metric.bos = lens.bos
    with guarded(result, lens.info.label, "conditions"):
        prompts = prepare(lens, metric)
    _raise_failures(result)
    active = ActiveMetric(metric, result)
    if prompts is None or metric.also_on_texts:
        run_conditions(lens, ConditionsTask.of_texts(tokenized_texts), [active], batches, Observer())
    if prompts:
        task = ConditionsTask.of_prompts(prompts)
        prompt_batches = pack([len(text.ids) for text in task.tokenized_texts], _PROMPT_BATCH_TOKENS)
        run_conditions(lens, task, [active], prompt_batches, Observer())
    _raise_failures(result)


def _require_feedable(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    metric: Metric[Any],
    metric_class: type,
    batches: Sequence[Sequence[int]],
) -> None:
    """Raise InputError unless `metric` can be fed with the texts in these batches."""
    require_lens("lens", lens)
    require_kind("metric", metric, metric_class, "made for the lens")
    for name, values in (("tokenized_texts", tokenized_texts), ("batches", batches)):
        if not is_list_like(values, Collection):
            raise InputError(f"expected {name} as a list, received {short_form(values)}")
    for text in tokenized_texts:
        require_kind("each of tokenized_texts", text, TokenizedText, "from lens.encoder().tokenize(text, n)")
    for indices in batches:
        require_wholes("each of batches", indices, 0)


def _raise_failures(result: MetricResult) -> None:
    for failure in result.failures:
        raise MetricError(f"{failure}\n{failure.traceback}")
