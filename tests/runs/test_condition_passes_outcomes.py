"""What a causal metric is given: outcomes of each text, divergences, progress, and copies that it may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import Condition, Edit, TaskPrompt, TextOutcome
from phaselens.runs.active_metrics import ActiveMetric
from phaselens.runs.batches import BatchTooLarge
from phaselens.runs.condition_passes import ConditionsTask, prepare, run_conditions
from phaselens.runs.condition_passes import causal as as_causal
from phaselens.runs.observer import Observer
from phaselens.runs.result import MetricResult
from tests.runs.conditions import causal, naive_loss, zero
from tests.toys import toy_lens

PROMPTS = [
    TaskPrompt("long", [0, 5, 9, 13, 21, 8], scored_from=4),
    TaskPrompt("short", [0, 30, 7]),
    TaskPrompt("last", [0, 6, 11, 4], scored_from=3),
]
POINT = "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(dtype=torch.float64)


class CountingObserver(Observer):
    """Keeps the tokens of each report."""

    def __init__(self) -> None:
        self.n_tokens: list[int] = []

    def advance(self, n_tokens: int) -> None:
        self.n_tokens.append(n_tokens)


def keep(outcomes: list[tuple[str, TextOutcome]]) -> Any:
    return lambda self, condition, outcome: outcomes.append((condition.name, outcome))


def activated(lens: Any, metric_class: Any) -> ActiveMetric:
    """The metric on the lens, with its conditions."""
    metric = metric_class(lens.info, metric_class.Params())
    metric.bos = lens.bos
    prepare(lens, metric)
    return ActiveMetric(metric, MetricResult(metric_class, metric.params, ""))


def run_prompts(
    lens: Any, *metrics: Any, batches: Any = ((0, 1, 2),)
) -> tuple[list[ActiveMetric], list[int]]:
    active_metrics = [activated(lens, metric) for metric in metrics]
    observer = CountingObserver()
    run_conditions(lens, ConditionsTask.of_prompts(PROMPTS), active_metrics, batches, observer)
    return active_metrics, observer.n_tokens


def zero_first_row(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return torch.cat([value[:, :1] * 0.0, value[:, 1:]], 1)


@pytest.mark.parametrize("batches", [[(0, 1, 2)], [(2, 0), (1,)]])
def test_outcomes_are_the_dense_losses_predictions_and_divergences_of_each_text(
    lens: Any, batches: Any
) -> None:
    plain: list[tuple[str, TextOutcome]] = []
    divergent: list[tuple[str, TextOutcome]] = []
    metrics = [
        causal(zero(POINT, 0), name="plain", record=keep(plain)),
        causal(zero(POINT, 0), name="divergent", record=keep(divergent), needs_divergence=True),
    ]
    active_metrics, _ = run_prompts(lens, *metrics, batches=batches)
    assert not any(active.result.failures for active in active_metrics)
    order = [index for indices in batches for index in indices]
    for name, hooks in (("baseline", []), ("off", [(POINT, zero_first_row)])):
        of_name = [outcome for condition, outcome in divergent if condition == name]
        assert [outcome.index for outcome in of_name] == order
        for outcome in of_name:
            prompt = PROMPTS[outcome.index]
            n = len(prompt.ids)
            tokens = torch.tensor([list(prompt.ids)])
            with torch.no_grad():
                unedited = lens.run_with_hooks(tokens, return_type="logits")[0].log_softmax(-1)
                edited = lens.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)[0].log_softmax(-1)
            assert (outcome.text, outcome.length) == (prompt.id, n)
            expected = naive_loss(lens, prompt.ids, hooks)[prompt.scored_from - 1 :].numpy()
            np.testing.assert_allclose(outcome.loss, expected, atol=1e-6)
            assert outcome.targets.tolist() == list(prompt.ids[prompt.scored_from :])
            assert outcome.top.tolist() == edited[prompt.scored_from - 1 : n - 1].argmax(-1).tolist()
            divergence = (unedited.exp() * (unedited - edited)).sum(-1)[prompt.scored_from - 1 : n - 1]
            assert outcome.divergence is not None
            np.testing.assert_allclose(outcome.divergence, divergence.numpy(), atol=1e-9)
    assert {outcome.text: len(outcome.loss) for _, outcome in plain} == {"long": 2, "short": 2, "last": 1}
    assert len({outcome.content for _, outcome in plain}) == len(PROMPTS)
    assert {outcome.divergence is None for name, outcome in plain if name == "off"} == {True}


def test_progress_counts_each_batch_once_per_condition_and_once_for_the_baseline(lens: Any) -> None:
    def fail(self: Any, condition: Condition, outcome: TextOutcome) -> None:
        raise ValueError("no")

    conditions = [zero(POINT, 0, name=name) for name in ("a", "b")]
    _, n_tokens = run_prompts(lens, causal(*conditions), batches=[(0, 1), (2,)])
    assert n_tokens == [9, 9, 9, 4, 4, 4]
    # A metric that has failed reports its conditions of the batch all the same, and runs no further batch.
    (active,), n_tokens = run_prompts(lens, causal(*conditions, record=fail), batches=[(0, 1), (2,)])
    assert n_tokens == [9, 9, 9, 4]
    (failure,) = active.result.failures
    assert (failure.stage, failure.model, failure.message) == ("condition a", "llama", "no")


def test_a_metric_that_fails_on_the_baseline_is_named_so(lens: Any) -> None:
    def fail(self: Any, condition: Condition, outcome: TextOutcome) -> None:
        if condition.name == "baseline":
            raise ValueError("no")

    outcomes: list[tuple[str, TextOutcome]] = []
    sound = causal(zero(POINT, 0), name="sound", record=keep(outcomes))
    (failed, _), _ = run_prompts(lens, causal(zero(POINT, 0), record=fail), sound)
    (failure,) = failed.result.failures
    assert (failure.stage, failure.model) == ("record", "llama")
    assert len(outcomes) == 2 * len(PROMPTS)


def test_a_metric_may_change_its_outcome_without_effect_on_another(lens: Any) -> None:
    def spoil(self: Any, condition: Condition, outcome: TextOutcome) -> None:
        for values in (outcome.loss, outcome.top, outcome.targets, outcome.divergence):
            if values is not None:
                values[:] = 7

    spoiled: list[tuple[str, TextOutcome]] = []
    expected: list[tuple[str, TextOutcome]] = []
    options = {"needs_divergence": True}
    run_prompts(
        lens,
        causal(zero(POINT, 0), name="spoils", record=spoil, **options),
        causal(zero(POINT, 0), name="reads", record=keep(spoiled), **options),
    )
    run_prompts(lens, causal(zero(POINT, 0), record=keep(expected), **options))
    for (_, outcome), (_, separate) in zip(spoiled, expected, strict=True):
        for name in ("loss", "top", "targets", "divergence"):
            np.testing.assert_array_equal(getattr(outcome, name), getattr(separate, name))
    assert any(outcome.loss.any() for _, outcome in spoiled)


def test_prompts_and_texts_become_tasks() -> None:
    task = ConditionsTask.of_prompts(PROMPTS)
    assert [text.text.id for text in task.tokenized_texts] == ["long", "short", "last"]
    assert [text.ids for text in task.tokenized_texts] == [tuple(prompt.ids) for prompt in PROMPTS]
    assert not any(text.cut for text in task.tokenized_texts)
    assert [text.text.text for text in task.tokenized_texts][1] == "0 30 7"
    assert list(task.scored_from) == [4, 1, 3]
    of_texts = ConditionsTask.of_texts(task.tokenized_texts)
    assert of_texts.tokenized_texts == task.tokenized_texts
    assert list(of_texts.scored_from) == [1, 1, 1]  # every token but the first


def test_preparing_stores_conditions_and_gives_prompts_a_tokenizer_of_their_own(lens: Any) -> None:
    tokenizers: list[Any] = []

    def prompts(self: Any, tokenizer: Any) -> list[TaskPrompt]:
        tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"
        tokenizer.add_tokens(["task"])
        tokenizers.append(tokenizer)
        return PROMPTS

    side, size = lens.text_tokenizer.padding_side, len(lens.text_tokenizer)
    metric_class = causal(zero(POINT, 0), prompts=prompts)
    metric = metric_class(lens.info, metric_class.Params())
    assert prepare(lens, metric) == PROMPTS
    assert (lens.text_tokenizer.padding_side, len(lens.text_tokenizer)) == (side, size)
    assert tokenizers[0]("a b")["input_ids"] == lens.text_tokenizer("a b")["input_ids"]
    assert [condition.name for condition in metric.losses.conditions.values()] == ["off"]
    assert {key: condition.key for key, condition in metric.losses.conditions.items()} == {
        key: key for key in metric.losses.conditions
    }
    without_prompts = causal(zero(POINT, 0))
    assert prepare(lens, without_prompts(lens.info, without_prompts.Params())) is None
    for changes in (
        {"conditions": lambda self: [zero("blocks.1.hook_mlp_on")]},
        {"condition_hooks": lambda self: ["blocks.1.hook_mlp_on"], "update_condition": lambda *_: None},
    ):
        unknown = causal(zero(POINT, 0), **changes)
        with pytest.raises(InputError, match=r"no hook point 'blocks\.1\.hook_mlp_on'"):
            prepare(lens, unknown(lens.info, unknown.Params()))
    assert as_causal(ActiveMetric(metric, MetricResult(metric_class, metric.params, ""))) is metric


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_a_batch_that_does_not_fit_into_memory_is_named(
    lens: Any, layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may be too large for the reference, for a branch, or for the baseline."""
    stream = type(lens).stream

    def out_of_memory(self: Any, tokens: Any = None, hooks: Any = (), **options: Any) -> Any:
        # From layer 0 on, the branch alone has hooks.
        if layer is None or (options.get("start_at_layer") == layer and (hooks or layer == 2)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stream(self, tokens, hooks, **options)

    metrics = [causal(zero("blocks.0.attn.hook_v", 0), needs_divergence=layer is None)]
    monkeypatch.setattr(type(lens), "stream", out_of_memory)
    with pytest.raises(BatchTooLarge, match=r"llama: a batch of 3 × 6 tokens does not fit"):
        run_prompts(lens, *metrics)


def test_conditions_rotate_each_text_by_its_own_length() -> None:
    """The reference of a divergence too: a padded row would otherwise be rotated as the longest text is."""
    from tests.lens.test_frequencies import N_CTX, fresh

    lens = phaselens.load(fresh("dynamic"), label="toy", check=False)
    ids = torch.randint(2, 60, (2 * N_CTX,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [TaskPrompt("short", ids[:9]), TaskPrompt("long", ids)]
    divergences: dict[int, list[np.ndarray]] = {}

    def record(n: int, self: Any, condition: Condition, outcome: TextOutcome) -> None:
        if (condition.name, outcome.text) == ("off", "short"):
            assert outcome.divergence is not None
            divergences.setdefault(n, []).append(outcome.divergence)

    for n in (1, 2):
        metric = causal(
            zero("blocks.1.attn.hook_v", 0),
            record=lambda *arguments, n=n: record(n, *arguments),
            needs_divergence=True,
        )
        active = activated(lens, metric)
        task = ConditionsTask.of_prompts(prompts)
        run_conditions(lens, task, [active], [tuple(range(n))], Observer())
        assert not active.result.failures
    np.testing.assert_allclose(divergences[2][0], divergences[1][0], atol=1e-5)


def test_a_metric_reads_statistics_of_its_own_sink_and_distances_under_a_condition(lens: Any) -> None:
    collected: list[tuple[str, int | None, dict[str, torch.Tensor]]] = []

    def update(self: Any, condition: Condition, layer: Any) -> None:
        collected.append((condition.name, layer.index, {name: layer[name].clone() for name in layer}))

    points = ["attn.hook_sink", "attn.hook_distance"]
    edit = Edit("blocks.0.attn.hook_v", 0.0, positions=[0])
    metric = causal(
        Condition("off", [edit]),
        condition_hooks=lambda self: [f"blocks.{{layer}}.{point}" for point in points],
        update_condition=update,
        sink_position=2,
        n_distances=3,
    )
    (active,), _ = run_prompts(lens, metric, batches=[(0,)])
    assert not active.result.failures, active.result.failures[0].traceback
    assert [(name, layer) for name, layer, _ in collected] == [("off", 0), ("off", 1)]
    patterns: list[torch.Tensor] = []
    hooks = [
        (f"blocks.{layer}.attn.hook_pattern", lambda value, hook: patterns.append(value.clone()))
        for layer in range(2)
    ]
    with phaselens.runs.applied(lens, [edit]):
        lens.stream(torch.tensor([PROMPTS[0].ids]), hooks)
    for pattern, (_, _, activations) in zip(patterns, collected, strict=True):
        sink = activations["attn.hook_sink"]
        torch.testing.assert_close(sink[..., 2:], pattern[..., 2:, 2].to(sink.dtype), atol=1e-6, rtol=0)
        assert activations["attn.hook_distance"].shape[-1] == 3


def test_conditions_see_their_own_texts(lens: Any) -> None:
    """An edit that reads the texts gets those of the batch, in its order."""
    batches: list[tuple[str, ...]] = []

    def change(tensor: torch.Tensor, site: Any) -> torch.Tensor:
        batches.append(site.batch.texts)
        return tensor * 0.5

    run_prompts(lens, causal(Condition("half", [Edit(POINT, change)])), batches=[(2, 0), (1,)])
    assert batches == [("last", "long"), ("short",)]
