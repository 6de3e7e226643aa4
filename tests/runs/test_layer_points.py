"""Metrics on models some of whose layers, or all, have no attention."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import phaselens
from phaselens.plugin import LayerView, Metric, TableSpec
from phaselens.testing import tiny_tokenizer
from tests.lens.measured import model_of

TEXTS = ["to be or not to be that is the question", "the slings and arrows of fortune"]


@functools.cache
def lens_of(model_type: str):
    return phaselens.load(model_of(model_type), label=model_type, tokenizer=tiny_tokenizer())


def measured(model_type: str, *metrics: object):
    return phaselens.run([lens_of(model_type)], metrics=list(metrics), texts=TEXTS)


def test_attention_is_missing_in_a_layer_without_it_and_the_reason_is_given():
    run = measured("bamba", "sinks")
    layers = run.table("sinks", "layers").to_pydict()
    assert layers["layer"] == [0, 1]
    assert layers["sink_rate"][0] is None
    assert layers["sink_rate"][1] is not None
    assert "sinks: bamba: layer 0 is mamba, so values are missing there" in run.warnings
    assert not any("NaN" in warning for warning in run.warnings)


def test_metrics_of_the_residual_stream_have_values_in_all_layers():
    run = measured("bamba", "bos-norm", "compression", "massive-activations")
    for metric in ("bos-norm", "compression", "massive-activations"):
        table = run.table(metric, "layers").to_pydict()
        value = next(name for name in table if name not in ("model", "layer"))
        assert None not in table[value], metric


@pytest.mark.parametrize(
    "metric", ["sinks", "attention-patterns", "bos-write", "massive-values", "qk-disruption"]
)
def test_a_model_without_attention_has_empty_tables_and_the_reason(metric):
    run = measured("mamba", metric)
    assert not run.failed
    assert any("layers 0, 1 are MambaMixer" in warning for warning in run.warnings)
    assert all(run.table(metric, name).num_rows == 0 for name in run.metrics[metric].tables)
    assert str(run)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mamba", "bamba", "gemma4_text"])
def test_ablation_of_a_layer_equals_module_hooks_on_the_unwrapped_model(model_type):
    lens = lens_of(model_type)
    run = measured(model_type, ("layer-ablation", {"layers": "0"}))
    table = run.table("layer-ablation", "conditions").to_pydict()
    loss = {name: math.log(ppl) for name, ppl in zip(table["condition"], table["ppl"], strict=True)}
    plan = lens.blocks[0].plan
    aliases = [plan.aliases.get(f"hook_{name}_out") for name in ("attn", "mixer", "mlp")]
    parts = [plan.parts[alias.split(".")[0]] for alias in aliases if alias is not None]
    model = model_of(model_type)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for part in parts:
        layers[0].get_submodule(part).register_forward_hook(
            lambda _module, _inputs, output: (
                (torch.zeros_like(output[0]), *output[1:])
                if isinstance(output, tuple)
                else torch.zeros_like(output)
            )
        )
    losses = []
    for text in TEXTS:
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    expected = float(torch.cat(losses).mean())
    assert loss["attention and MLP off"] == pytest.approx(expected, abs=1e-5)


class Residuals(Metric):
    """Reads a point that only some layers have, and one that all have."""

    name = "residuals"
    version = "1"
    tables = (TableSpec("texts", ()),)

    def hooks(self):
        return ["blocks.{layer}.hook_resid_post", "blocks.{layer}.attn.hook_sink"]

    def update(self, layer: LayerView) -> None:
        self.per_text.add(layer, n_points=torch.full((layer.batch.n,), float(len(layer))))

    def compute(self):
        return {}


class PartialResiduals(Residuals):
    """The same, in all layers."""

    name = "partial-residuals"
    partial_layers = True


def test_only_a_metric_of_partial_layers_gets_a_layer_that_lacks_a_point():
    from phaselens.runs.engine import feed_metric

    lens = lens_of("bamba")
    tokenized = [lens.encoder().tokenize(phaselens.data.Text("a", TEXTS[0]), 16)]
    for metric_class, expected in ((Residuals, [1]), (PartialResiduals, [0, 1])):
        metric = metric_class(lens.info, metric_class.Params())
        feed_metric(lens, tokenized, metric, [[0]])
        assert metric.per_text.layers("n_points") == expected
        assert metric.per_text.stack("n_points").shape == (1, 2)
