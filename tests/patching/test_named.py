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


def test_a_condition_is_the_same_as_the_edit_it_stands_for(experiment):
    experiment.condition("bos-mlp", layer=1)
    by_name = experiment.run()
    assert str(experiment.patched()).startswith("1. condition bos-mlp: ")
    assert str(experiment.patched()).endswith("layer 1")
    experiment.undo()
    experiment.ablate(what="mlp", layer=1, pos=0)
    assert experiment.run().value == by_name.value
    assert by_name.value[0] != by_name.value[1]


def test_a_condition_that_chooses_by_texts_acts_on_every_row_of_a_sweep(experiment):
    """A sweep's cell is a whole run with the condition and one patch more."""
    experiment.condition("qk-disruption", multiple=1.5)
    bare = experiment_of().values()[0]
    swept = experiment.sweep("mlp", layer=[1, 2])
    assert swept.base != bare
    experiment.patch(what="mlp", layer=2, pos=5)
    assert swept.values[1, 5] == pytest.approx(experiment.values()[0], abs=1e-9)


def test_a_condition_follows_new_prompts(experiment):
    experiment.condition("bos-mlp", layer=0)
    lens = experiment.lens
    experiment.prompts(prompt(lens, "a cat"), prompt(lens, "a dog"))
    other = Experiment(experiment.clean, experiment.corrupt, experiment.metric)
    other.ablate(what="mlp", layer=0, pos=0)
    assert experiment.run().value == other.run().value


@pytest.mark.parametrize(
    ("arguments", "layer", "message"),
    [
        (("sinks",), None, r"sinks changes nothing, so it has no condition; see metric\('sinks'\)"),
        (("bos-mpl",), None, "did you mean bos-mlp"),
        (("bos-mlp", "write"), None, "has no condition 'write'"),
        (("layer-ablation",), None, "name a layer: condition"),
        (("layer-ablation",), 7, r"no such condition in layer 7; its layers here: \[0, 1, 2\]"),
    ],
)
def test_a_condition_that_is_not_there_is_said_in_one_line(experiment, arguments, layer, message):
    with pytest.raises(InputError, match=message):
        experiment.condition(*arguments, layer=layer)
    assert not experiment.patched()


def test_a_metric_is_measured_without_and_with_the_edits(experiment):
    lens = experiment.lens
    found = experiment.measure("bos-norm")
    assert [row[1] for row in found.rows] == [row[2] for row in found.rows]
    experiment.ablate(what="resid", layer=2, pos=0, value=5.0)
    found = experiment.measure("bos-norm")
    assert found.rows[1][1] == found.rows[1][2] or found.rows[1][2] is not None
    kept = {}
    lens.stream(
        experiment.corrupt.tokens,
        [
            *experiment.hooks(),
            ("blocks.2.hook_resid_post", lambda x, hook: kept.__setitem__("x", x[0].norm(dim=-1))),
        ],
    )
    ratio = float(kept["x"][0] / kept["x"][1:].mean())
    assert found.rows[2][2] == pytest.approx(ratio, rel=1e-5)
    assert "before" in str(found)
    assert not any("intervals are null" in warning for warning in found.warnings)


def with_null() -> list[str]:
    """Metrics by layer that have a null."""
    displays = {name: plugins().metric(name).display for name in metric_names()}
    return [
        name
        for name, display in displays.items()
        if display is not None and display.rows == "layer" and display.null is not None
    ]


@pytest.mark.parametrize("name", with_null())
def test_each_value_stands_beside_the_null_of_a_run_of_the_same_text(experiment, name):
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


def test_a_condition_that_cannot_write_anywhere_is_set_aside(experiment, monkeypatch):
    from dataclasses import replace

    from phaselens.patching import named

    find = named.find_condition

    def at_position_7(*arguments):
        condition = find(*arguments)
        return replace(condition, edits=[replace(edit, positions=[7]) for edit in condition.edits])

    monkeypatch.setattr("phaselens.patching.experiment.find_condition", at_position_7)
    experiment.condition("bos-mlp", layer=1)
    experiment.prompts(prompt(experiment.lens, "a cat"))
    assert experiment.patched()[0].set_aside == "the prompts have 6 tokens, and none at which it writes"
    experiment.prompts(prompt(experiment.lens, "to be or not"))
    assert not experiment.patched().set_aside


def test_a_layer_of_a_condition_counts_from_the_end_too(experiment):
    assert experiment.condition("bos-mlp", layer=-1).condition.layer == 2


def test_a_layer_of_a_condition_may_be_a_number_of_numpy(experiment):
    edit = experiment.condition("bos-mlp", layer=np.int64(1))
    assert edit.condition.layer == 1
    assert edit.code == "condition('bos-mlp', layer=1)"
    for layer in (True, 1.0, np.float64(1)):
        with pytest.raises(InputError, match="a condition has one layer; give a whole number"):
            experiment.condition("bos-mlp", layer=layer)


def test_sinks_follow_an_edited_pattern(experiment):
    """All attention on position 0: every head is a sink."""

    def park(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        parked = torch.zeros_like(pattern)
        parked[..., 0] = 1.0
        return parked

    with experiment.lens.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", park)]):
        found = experiment.measure("sinks")
    assert found.rows[1][1] == 1.0


def test_a_causal_metric_is_a_condition_and_an_unknown_one_is_nothing(experiment):
    with pytest.raises(InputError, match="bos-mlp is a causal metric"):
        experiment.measure("bos-mlp")
    with pytest.raises(InputError, match="did you mean sinks"):
        experiment.measure("sink")
    with pytest.raises(InputError, match="no parameter 'treshold'; did you mean threshold"):
        experiment.measure("sinks", treshold=0.2)


def test_names_are_told_apart():
    assert "bos-mlp" in causal_names()
    assert "sinks" in metric_names()
    assert {"attention-patterns", "bos-norm", "bos-write", "massive-values", "sinks"} <= set(with_null())
    assert not set(causal_names()) & set(metric_names())
    assert lens_of("llama") is not None
