"""bos-mlp: planted truths, the layer of each definition, removal of an output of zero, and a naive reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.data import Encoder, texts_from
from phaselens.plugin import BASELINE, TextOutcome, plugins
from phaselens.runs import feed_metric
from phaselens.testing import check_metric
from tests.marks import mark_later_slow
from tests.plugins.ablations import TEXTS, content, naive, notes, perplexity, predicted, row, rows, run
from tests.plugins.bos_models import LAST, READER, SHRINKER, THREE, WRITER, bos_lens, bos_model
from tests.plugins.views import info, view
from tests.toys import letters, toy_lens

METRIC = "bos-mlp"
GOLDENS = Path(__file__).parents[1] / "data" / "goldens"


@pytest.fixture(scope="module")
def planted() -> Any:
    return bos_lens()


@pytest.fixture(scope="module")
def defined(planted: Any) -> Any:
    return run(METRIC, planted, params={"at": "definitions", "seeds": 2})


def assert_same(expected: dict[str, Any], actual: dict[str, Any]) -> None:
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        expected_value = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
        assert actual[name] == expected_value, name


def layer_of(result: Any) -> dict[str, Any]:
    return {record["definition"]: record["layer"] for record in rows(result, METRIC, "layers_used")}


def test_definitions_select_different_layers_and_only_the_writer_matters(defined: Any) -> None:
    """The study's protocol ablates the layer of the largest ratio, where the MLP adds nothing: a no-op, ratio 1.00."""
    assert layer_of(defined) == {
        "write layer": WRITER,
        "write layer below the last": WRITER,
        "largest BOS ratio": SHRINKER,
        "first BOS ratio > 2": 0,
        "largest MLP at BOS": WRITER,
    }
    assert row(defined, METRIC, "write layer")["ratio"] > 1.5
    for idle in ("largest BOS ratio", "first BOS ratio > 2"):
        record = row(defined, METRIC, idle)
        assert (record["ratio"], record["delta_nats"], record["ci_low"], record["ci_high"]) == (
            1.0,
            0.0,
            1.0,
            1.0,
        )
        assert notes(defined, f"{idle}: ", "nearly a no-op", f"written by layer {WRITER}")
        assert notes(defined, f"{idle} (layer", "every text already had the value")
    assert not notes(defined, "write layer: ", "nearly a no-op")


def test_definitions_of_one_layer_share_a_condition_with_a_warning(defined: Any) -> None:
    condition_of = {
        record["definition"]: record["condition"] for record in rows(defined, METRIC, "layers_used")
    }
    assert condition_of["largest MLP at BOS"] == condition_of["write layer below the last"] == "write layer"
    assert condition_of["first BOS ratio > 2"] == "first BOS ratio > 2"
    assert notes(defined, "largest MLP at BOS: layer 1, like write layer")
    edited = [(row["condition"], row["layer"]) for row in rows(defined, METRIC)[1:]]
    assert len(edited) == len(set(edited)) == 2 * len({0, WRITER, SHRINKER})


