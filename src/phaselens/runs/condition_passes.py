"""The second pass of a run: every text on the unedited model, and under every condition of the causal metrics."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, TokenizedText
from phaselens.plugin import BASELINE, Batch, CausalMetric, Condition, TaskPrompt, TextOutcome
from phaselens.plugin.return_checks import condition_hook_names, conditions_of, prompts_of
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch, out_of_memory_explained
from phaselens.runs.condition_editor import ConditionEditor
from phaselens.runs.layer_pass import LayerDispatcher, Reader
from phaselens.runs.layer_points import points_to_read
from phaselens.runs.observer import Observer
from phaselens.runs.resume import Branch, ReadingForward, run_branches

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer
    from phaselens.lens.token_losses import ReferencePredictions


@dataclass(frozen=True)
class ConditionsTask:
    """Texts or prompts that conditions are run on. `scored_from` is the first scored position of each."""

    tokenized_texts: Sequence[TokenizedText]
    scored_from: Sequence[int]

    @classmethod
    def of_texts(cls, tokenized_texts: Sequence[TokenizedText]) -> ConditionsTask:
        """Return the task of metrics that measure on the run's texts; they share the baseline."""
        return cls(tokenized_texts, [1] * len(tokenized_texts))

    @classmethod
    def of_prompts(cls, prompts: Sequence[TaskPrompt]) -> ConditionsTask:
        """Return the task of a metric that measures on prompts of its own."""
        tokenized_prompts = [
            TokenizedText(Text(prompt.id, " ".join(map(str, prompt.ids))), tuple(prompt.ids), len(prompt.ids))
            for prompt in prompts
        ]
        return cls(tokenized_prompts, [prompt.scored_from for prompt in prompts])


def causal(active: ActiveMetric) -> CausalMetric[Any]:
    """Return the metric, which is causal."""
    metric = active.metric
    assert isinstance(metric, CausalMetric)
    return metric


def prepare(lens: HookedTransformer, metric: CausalMetric[Any]) -> Sequence[TaskPrompt] | None:
    """Store the metric's conditions beside its losses, and return its prompts; None if it runs on the run's texts.

    The metric has observed all texts, and its `bos` is set.
    """
    conditions = conditions_of(metric)
    points_to_read(lens, metric, condition_hook_names(metric))  # refuses those that the model does not have
    for condition in conditions:
        ConditionEditor(lens, condition.edits)  # refuses hook points that the model does not have
    metric.losses.conditions = {condition.key: condition for condition in conditions}
    if type(metric).prompts is CausalMetric.prompts:
        return None
    # A copy: a metric that sets the pad token or side would change how all later texts are read.
    return prompts_of(metric, copy.deepcopy(lens.text_tokenizer))


def run_conditions(
    lens: HookedTransformer,
    task: ConditionsTask,
    active_metrics: Sequence[ActiveMetric],
    batches: Sequence[Sequence[int]],
    observer: Observer,
) -> None:
    """Run the conditions of causal metrics on batches of a task's texts, and pass each metric its losses."""
    for indices in batches:
        batch = make_batch(lens, task.tokenized_texts, indices)
        members = [active for active in active_metrics if active.works]
        _run_batch(lens, task, members, batch, observer)


def _run_batch(
    lens: HookedTransformer,
    task: ConditionsTask,
    members: Sequence[ActiveMetric],
    batch: Batch,
    observer: Observer,
) -> None:
    """Run the conditions of all metrics on one batch, and record the baseline for each metric."""
    n_tokens = sum(batch.lengths)
    rows = _ScoredRows(lens, task, batch)
    needs_reference = any(causal(member).needs_divergence for member in members)
    branches = [
        _branch(lens, member, condition, rows, lambda: observer.advance(n_tokens))
        for member in members
        for condition in causal(member).losses.conditions.values()
    ]
    with out_of_memory_explained(lens, batch):
        final = run_branches(lens, batch, branches, rows.keep_reference if needs_reference else None)
        outcomes = list(rows.outcomes(final, with_divergence=rows.reference is not None))
    for member in (member for member in members if member.works):
        with guarded(member.result, lens.info.label, "record"):
            for outcome in outcomes:
                causal(member).record(BASELINE, _copy_outcome(outcome))
    observer.advance(n_tokens)


