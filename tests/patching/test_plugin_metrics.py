"""Conditions and metrics of plugins, by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.patching import Experiment, causal_names, metric_names, prompt
from phaselens.plugin import plugins
from tests.patching.conftest import experiment_of, lens_of


def test_a_condition_equals_the_edit_that_it_describes(experiment):
    experiment.condition("bos-mlp", layer=1)
    by_name = experiment.run()
    assert str(experiment.patched()).startswith("1. condition bos-mlp: ")
    assert str(experiment.patched()).endswith("layer 1")
    experiment.undo()
    experiment.ablate(what="mlp", layer=1, pos=0)
    assert experiment.run().value == by_name.value
    assert by_name.value[0] != by_name.value[1]


def test_a_condition_that_chooses_by_texts_acts_on_every_row_of_a_sweep(experiment):
    """A cell of a sweep equals a full run with the condition and one more patch."""
    experiment.condition("qk-disruption", multiple=1.5)
    unedited = experiment_of().values()[0]
    swept = experiment.sweep("mlp", layer=[1, 2])
    assert swept.base != unedited
    experiment.patch(what="mlp", layer=2, pos=5)
    assert swept.values[1, 5] == pytest.approx(experiment.values()[0], abs=1e-9)


def test_a_condition_follows_new_prompts(experiment):
    experiment.condition("bos-mlp", layer=0)
    lens = experiment.lens
    experiment.prompts(prompt(lens, "a cat"), prompt(lens, "a dog"))
    expected = Experiment(experiment.clean, experiment.corrupt, experiment.metric)
    expected.ablate(what="mlp", layer=0, pos=0)
    assert experiment.run().value == expected.run().value


@pytest.mark.parametrize(
    ("arguments", "layer", "message"),
    [
        (("sinks",), None, r"sinks is not a causal metric, so it has no condition; use metric\('sinks'\)"),
        (("bos-mpl",), None, "did you mean bos-mlp"),
        (("bos-mlp", "write"), None, "has no condition 'write'"),
        (("layer-ablation",), None, "name a layer: condition"),
        (("layer-ablation",), 7, r"no such condition in layer 7; its layers are \[0, 1, 2\]"),
    ],
)
def test_the_error_for_a_condition_that_does_not_exist(experiment, arguments, layer, message):
    with pytest.raises(InputError, match=message):
        experiment.condition(*arguments, layer=layer)
    assert not experiment.patched()


def test_a_metric_is_measured_without_and_with_the_edits(experiment):
    lens = experiment.lens
    result = experiment.measure("bos-norm")
    assert [row[1] for row in result.rows] == [row[2] for row in result.rows]
    experiment.ablate(what="resid", layer=2, pos=0, value=5.0)
    result = experiment.measure("bos-norm")
    assert result.rows[1][1] == result.rows[1][2] or result.rows[1][2] is not None
    norms = {}
    lens.stream(
        experiment.corrupt.tokens,
        [
            *experiment.hooks(),
            ("blocks.2.hook_resid_post", lambda x, hook: norms.__setitem__("x", x[0].norm(dim=-1))),
        ],
    )
    ratio = float(norms["x"][0] / norms["x"][1:].mean())
    assert result.rows[2][2] == pytest.approx(ratio, rel=1e-5)
    assert "before" in str(result)
    assert not any("intervals are missing" in warning for warning in result.warnings)


def metrics_with_null() -> list[str]:
    """Return the metrics by layer that have a null for one text."""
    metrics = {name: plugins().metric(name) for name in metric_names()}
    return [
        name
        for name, metric in metrics.items()
        if (display := metric.display) is not None
        and display.rows == "layer"
        and display.null is not None
        and not metric.reads_own_sequences()
        and name != "position-probe"  # which is fitted on other texts than it is tested on
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", metrics_with_null())
def test_each_value_has_the_null_of_a_run_of_the_same_text(experiment, name):
    """The value and the null are those that `phaselens run` computes on the text."""
    measured = experiment.measure(name)
    display = plugins().metric(name).display
    for column, text in ((1, experiment.corrupt), (3, experiment.clean)):
        run = phaselens.run(experiment.lens, metrics=name, texts=[text.text])
        records = run.metrics[name].tables[display.table].records()
        assert [row[column] for row in measured.rows] == pytest.approx(
            [r[display.value] for r in records], abs=1e-9
        )
        assert [row[column] for row in measured.nulls] == pytest.approx(
            [r[display.null] for r in records], abs=1e-9
        )
    lines = str(measured).splitlines()
    assert lines[1].split() == ["layer", "before", "null", "after", "null", "clean", "null"]
    for line, values, nulls in zip(lines[2:], measured.rows, measured.nulls, strict=False):
        assert None not in (*values, *nulls)
        pairs = zip(values[1:], nulls[1:], strict=True)
        assert line.split() == [str(values[0]), *(f"{number:.4f}" for pair in pairs for number in pair)]
    assert len(measured.nulls) == 3


def test_nulls_follow_the_edits(experiment):
    experiment.ablate(what="resid", layer=2, pos=0, value=50.0)
    null = experiment.measure("compression").nulls[2]
    assert null[1] != null[2]


def test_a_condition_that_edits_no_position_is_set_aside(experiment, monkeypatch):
    from dataclasses import replace

    from phaselens.patching import plugin_metrics

    find = plugin_metrics.find_condition

    def at_position_7(*arguments):
        condition = find(*arguments)
        return replace(condition, edits=[replace(edit, positions=[7]) for edit in condition.edits])

    monkeypatch.setattr("phaselens.patching.experiment.find_condition", at_position_7)
    experiment.condition("bos-mlp", layer=1)
    experiment.prompts(prompt(experiment.lens, "a cat"))
    assert (
        experiment.patched()[0].set_aside == "the prompts have 6 tokens, and the condition edits none of them"
    )
    experiment.prompts(prompt(experiment.lens, "to be or not"))
    assert not experiment.patched().set_aside


def test_the_layer_of_a_condition_may_count_from_the_end(experiment):
    assert experiment.condition("bos-mlp", layer=-1).condition.layer == 2


def test_the_layer_of_a_condition_may_be_a_numpy_number(experiment):
    edit = experiment.condition("bos-mlp", layer=np.int64(1))
    assert edit.condition.layer == 1
    assert edit.code == "condition('bos-mlp', layer=1)"
    for layer in (True, 1.0, np.float64(1)):
        with pytest.raises(InputError, match="a condition has one layer; give a whole number"):
            experiment.condition("bos-mlp", layer=layer)


def test_sinks_follow_an_edited_pattern(experiment):
    """With all attention on position 0, every head is a sink."""

    def park(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        parked = torch.zeros_like(pattern)
        parked[..., 0] = 1.0
        return parked

    with experiment.lens.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", park)]):
        result = experiment.measure("sinks")
    assert result.rows[1][1] == 1.0


def test_causal_and_unknown_metrics_cannot_be_measured(experiment):
    with pytest.raises(InputError, match="bos-mlp is a causal metric"):
        experiment.measure("bos-mlp")
    with pytest.raises(InputError, match="did you mean sinks"):
        experiment.measure("sink")
    with pytest.raises(InputError, match="no parameter 'treshold'; did you mean threshold"):
        experiment.measure("sinks", treshold=0.2)


def test_causal_and_other_metrics_are_listed_separately():
    assert "bos-mlp" in causal_names()
    assert "sinks" in metric_names()
    assert {"attention-patterns", "bos-norm", "bos-write", "massive-values", "sinks"} <= set(
        metrics_with_null()
    )
    assert not set(causal_names()) & set(metric_names())
    assert lens_of("llama") is not None
