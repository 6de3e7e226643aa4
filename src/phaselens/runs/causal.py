"""The second pass: every text as it is, and under every condition of the causal metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, Tokens, pack
from phaselens.plugin import BASELINE, Batch, CausalMetric, Condition, Outcome, Prompt
from phaselens.plugin.returned import conditions_of, prompts_of
from phaselens.runs.interventions import Editor
from phaselens.runs.ladder import Branch, climb
from phaselens.runs.work import Measured, Observer, batch_of, guarded, memory_named

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


@dataclass(frozen=True)
class Interventions:
    """How conditions are run: tokens in a batch of a metric's own prompts, the BOS policy, who is told."""

    batch_tokens: int = 8192
    bos: str = "auto"
    observer: Observer = field(default_factory=Observer)


@dataclass
class _Task:
    """Sequences, in batches, and the metrics that run their conditions on them."""

    texts: Sequence[Tokens]
    batches: Sequence[Sequence[int]]
    scored_from: Sequence[int]
    members: list[Measured]

    @property
    def n_tokens(self) -> int:
        """Tokens of all forwards, the baseline's included."""
        conditions = 1 + sum(len(_metric(measured).losses.conditions) for measured in self.members)
        return conditions * sum(len(text.ids) for text in self.texts)


def intervene(
    lens: HookedTransformer,
    texts: Sequence[Tokens],
    batches: Sequence[Sequence[int]],
    at_work: Sequence[Measured],
    how: Interventions,
) -> None:
    """Ask the causal metrics for their conditions, run them, and hand every metric its losses.

    Metrics that run on the run's texts share the baseline.
    """
    tasks = []
    shared = _Task(texts, batches, [1] * len(texts), [])
    for measured in at_work:
        if isinstance(measured.metric, CausalMetric) and measured.works:
            with guarded(measured.result, lens.info.label, "conditions"):
                own = _ask(lens, measured.metric, how)
                if own is None:
                    shared.members.append(measured)
                elif own:
                    tasks.append(_own_task(own, measured, how))
    for task in [shared, *tasks]:
        if task.members:
            how.observer.measuring(f"{lens.info.label}, conditions", task.n_tokens)
            for indices in task.batches:
                _run_batch(lens, task, indices, how.observer)


def _metric(measured: Measured) -> CausalMetric[Any]:
    metric = measured.metric
    assert isinstance(metric, CausalMetric)
    return metric


def _ask(lens: HookedTransformer, metric: CausalMetric[Any], how: Interventions) -> Sequence[Prompt] | None:
    """Its conditions, kept where its losses are, and its prompts, if it has its own."""
    metric.bos = how.bos
    asked = conditions_of(metric)
    for condition in asked:
        Editor(lens, condition.edits)  # complains of points that are not there
    metric.losses.conditions = {condition.key: condition for condition in asked}
    if type(metric).prompts is CausalMetric.prompts:
        return None
    # Who sets its pad token or its side would otherwise change how texts are read from then on.
    return prompts_of(metric, copy.deepcopy(lens.text_tokenizer))


def _own_task(prompts: Sequence[Prompt], measured: Measured, how: Interventions) -> _Task:
    texts = [
        Tokens(Text(prompt.id, " ".join(map(str, prompt.ids))), tuple(prompt.ids), len(prompt.ids))
        for prompt in prompts
    ]
    batches = pack([len(text.ids) for text in texts], how.batch_tokens)
    return _Task(texts, batches, [prompt.scored_from for prompt in prompts], [measured])


def _run_batch(lens: HookedTransformer, task: _Task, indices: Sequence[int], observer: Observer) -> None:
    """One batch: the conditions of all metrics, and the baseline, for each of them."""
    batch = batch_of(lens, task.texts, indices)
    n_tokens = sum(batch.lengths)
    members = [measured for measured in task.members if measured.works]
    branches = [
        _branch(lens, measured, condition, task, batch, lambda: observer.advance(n_tokens))
        for measured in members
        for condition in _metric(measured).losses.conditions.values()
    ]
    with memory_named(lens, batch):
        final = climb(lens, batch, branches)
        outcomes = list(_outcomes(lens, batch, final, task))
    for measured in members:
        with guarded(measured.result, lens.info.label, "record"):
            for outcome in outcomes:
                _metric(measured).record(BASELINE, _apart(outcome))
    observer.advance(n_tokens)


def _branch(
    lens: HookedTransformer,
    measured: Measured,
    condition: Condition,
    task: _Task,
    batch: Batch,
    done: Callable[[], None],
) -> Branch:
    metric = _metric(measured)
    editor = Editor(lens, condition.edits, batch)

    def take(final: Tensor) -> None:
        for outcome in _outcomes(lens, batch, final, task):
            metric.record(condition, outcome)
        metric.losses.prove(condition, editor.proofs)

    def guard(run: Callable[[], None]) -> None:
        if measured.works:
            with (
                guarded(measured.result, lens.info.label, f"condition {condition.name}"),
                memory_named(lens, batch),
            ):
                run()
        done()

    return Branch(editor, take, guard)


def _outcomes(lens: HookedTransformer, batch: Batch, final: Tensor, task: _Task) -> Iterator[Outcome]:
    """The losses of each text of the batch from the final norm's output [batch, pos, d_model]."""
    import torch

    from phaselens.lens.losses import token_losses

    firsts = [
        min(task.scored_from[index], length)
        for index, length in zip(batch.indices, batch.lengths, strict=True)
    ]
    spans = list(zip(firsts, batch.lengths, strict=True))
    rows = torch.cat([final[row, first - 1 : last - 1] for row, (first, last) in enumerate(spans)])
    targets = torch.cat([batch.tokens[row, first:last] for row, (first, last) in enumerate(spans)])
    found = token_losses(lens, rows, targets)
    loss, top, wanted = (each.cpu().numpy() for each in (found.loss, found.top, targets))
    start = 0
    for row, (first, last) in enumerate(spans):
        here = slice(start, start + last - first)
        start = here.stop
        text = (batch.texts[row], batch.indices[row], batch.hashes[row], batch.lengths[row])
        yield Outcome(*text, loss[here], top[here], wanted[here])


def _apart(outcome: Outcome) -> Outcome:
    """The same outcome for one metric alone, which may write into its arrays."""
    arrays = {name: getattr(outcome, name).copy() for name in ("loss", "top", "targets")}
    return replace(outcome, **arrays)
