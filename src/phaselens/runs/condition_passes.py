"""The second pass of a run: every text on the unedited model, and under every condition of the causal metrics."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, TokenizedText, pack
from phaselens.plugin import BASELINE, Batch, CausalMetric, Condition, TaskPrompt, TextOutcome
from phaselens.plugin.return_checks import condition_hook_names, conditions_of, prompts_of
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch, out_of_memory_explained
from phaselens.runs.condition_editor import ConditionEditor
from phaselens.runs.layer_dispatcher import LayerDispatcher, Reader, points_of
from phaselens.runs.observer import Observer
from phaselens.runs.resume import Branch, ReadingForward, run_branches

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


@dataclass
class _Task:
    """Batches of texts or prompts, and the metrics that run their conditions on them."""

    tokenized_texts: Sequence[TokenizedText]
    batches: Sequence[Sequence[int]]
    scored_from: Sequence[int]
    members: list[ActiveMetric]

    @property
    def n_tokens(self) -> int:
        """Tokens of all forwards, the baseline's included."""
        n_forwards = 1 + sum(len(_causal(member).losses.conditions) for member in self.members)
        return n_forwards * sum(
            len(self.tokenized_texts[index].ids) for batch in self.batches for index in batch
        )


def run_conditions(
    lens: HookedTransformer,
    tokenized_texts: Sequence[TokenizedText],
    batches: Sequence[Sequence[int]],
    active_metrics: Sequence[ActiveMetric],
    *,
    bos: str,
    observer: Observer | None = None,
    batch_tokens: int = 8192,
) -> None:
    """Run the conditions of the causal metrics among `active_metrics`, and pass each metric its losses.

    Metrics that measure on the run's texts share the baseline.

    Args:
        lens: the model.
        tokenized_texts: the run's texts.
        batches: indices of `tokenized_texts`, batch by batch.
        active_metrics: all metrics of the run; those that are not causal are skipped.
        bos: the BOS policy, for metrics that make their own prompts.
        observer: receives the progress.
        batch_tokens: tokens in a batch of a metric's own prompts, pads included.
    """
    observer = Observer() if observer is None else observer
    prompt_tasks = []
    shared_task = _Task(tokenized_texts, batches, [1] * len(tokenized_texts), [])
    for active in active_metrics:
        if isinstance(active.metric, CausalMetric) and active.works:
            with guarded(active.result, lens.info.label, "conditions"):
                prompts = _prepare(lens, active, bos)
                if prompts is None or active.metric.also_on_texts:
                    shared_task.members.append(active)
                if prompts:
                    before = tokenized_texts if active.metric.also_on_texts else ()
                    prompt_tasks.append(_prompt_task(prompts, active, batch_tokens, before))
    for task in [shared_task, *prompt_tasks]:
        if task.members:
            observer.measuring(f"{lens.info.label}, conditions", task.n_tokens)
            for indices in task.batches:
                _run_batch(lens, task, indices, observer)


def _causal(active: ActiveMetric) -> CausalMetric[Any]:
    metric = active.metric
    assert isinstance(metric, CausalMetric)
    return metric


def _prepare(lens: HookedTransformer, active: ActiveMetric, bos: str) -> Sequence[TaskPrompt] | None:
    """Store the metric's conditions beside its losses, and return its prompts; None if it runs on the run's texts."""
    metric = _causal(active)
    metric.bos = bos
    conditions = conditions_of(metric)
    active.condition_points = points_of(lens, condition_hook_names(metric))
    for condition in conditions:
        ConditionEditor(lens, condition.edits)  # refuses hook points that the model does not have
    metric.losses.conditions = {condition.key: condition for condition in conditions}
    if type(metric).prompts is CausalMetric.prompts:
        return None
    # A copy: a metric that sets the pad token or side would change how all later texts are read.
    return prompts_of(metric, copy.deepcopy(lens.text_tokenizer))


def _prompt_task(
    prompts: Sequence[TaskPrompt],
    active: ActiveMetric,
    batch_tokens: int,
    texts_before: Sequence[TokenizedText],
) -> _Task:
    """Return the task of a metric's own prompts, whose indices follow those of `texts_before`."""
    tokenized_prompts = [
        TokenizedText(Text(prompt.id, " ".join(map(str, prompt.ids))), tuple(prompt.ids), len(prompt.ids))
        for prompt in prompts
    ]
    n_before = len(texts_before)
    batches = [
        [n_before + index for index in batch]
        for batch in pack([len(text.ids) for text in tokenized_prompts], batch_tokens)
    ]
    scored_from = [*([1] * n_before), *(prompt.scored_from for prompt in prompts)]
    return _Task([*texts_before, *tokenized_prompts], batches, scored_from, [active])