def test_the_loss_equals_that_of_a_model_without_the_writer(planted: Any) -> None:
    """The reference has the writer's MLP weights zeroed: the layer then adds nothing at any position."""
    cut = bos_model()
    with torch.no_grad():
        cut.model.layers[WRITER].mlp.down_proj.weight.zero_()
    result = run(METRIC, planted, params={"seeds": 0})
    losses = []
    for text in TEXTS:
        ids = torch.tensor([planted.text_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(cut(ids).logits[0, :-1], ids[0, 1:]).item())
    expected = perplexity(np.array(losses), predicted(planted))
    assert row(result, METRIC, "write layer")["ppl"] == pytest.approx(expected, rel=1e-9)


def test_a_sweep_changes_the_writer_alone_and_all_other_ratios_are_exactly_one(planted: Any) -> None:
    result = run(METRIC, planted, params={"at": "sweep", "seeds": 0})
    ratios = {record["layer"]: record["ratio"] for record in rows(result, METRIC)[1:]}
    assert ratios.pop(WRITER) > 1.5
    assert list(ratios.values()) == [1.0, 1.0, 1.0]
    assert {record["condition"] for record in rows(result, METRIC)[1:]} == {"each layer"}
    assert {record["condition"] for record in rows(result, METRIC, "layers_used")} == {"each layer"}


def test_the_write_layer_is_run_beside_a_given_layer(planted: Any) -> None:
    result = run(METRIC, planted, params={"layer": SHRINKER, "seeds": 1})
    assert [(record["condition"], record["layer"]) for record in rows(result, METRIC)[1::2]] == [
        ("write layer", WRITER),
        ("given layer", SHRINKER),
    ]
    assert row(result, METRIC, "given layer")["ratio"] == 1.0
    assert notes(
        result, "given layer: the MLP of layer 2 adds a vector of norm 0 to position 0, whose norm is 208"
    )
    same_layer_result = run(METRIC, planted, params={"layer": WRITER, "seeds": 0})
    assert len(rows(same_layer_result, METRIC)) == 2
    assert notes(same_layer_result, f"given layer: layer {WRITER}, like write layer")


def test_the_removed_norm_is_reported_with_the_norm_of_the_stream(planted: Any, defined: Any) -> None:
    used = {record["definition"]: record for record in rows(defined, METRIC, "layers_used")}
    activations: dict[str, torch.Tensor] = {}
    ids = torch.tensor([planted.text_tokenizer(TEXTS[0])["input_ids"]])
    points = [f"blocks.{WRITER}.hook_mlp_out", f"blocks.{WRITER}.hook_resid_post"]
    planted.stream(
        ids, [(name, lambda x, hook, name=name: activations.__setitem__(name, x[0, 0])) for name in points]
    )
    mlp, stream = (float(activations[name].norm()) for name in points)
    assert used["write layer"]["mlp_norm"] == pytest.approx(mlp, rel=1e-12)
    assert used["write layer"]["bos_norm"] == pytest.approx(stream, rel=1e-12)
    assert used["write layer"]["removed"] == pytest.approx(mlp / stream, rel=1e-12)
    assert used["largest BOS ratio"]["removed"] == 0.0
    changes = [record["bos_change"] for record in rows(defined, METRIC, "writes")]
    assert int(np.argmax(changes)) == WRITER
    assert changes[0] == changes[SHRINKER] == 0.0


@pytest.mark.slow
def test_several_writers_give_a_warning_and_can_be_removed_together() -> None:
    """Three layers write a third each: without one of them, most of the norm and of its effect remains."""
    lens = bos_lens(writers=THREE, shrinks=False)
    all_result = run(METRIC, lens, params={"at": "all", "seeds": 0})
    write_delta, all_delta = (
        row(all_result, METRIC, name)["delta_nats"] for name in ("write layer", "all layers")
    )
    assert all_delta > 1.5 * write_delta > 0
    assert row(all_result, METRIC, "all layers")["layer"] is None
    result = run(METRIC, lens, params={"seeds": 0})
    assert notes(result, "write layer: layer 2 adds", "at=all removes them together")
    assert not notes(run(METRIC, bos_lens(), params={"seeds": 0}), "at=all")


def test_a_write_in_the_last_layer_is_not_read() -> None:
    """The write can change only the first predicted token; the largest write below the last layer is run too."""
    lens = bos_lens(writers=LAST, shrinks=False)
    result = run(METRIC, lens, params={"seeds": 0})
    assert layer_of(result)["write layer"] == READER
    assert notes(result, "write layer: 3 is the last layer")
    assert not notes(run(METRIC, lens, params={"at": "sweep", "seeds": 0}), "is the last layer")
    reach = {record["condition"]: record for record in rows(result, METRIC, "reach")}
    assert reach["write layer"]["delta_later"] == 0.0
    assert reach["write layer"]["delta_first"] != 0.0
    assert reach["write layer below the last"]["layer"] == WRITER
    assert reach["write layer below the last"]["delta_later"] > 0.1


def test_without_a_writer_no_layer_is_selected() -> None:
    """No layer adds to the norm of position 0: the layers are missing with a reason, and no condition is run."""
    result = run(METRIC, bos_lens(writers={}, shrinks=True), params={"seeds": 0})
    assert [record["condition"] for record in rows(result, METRIC)] == ["baseline"]
    assert layer_of(result)["write layer"] is None
    assert notes(result, "write layer is missing: no layer adds to the norm of position 0")


def test_changes_of_the_first_and_later_tokens_add_up(defined: Any, planted: Any) -> None:
    n = predicted(planted)
    for record in rows(defined, METRIC, "reach"):
        delta = row(defined, METRIC, record["condition"], record["layer"])["delta_nats"]
        total = record["delta_first"] * len(n) + record["delta_later"] * (n - 1).sum()
        assert total / n.sum() == pytest.approx(delta, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "gpt2", "gemma2", "gpt-neox"]))
