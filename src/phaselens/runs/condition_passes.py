"""The second pass of a run: every text on the unedited model, and under every condition of the causal metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, TokenizedText, pack
from phaselens.plugin import BASELINE, Batch, CausalMetric, Condition, TaskPrompt, TextOutcome
from phaselens.plugin.return_checks import conditions_of, prompts_of
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch, out_of_memory_explained
from phaselens.runs.condition_editor import ConditionEditor
from phaselens.runs.observer import Observer
from phaselens.runs.resume import Branch, run_branches

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer
    from phaselens.lens.token_losses import ReferencePredictions


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
        return n_forwards * sum(len(text.ids) for text in self.tokenized_texts)


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
                prompts = _prepare(lens, active.metric, bos)
                if prompts is None:
                    shared_task.members.append(active)
                elif prompts:
                    prompt_tasks.append(_prompt_task(prompts, active, batch_tokens))
    for task in [shared_task, *prompt_tasks]:
        if task.members:
            observer.measuring(f"{lens.info.label}, conditions", task.n_tokens)
            for indices in task.batches:
                _run_batch(lens, task, indices, observer)


def _causal(active: ActiveMetric) -> CausalMetric[Any]:
    metric = active.metric
    assert isinstance(metric, CausalMetric)
    return metric


def _prepare(lens: HookedTransformer, metric: CausalMetric[Any], bos: str) -> Sequence[TaskPrompt] | None:
    """Store the metric's conditions beside its losses, and return its prompts; None if it runs on the run's texts."""
    metric.bos = bos
    conditions = conditions_of(metric)
    for condition in conditions:
        ConditionEditor(lens, condition.edits)  # refuses hook points that the model does not have
    metric.losses.conditions = {condition.key: condition for condition in conditions}
    if type(metric).prompts is CausalMetric.prompts:
        return None
    # A copy: a metric that sets the pad token or side would change how all later texts are read.
    return prompts_of(metric, copy.deepcopy(lens.text_tokenizer))


def _prompt_task(prompts: Sequence[TaskPrompt], active: ActiveMetric, batch_tokens: int) -> _Task:
    tokenized_prompts = [
        TokenizedText(Text(prompt.id, " ".join(map(str, prompt.ids))), tuple(prompt.ids), len(prompt.ids))
        for prompt in prompts
    ]
    batches = pack([len(text.ids) for text in tokenized_prompts], batch_tokens)
    return _Task(tokenized_prompts, batches, [prompt.scored_from for prompt in prompts], [active])


def _run_batch(lens: HookedTransformer, task: _Task, indices: Sequence[int], observer: Observer) -> None:
    """Run the conditions of all metrics on one batch, and record the baseline for each metric."""
    batch = make_batch(lens, task.tokenized_texts, indices)
    n_tokens = sum(batch.lengths)
    members = [member for member in task.members if member.works]
    rows = _ScoredRows(lens, task, batch)
    if any(_causal(member).needs_divergence for member in members):
        with out_of_memory_explained(lens, batch):
            rows.keep_reference()
    branches = [
        _branch(lens, member, condition, rows, lambda: observer.advance(n_tokens))
        for member in members
        for condition in _causal(member).losses.conditions.values()
    ]
    with out_of_memory_explained(lens, batch):
        final = run_branches(lens, batch, branches)
        outcomes = list(rows.outcomes(final, with_divergence=rows.reference is not None))
    for member in members:
        with guarded(member.result, lens.info.label, "record"):
            for outcome in outcomes:
                _causal(member).record(BASELINE, _copy_outcome(outcome))
    observer.advance(n_tokens)


def _branch(
    lens: HookedTransformer,
    active: ActiveMetric,
    condition: Condition,
    rows: _ScoredRows,
    report_progress: Callable[[], None],
) -> Branch:
    metric, batch = _causal(active), rows.batch
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

    return Branch(editor, receive, guard)


class _ScoredRows:
    """The rows of a batch that predict a scored token, and the losses of each text computed from them.

    `reference` are the unedited model's predictions, if a metric needs the divergence from them.
    """

    def __init__(self, lens: HookedTransformer, task: _Task, batch: Batch) -> None:
        self.batch = batch
        self.reference: ReferencePredictions | None = None
        self._lens = lens
        starts = [
            min(task.scored_from[index], length)
            for index, length in zip(batch.indices, batch.lengths, strict=True)
        ]
        self._spans = list(zip(starts, batch.lengths, strict=True))

    def keep_reference(self) -> None:
        """Run the unedited model, and keep its predictions for comparison."""
        from phaselens.lens.token_losses import ReferencePredictions

        lengths = self.batch.lengths_on(self._lens.device)
        final = self._lens.stream(self.batch.tokens, lengths=lengths)
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