def _branch(
    lens: HookedTransformer,
    active: ActiveMetric,
    condition: Condition,
    rows: _ScoredRows,
    report_progress: Callable[[], None],
) -> Branch:
    metric, batch = causal(active), rows.batch
    editor = ConditionEditor(lens, condition.edits, batch)

    def receive(final: Tensor) -> None:
        for outcome in rows.outcomes(final, with_divergence=metric.needs_divergence):
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
    metric = causal(active)
    points = points_to_read(lens, metric, condition_hook_names(metric))
    if not points:
        return None

    @contextmanager
    def reading() -> Iterator[ReadingForward]:
        update = functools.partial(metric.update_condition, condition)
        dispatcher = LayerDispatcher(lens, batch, [Reader(points, update, active.result, metric.model.label)])
        options = {
            "sink_position": metric.sink_position,
            "n_distances": metric.n_distances,
            "reads_only": True,
        }
        yield [(name, dispatcher.hook(name)) for name in points], options
        dispatcher.finish_layer()

    return reading


class _ScoredRows:
    """The rows of a batch that predict a scored token, and the losses of each text computed from them.

    `reference` are the unedited model's predictions, if a metric needs the divergence from them.
    """

    def __init__(self, lens: HookedTransformer, task: ConditionsTask, batch: Batch) -> None:
        self.batch = batch
        self.reference: ReferencePredictions | None = None
        self._lens = lens
        starts = [
            min(task.scored_from[index], length)
            for index, length in zip(batch.indices, batch.lengths, strict=True)
        ]
        self._spans = list(zip(starts, batch.lengths, strict=True))

    def keep_reference(self, final: Tensor) -> None:
        """Keep the unedited model's predictions from its final norm's output [batch, pos, d_model]."""
        from phaselens.lens.token_losses import ReferencePredictions

        self.reference = ReferencePredictions(self._lens, self._rows_of(final))

    def _rows_of(self, final: Tensor) -> Tensor:
        """Return the rows [token, d_model] of final [batch, pos, d_model] that predict a scored token."""
        import torch

        return torch.cat([final[row, start - 1 : stop - 1] for row, (start, stop) in enumerate(self._spans)])

    def outcomes(self, final: Tensor, *, with_divergence: bool) -> Iterator[TextOutcome]:
        """Yield the losses of each text of the batch from the final norm's output [batch, pos, d_model]."""
        import torch

        from phaselens.lens.token_losses import token_losses

        batch = self.batch
        targets = torch.cat([batch.tokens[row, start:stop] for row, (start, stop) in enumerate(self._spans)])
        reference = self.reference if with_divergence else None
        losses = token_losses(self._lens, self._rows_of(final), targets, reference)
        loss, top, target_ids = (tensor.cpu().numpy() for tensor in (losses.loss, losses.top, targets))
        divergence = None if losses.divergence is None else losses.divergence.cpu().numpy()
        offset = 0
        for row, (start, stop) in enumerate(self._spans):
            scored = slice(offset, offset + stop - start)
            offset = scored.stop
            text = (batch.texts[row], batch.indices[row], batch.hashes[row], batch.lengths[row])
            of_text = None if divergence is None else divergence[scored]
            yield TextOutcome(*text, loss[scored], top[scored], target_ids[scored], of_text)


def _copy_outcome(outcome: TextOutcome) -> TextOutcome:
    """Return a copy of the outcome, whose arrays a metric may change without effect on other metrics."""
    names = ("loss", "top", "targets", *(() if outcome.divergence is None else ("divergence",)))
    return replace(outcome, **{name: getattr(outcome, name).copy() for name in names})