def test_every_number_equals_a_naive_implementation(family: str) -> None:
    """TransformerLens' run_with_hooks and torch's cross_entropy, one text at a time, in every layer."""
    from phaselens_plugins._causal import draw_other_position

    lens = toy_lens(family, dtype=torch.float64)
    result = run(METRIC, lens, params={"at": "sweep", "seeds": 2})
    n, lengths = predicted(lens), predicted(lens) + 1
    base_losses = naive(lens, [])
    for layer in range(lens.info.n_layers):
        edited_losses = naive(lens, [f"blocks.{layer}.hook_mlp_out"])
        record = row(result, METRIC, "each layer", layer)
        assert record["ppl"] == pytest.approx(perplexity(edited_losses, n), rel=1e-6)
        assert record["ratio"] == pytest.approx(
            perplexity(edited_losses, n) / perplexity(base_losses, n), rel=1e-6
        )
        assert record["delta_nats"] == pytest.approx(math.log(record["ratio"]), rel=1e-9, abs=1e-12)
        assert record["ppl_length_weighted"] == pytest.approx(perplexity(edited_losses, lengths), rel=1e-6)
        draws = [
            naive(
                lens,
                [f"blocks.{layer}.hook_mlp_out"],
                lambda length, text, seed=seed: draw_other_position(length, content(text), seed),
            )
            for seed in range(2)
        ]
        control = row(result, METRIC, "other position: each layer", layer)
        assert control["ppl"] == pytest.approx(perplexity(np.mean(draws, 0), n), rel=1e-6)
        assert control["n_seeds"] == 2
        (contrast,) = [
            contrast_record
            for contrast_record in rows(result, METRIC, "contrasts")
            if contrast_record["layer"] == layer
        ]
        assert contrast["delta_nats"] == pytest.approx(
            record["delta_nats"] - control["delta_nats"], rel=1e-6, abs=1e-9
        )


def test_the_studys_weights_by_all_tokens_have_columns_of_their_own(planted: Any) -> None:
    """The study weighs texts by T tokens, although T − 1 are predicted; `ppl` uses T − 1."""
    record = row(run(METRIC, planted, params={"seeds": 0}), METRIC, "write layer")
    n = predicted(planted)
    edited_losses, base_losses = naive(planted, [f"blocks.{WRITER}.hook_mlp_out"]), naive(planted, [])
    assert record["ppl_length_weighted"] == pytest.approx(perplexity(edited_losses, n + 1), rel=1e-6)
    ratio = perplexity(edited_losses, n + 1) / perplexity(base_losses, n + 1)
    assert record["ratio_length_weighted"] == pytest.approx(ratio, rel=1e-6)
    assert abs(record["ppl"] / record["ppl_length_weighted"] - 1) > 1e-3


@pytest.mark.slow
def test_conditions_order_and_batches_change_no_number() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    params = {"at": "definitions", "layer": 0, "seeds": 2}
    usual = run(METRIC, lens, params=params)
    variants = [
        run(METRIC, lens, params=params, batch_tokens=1),
        run(METRIC, lens, TEXTS[::-1], params=params),
    ]
    for variant in variants:
        for table in ("conditions", "contrasts", "reach", "layers_used", "writes"):
            for expected, actual in zip(
                rows(usual, METRIC, table), rows(variant, METRIC, table), strict=True
            ):
                assert_same(expected, actual)
    swept = run(METRIC, lens, params={"at": "sweep", "seeds": 0})
    write = row(usual, METRIC, "write layer")
    assert row(swept, METRIC, "each layer", write["layer"])["ppl"] == pytest.approx(write["ppl"], rel=1e-12)