def _run_batch(lens: HookedTransformer, task: _Task, indices: Sequence[int], observer: Observer) -> None:
    """Run the conditions of all metrics on one batch, and record the baseline for each metric."""
    batch = make_batch(lens, task.tokenized_texts, indices)
    n_tokens = sum(batch.lengths)
    members = [member for member in task.members if member.works]
    branches = [
        _branch(lens, member, condition, task, batch, lambda: observer.advance(n_tokens))
        for member in members
        for condition in _causal(member).losses.conditions.values()
    ]
    with out_of_memory_explained(lens, batch):
        final = run_branches(lens, batch, branches)
        outcomes = list(_outcomes(lens, batch, final, task))
    for member in members:
        with guarded(member.result, lens.info.label, "record"):
            for outcome in outcomes:
                _causal(member).record(BASELINE, _copy_outcome(outcome))
    observer.advance(n_tokens)


def _branch(
    lens: HookedTransformer,
    active: ActiveMetric,
    condition: Condition,
    task: _Task,
    batch: Batch,
    report_progress: Callable[[], None],
) -> Branch:
    metric = _causal(active)
    editor = ConditionEditor(lens, condition.edits, batch)

    def receive(final: Tensor) -> None:
        for outcome in _outcomes(lens, batch, final, task):
            metric.record(condition, outcome)
        metric.losses.add_effects(condition, editor.effects)

    def guard(run: Callable[[], None]) -> None:
        if active.works:
            with (
                guarded(active.result, lens.info.label, f"condition {condition.name}"),
                out_of_memory_explained(lens, batch),
            ):
                run()
        report_progress()

    return Branch(editor, receive, guard, _reading(lens, active, condition, batch))


def _reading(
    lens: HookedTransformer, active: ActiveMetric, condition: Condition, batch: Batch
) -> Callable[[], AbstractContextManager[ReadingForward]] | None:
    """Return the context in which the metric reads a forward under the condition; None if it reads nothing there."""
    if not active.condition_points:
        return None
    metric = _causal(active)

    @contextmanager
    def reading() -> Iterator[ReadingForward]:
        reader = Reader(
            active.condition_points,
            functools.partial(metric.update_condition, condition),
            active.result,
            metric.model.label,
        )
        dispatcher = LayerDispatcher(lens, batch, [reader])
        hooks = [(name, dispatcher.hook(name)) for name in reader.points]
        options = {
            "sink_position": metric.sink_position,
            "n_distances": metric.n_distances,
            "reads_only": True,
        }
        yield hooks, options
        dispatcher.finish_layer()

    return reading


def _outcomes(lens: HookedTransformer, batch: Batch, final: Tensor, task: _Task) -> Iterator[TextOutcome]:
    """Yield the losses of each text of the batch from the final norm's output [batch, pos, d_model]."""
    import torch

    from phaselens.lens.token_losses import token_losses

    starts = [
        min(task.scored_from[index], length)
        for index, length in zip(batch.indices, batch.lengths, strict=True)
    ]
    spans = list(zip(starts, batch.lengths, strict=True))
    rows = torch.cat([final[row, start - 1 : stop - 1] for row, (start, stop) in enumerate(spans)])
    targets = torch.cat([batch.tokens[row, start:stop] for row, (start, stop) in enumerate(spans)])
    losses = token_losses(lens, rows, targets)
    loss, top, target_ids = (tensor.cpu().numpy() for tensor in (losses.loss, losses.top, targets))
    offset = 0
    for row, (start, stop) in enumerate(spans):
        scored = slice(offset, offset + stop - start)
        offset = scored.stop
        text = (batch.texts[row], batch.indices[row], batch.hashes[row], batch.lengths[row])
        yield TextOutcome(*text, loss[scored], top[scored], target_ids[scored])


def _copy_outcome(outcome: TextOutcome) -> TextOutcome:
    """Return a copy of the outcome, whose arrays a metric may change without effect on other metrics."""
    arrays = {name: getattr(outcome, name).copy() for name in ("loss", "top", "targets")}
    return replace(outcome, **arrays)
