"""Activations that a metric reads under its conditions, and prompts that run beside the texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import phaselens
from phaselens.plugin import CausalMetric, Condition, Edit, LayerView, Params, TaskPrompt
from tests.runs.conditions import causal, losses, zero
from tests.runs.test_condition_passes import TEXTS, ids, run
from tests.toys import toy_lens


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(num_hidden_layers=4, dtype=torch.float64)


class ReadsUnderConditions(CausalMetric[Params]):
    """A metric that keeps the residual after the last layer, of the unedited model and under each condition."""

    name, version = "reads", "1"

    def setup(self) -> None:
        self.residuals: dict[tuple[str, str], torch.Tensor] = {}
        self.layers: list[tuple[str, int | None]] = []

    def hooks(self) -> list[str]:
        return ["blocks.3.hook_resid_post"]

    def condition_hooks(self) -> list[str]:
        return ["blocks.{layer}.hook_resid_post"]

    def update(self, layer: LayerView) -> None:
        self.keep("baseline", layer)

    def update_condition(self, condition: Condition, layer: LayerView) -> None:
        self.layers.append((condition.name, layer.index))
        if layer.index == 3:
            self.keep(condition.name, layer)

    def keep(self, condition: str, layer: LayerView) -> None:
        for row, (text, length) in enumerate(zip(layer.batch.texts, layer.batch.lengths, strict=True)):
            self.residuals[condition, text] = layer["hook_resid_post"][row, :length].clone()

    def conditions(self) -> list[Condition]:
        return [
            zero("blocks.2.hook_mlp_out", name="late"),
            Condition("early", [Edit("blocks.0.attn.hook_v", 0.0, positions=[0])]),
        ]


def test_a_metric_reads_activations_under_its_conditions(lens: Any) -> None:
    instances: list[ReadsUnderConditions] = []

    class KeptReading(ReadsUnderConditions):
        """A reading metric whose instances the test keeps."""

        def setup(self) -> None:
            super().setup()
            instances.append(self)

    plain = causal(*ReadsUnderConditions.conditions(None))  # type: ignore[arg-type]
    result = run(lens, KeptReading, plain, batch_tokens=12)
    metric = next(instance for instance in instances if instance.residuals)
    for condition in metric.conditions():
        for number, text in enumerate(TEXTS):
            stored: dict[str, torch.Tensor] = {}
            hooks = [
                (edit.point, lambda value, hook, edit=edit: _zeroed(value, edit.positions))
                for edit in condition.edits
            ]

            def keep(value: torch.Tensor, hook: object, stored: dict[str, torch.Tensor] = stored) -> None:
                stored["value"] = value[0].clone()

            lens.stream(torch.tensor([ids(lens, text)]), [*hooks, ("blocks.3.hook_resid_post", keep)])
            torch.testing.assert_close(metric.residuals[condition.name, str(number)], stored["value"])
    # Layers below the lowest edited one are those of the unedited model, and are not read again.
    assert {layer for name, layer in metric.layers if name == "late"} == {2, 3}
    assert {layer for name, layer in metric.layers if name == "early"} == {0, 1, 2, 3}
    assert losses(result, "reads") == pytest.approx(losses(result))


def _zeroed(value: torch.Tensor, positions: Any) -> torch.Tensor:
    value = value.clone()
    value[:, slice(None) if positions is None else list(positions)] = 0.0
    return value


def test_a_metric_that_fails_while_reading_leaves_the_others_alone(lens: Any) -> None:
    def fail(self: Any, condition: Condition, layer: LayerView) -> None:
        raise ValueError("no")

    failing = causal(
        zero("blocks.1.hook_mlp_out"),
        name="failing",
        condition_hooks=lambda self: ["hook_embed", "blocks.{layer}.attn.hook_sink"],
        update_condition=fail,
    )
    unknown = causal(
        zero("blocks.1.hook_mlp_out"),
        name="unknown",
        condition_hooks=lambda self: ["blocks.{layer}.hook_nothing"],
    )
    undefined = causal(
        zero("blocks.1.hook_mlp_out"),
        name="undefined",
        condition_hooks=lambda self: ["blocks.3.hook_mlp_out"],
    )
    metrics = [failing, unknown, undefined, causal(zero("blocks.1.hook_mlp_out"))]
    result = phaselens.run(lens, metrics=metrics, texts=TEXTS)
    assert result.failed == ["failing", "unknown", "undefined"]
    messages = [str(result.metrics[name].failures[0]) for name in result.failed]
    assert "no" in messages[0]
    assert "hook_nothing" in messages[1]
    assert "does not define update_condition" in messages[2]


def test_prompts_can_run_beside_the_texts(lens: Any) -> None:
    recorded: list[tuple[str, str, int, int]] = []
    metric = causal(
        zero("blocks.1.hook_mlp_out"),
        also_on_texts=True,
        prompts=lambda self, tokenizer: [
            TaskPrompt("mine", [0, 5, 6, 7], scored_from=3),
            TaskPrompt("other", [0, 9]),
        ],
        record=lambda self, condition, outcome: recorded.append(
            (condition.name, outcome.text, outcome.index, len(outcome.loss))
        ),
        compute=lambda self: {},
    )
    run(lens, metric)
    n_predicted = {str(number): len(ids(lens, text)) - 1 for number, text in enumerate(TEXTS)}
    expected = {(text, int(text), n) for text, n in n_predicted.items()} | {("mine", 0, 1), ("other", 1, 1)}
    for name in ("baseline", "off"):
        assert {entry[1:] for entry in recorded if entry[0] == name} == expected
    assert len(recorded) == 2 * len(expected)