def test_one_text_has_no_interval_with_a_reason(planted: Any) -> None:
    result = run(METRIC, planted, [TEXTS[0]], params={"seeds": 1})
    record = row(result, METRIC, "write layer")
    assert record["ratio"] > 1
    assert record["ci_low"] is record["ci_high"] is record["p_value"] is None
    assert row(result, METRIC, "write layer", table="reach")["later_low"] is None
    assert notes(result, "ci_low", "2")


def test_a_text_of_two_tokens_has_no_later_token(planted: Any) -> None:
    result = run(METRIC, planted, ["a", "b"], params={"seeds": 1})
    record = row(result, METRIC, "write layer", table="reach")
    assert record["delta_first"] is not None
    assert (record["delta_later"], record["n_texts"]) == (None, 0)
    assert notes(result, "delta_nats of later tokens is missing")


def test_norms_of_nan_select_no_layer_and_no_condition() -> None:
    lens = bos_lens()
    with torch.no_grad():
        lens.original_model.get_input_embeddings().weight[0, 5] = float("nan")
    metric_class = plugins().metric(METRIC)
    metric = metric_class(lens.info, metric_class.Params())
    texts = texts_from(TEXTS)
    encoder = Encoder(lens.text_tokenizer, bos_token_id=0)
    tokens = [encoder.tokenize(text, 512) for text in texts]
    feed_metric(lens, tokens, metric, [[0, 1, 2, 3]])
    assert metric.conditions() == []
    result = run(METRIC, lens, params={"seeds": 0})
    assert [record["ppl"] for record in rows(result, METRIC)] == [None]
    assert notes(result, "baseline: ppl", "NaN or infinite")
    assert not notes(result, "no layer adds to the norm")
    assert any("NaN or infinite in every layer" in note for note in metric.warnings)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("RoPE", {"write layer": 1, "largest BOS ratio": 1, "first BOS ratio > 2": 0}),
        ("DroPE", {"write layer": 1, "largest BOS ratio": 2, "first BOS ratio > 2": 1}),
    ],
)
def test_the_definitions_on_published_curves(model: str, layers: dict[str, int]) -> None:
    """Stored norms of two 7B models: in one, the study ablated a layer that writes nearly nothing."""
    curves = json.loads((GOLDENS / "bos_curves.json").read_text())[model]
    metric_class = plugins().metric(METRIC)
    metric = metric_class(info(n_layers=32), metric_class.Params(at="definitions", seeds=0))
    for layer, (norm, ratio) in enumerate(zip(curves["bos_norm"], curves["bos_ratio"], strict=True)):
        stream = torch.tensor([[[norm], [norm / ratio]]], dtype=torch.float64)
        mlp_output = torch.tensor([[[curves["mlp_norm"].get(str(layer), 0.0)], [1.0]]], dtype=torch.float64)
        points = {"hook_resid_post": stream, "hook_mlp_out": mlp_output}
        metric.update(view(points if layer else points | {"hook_resid_pre": 0 * stream}, (2,), layer))
    conditions = metric.conditions()
    for condition in (BASELINE, *conditions):
        metric.record(condition, TextOutcome("a", 0, "a", 2, np.array([1.0]), np.array([3]), np.array([3])))
    metric.losses.conditions = {condition.key: condition for condition in conditions}
    used = {record["definition"]: record for record in metric.compute()["layers_used"].records()}
    assert {name: used[name]["layer"] for name in layers} == layers
    assert used["write layer"]["removed"] > 0.99
    no_ops = [
        note for note in metric.warnings if "nearly a no-op; most of that norm is written by layer 1" in note
    ]
    expected = (
        "largest BOS ratio: the MLP of layer 2 adds a vector of norm 7.28 to position 0, whose norm is 504"
    )
    assert [note.split(": removing")[0] for note in no_ops] == ([expected] if model == "DroPE" else [])


def test_a_layer_that_the_model_lacks_is_refused() -> None:
    metrics = [(plugins().metric(METRIC), {"layer": 2})]
    result = phaselens.run(toy_lens("llama"), metrics=metrics, texts=[letters(4)])
    (failure,) = result.metrics[METRIC].failures
    assert failure.message == "layer is 2, but llama has layers 0 to 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "params", [{"at": "definitions", "layer": 0}, {"at": "sweep"}, {"at": "all", "seeds": 0}]
)
def test_the_metric_keeps_the_contract(params: dict[str, Any]) -> None:
    check_metric(plugins().metric(METRIC), params)
