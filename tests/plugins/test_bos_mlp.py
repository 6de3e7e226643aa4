"""bos-mlp: planted truths, each definition's layer, removing what was never written, and a naive reference."""

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
from phaselens.plugin import BASELINE, Outcome, plugins
from phaselens.runs import gather
from phaselens.testing import check_metric
from tests.marks import first_quick
from tests.plugins.ablations import (
    TEXTS,
    content,
    naive,
    notes,
    perplexity,
    predicted,
    row,
    rows,
    run,
)
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


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
        assert two[name] == same, name


def layer_of(found: Any) -> dict[str, Any]:
    return {record["definition"]: record["layer"] for record in rows(found, METRIC, "layers_used")}


def test_the_definitions_name_different_layers_and_only_the_one_that_writes_matters(defined: Any) -> None:
    """The study's protocol ablates the layer of the largest ratio, where the MLP adds nothing: a no-op, 1.00."""
    assert layer_of(defined) == {
        "write layer": WRITER,
        "write layer below the last": WRITER,
        "largest BOS ratio": SHRINKER,
        "first BOS ratio > 2": 0,
        "largest MLP at BOS": WRITER,
    }
    assert row(defined, METRIC, "write layer")["ratio"] > 1.5
    for idle in ("largest BOS ratio", "first BOS ratio > 2"):
        one = row(defined, METRIC, idle)
        assert (one["ratio"], one["delta_nats"], one["ci_low"], one["ci_high"]) == (1.0, 0.0, 1.0, 1.0)
        assert notes(defined, f"{idle}: ", "nearly a no-op", f"written by layer {WRITER}")
        assert notes(defined, f"{idle} (layer", "stood there already, in every text")
    assert not notes(defined, "write layer: ", "nearly a no-op")


def test_definitions_of_one_layer_share_a_condition_and_all_are_named(defined: Any) -> None:
    where = {record["definition"]: record["condition"] for record in rows(defined, METRIC, "layers_used")}
    assert where["largest MLP at BOS"] == where["write layer below the last"] == "write layer"
    assert where["first BOS ratio > 2"] == "first BOS ratio > 2"
    assert notes(defined, "largest MLP at BOS: layer 1, as write layer")
    edited = [(one["condition"], one["layer"]) for one in rows(defined, METRIC)[1:]]
    assert len(edited) == len(set(edited)) == 2 * len({0, WRITER, SHRINKER})


def test_the_loss_is_that_of_a_model_whose_writer_was_cut_out(planted: Any) -> None:
    """The truth is in the weights: without its MLP's output, the writing layer adds nothing anywhere."""
    cut = bos_model()
    with torch.no_grad():
        cut.model.layers[WRITER].mlp.down_proj.weight.zero_()
    found = run(METRIC, planted, params={"seeds": 0})
    losses = []
    for text in TEXTS:
        ids = torch.tensor([planted.text_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(cut(ids).logits[0, :-1], ids[0, 1:]).item())
    expected = perplexity(np.array(losses), predicted(planted))
    assert row(found, METRIC, "write layer")["ppl"] == pytest.approx(expected, rel=1e-9)


def test_a_sweep_finds_the_one_layer_and_leaves_the_others_at_exactly_one(planted: Any) -> None:
    found = run(METRIC, planted, params={"at": "sweep", "seeds": 0})
    ratios = {one["layer"]: one["ratio"] for one in rows(found, METRIC)[1:]}
    assert ratios.pop(WRITER) > 1.5
    assert list(ratios.values()) == [1.0, 1.0, 1.0]
    assert {one["condition"] for one in rows(found, METRIC)[1:]} == {"each layer"}
    assert {one["condition"] for one in rows(found, METRIC, "layers_used")} == {"each layer"}


def test_the_write_layer_stays_beside_a_layer_that_is_given(planted: Any) -> None:
    found = run(METRIC, planted, params={"layer": SHRINKER, "seeds": 1})
    assert [(one["condition"], one["layer"]) for one in rows(found, METRIC)[1::2]] == [
        ("write layer", WRITER),
        ("given layer", SHRINKER),
    ]
    assert row(found, METRIC, "given layer")["ratio"] == 1.0
    assert notes(
        found, "given layer: the MLP of layer 2 adds a vector of norm 0 to position 0, whose norm is 208"
    )
    same = run(METRIC, planted, params={"layer": WRITER, "seeds": 0})
    assert len(rows(same, METRIC)) == 2
    assert notes(same, f"given layer: layer {WRITER}, as write layer")


def test_what_is_removed_is_reported_beside_the_norm_that_stands_there(planted: Any, defined: Any) -> None:
    used = {record["definition"]: record for record in rows(defined, METRIC, "layers_used")}
    seen: dict[str, torch.Tensor] = {}
    ids = torch.tensor([planted.text_tokenizer(TEXTS[0])["input_ids"]])
    points = [f"blocks.{WRITER}.hook_mlp_out", f"blocks.{WRITER}.hook_resid_post"]
    planted.stream(
        ids, [(name, lambda x, hook, name=name: seen.__setitem__(name, x[0, 0])) for name in points]
    )
    mlp, stream = (float(seen[name].norm()) for name in points)
    assert used["write layer"]["mlp_norm"] == pytest.approx(mlp, rel=1e-12)
    assert used["write layer"]["bos_norm"] == pytest.approx(stream, rel=1e-12)
    assert used["write layer"]["removed"] == pytest.approx(mlp / stream, rel=1e-12)
    assert used["largest BOS ratio"]["removed"] == 0.0
    changes = [record["bos_change"] for record in rows(defined, METRIC, "writes")]
    assert int(np.argmax(changes)) == WRITER
    assert changes[0] == changes[SHRINKER] == 0.0


def test_several_writers_are_told_of_and_can_be_removed_together() -> None:
    """Three layers write a third each: without one, most of the norm, and of what reads it, is still there."""
    lens = bos_lens(writers=THREE, shrinks=False)
    found = run(METRIC, lens, params={"at": "all", "seeds": 0})
    one, every = (row(found, METRIC, name)["delta_nats"] for name in ("write layer", "all layers"))
    assert every > 1.5 * one > 0
    assert row(found, METRIC, "all layers")["layer"] is None
    told = run(METRIC, lens, params={"seeds": 0})
    assert notes(told, "write layer: layer 2 adds", "at=all removes them together")
    assert not notes(run(METRIC, bos_lens(), params={"seeds": 0}), "at=all")


def test_a_write_in_the_last_layer_is_read_by_nobody() -> None:
    """It can change the first predicted token and no other; the layer that writes most below it stands beside."""
    lens = bos_lens(writers=LAST, shrinks=False)
    found = run(METRIC, lens, params={"seeds": 0})
    assert layer_of(found)["write layer"] == READER
    assert notes(found, "write layer: 3 is the last layer")
    assert not notes(run(METRIC, lens, params={"at": "sweep", "seeds": 0}), "is the last layer")
    split = {one["condition"]: one for one in rows(found, METRIC, "reach")}
    assert split["write layer"]["delta_later"] == 0.0
    assert split["write layer"]["delta_first"] != 0.0
    assert split["write layer below the last"]["layer"] == WRITER
    assert split["write layer below the last"]["delta_later"] > 0.1


def test_nothing_writes() -> None:
    """No layer adds to the norm of position 0: the layers are null with a reason, and nothing is run in their name."""
    found = run(METRIC, bos_lens(writers={}, shrinks=True), params={"seeds": 0})
    assert [one["condition"] for one in rows(found, METRIC)] == ["baseline"]
    assert layer_of(found)["write layer"] is None
    assert notes(found, "write layer is null: no layer adds to the norm of position 0")


def test_the_first_token_and_the_later_ones_add_up(defined: Any, planted: Any) -> None:
    n = predicted(planted)
    for one in rows(defined, METRIC, "reach"):
        whole = row(defined, METRIC, one["condition"], one["layer"])["delta_nats"]
        parts = one["delta_first"] * len(n) + one["delta_later"] * (n - 1).sum()
        assert parts / n.sum() == pytest.approx(whole, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("family", first_quick(["llama-gqa", "gpt2", "gemma2", "gpt-neox"]))
def test_every_number_is_that_of_a_naive_implementation(family: str) -> None:
    """TransformerLens' run_with_hooks and torch's cross_entropy, one text at a time, in every layer."""
    from phaselens_plugins._causal import elsewhere

    lens = toy_lens(family, dtype=torch.float64)
    found = run(METRIC, lens, params={"at": "sweep", "seeds": 2})
    n, lengths = predicted(lens), predicted(lens) + 1
    before = naive(lens, [])
    for layer in range(lens.info.n_layers):
        after = naive(lens, [f"blocks.{layer}.hook_mlp_out"])
        one = row(found, METRIC, "each layer", layer)
        assert one["ppl"] == pytest.approx(perplexity(after, n), rel=1e-6)
        assert one["ratio"] == pytest.approx(perplexity(after, n) / perplexity(before, n), rel=1e-6)
        assert one["delta_nats"] == pytest.approx(math.log(one["ratio"]), rel=1e-9, abs=1e-12)
        assert one["ppl_length_weighted"] == pytest.approx(perplexity(after, lengths), rel=1e-6)
        draws = [
            naive(
                lens,
                [f"blocks.{layer}.hook_mlp_out"],
                lambda length, text, seed=seed: elsewhere(length, content(text), seed),
            )
            for seed in range(2)
        ]
        control = row(found, METRIC, "other position: each layer", layer)
        assert control["ppl"] == pytest.approx(perplexity(np.mean(draws, 0), n), rel=1e-6)
        assert control["n_seeds"] == 2
        (contrast,) = [each for each in rows(found, METRIC, "contrasts") if each["layer"] == layer]
        assert contrast["delta_nats"] == pytest.approx(
            one["delta_nats"] - control["delta_nats"], rel=1e-6, abs=1e-9
        )


def test_the_study_weighs_texts_by_their_tokens_where_one_fewer_is_predicted(planted: Any) -> None:
    """T in place of T − 1 is another number; it has a column of its own, and `ppl` is not it."""
    one = row(run(METRIC, planted, params={"seeds": 0}), METRIC, "write layer")
    n = predicted(planted)
    losses, before = naive(planted, [f"blocks.{WRITER}.hook_mlp_out"]), naive(planted, [])
    assert one["ppl_length_weighted"] == pytest.approx(perplexity(losses, n + 1), rel=1e-6)
    ratio = perplexity(losses, n + 1) / perplexity(before, n + 1)
    assert one["ratio_length_weighted"] == pytest.approx(ratio, rel=1e-6)
    assert abs(one["ppl"] / one["ppl_length_weighted"] - 1) > 1e-3


def test_conditions_order_and_batches_change_no_number() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    params = {"at": "definitions", "layer": 0, "seeds": 2}
    usual = run(METRIC, lens, params=params)
    others = [run(METRIC, lens, params=params, batch_tokens=1), run(METRIC, lens, TEXTS[::-1], params=params)]
    for other in others:
        for table in ("conditions", "contrasts", "reach", "layers_used", "writes"):
            for one, two in zip(rows(usual, METRIC, table), rows(other, METRIC, table), strict=True):
                assert_same(one, two)
    alone = run(METRIC, lens, params={"at": "sweep", "seeds": 0})
    write = row(usual, METRIC, "write layer")
    assert row(alone, METRIC, "each layer", write["layer"])["ppl"] == pytest.approx(write["ppl"], rel=1e-12)


def test_one_text_has_no_interval_and_says_why(planted: Any) -> None:
    found = run(METRIC, planted, [TEXTS[0]], params={"seeds": 1})
    one = row(found, METRIC, "write layer")
    assert one["ratio"] > 1
    assert one["ci_low"] is one["ci_high"] is one["p_value"] is None
    assert row(found, METRIC, "write layer", table="reach")["later_low"] is None
    assert notes(found, "ci_low", "2")


def test_a_text_of_two_tokens_has_no_later_token(planted: Any) -> None:
    found = run(METRIC, planted, ["a", "b"], params={"seeds": 1})
    split = row(found, METRIC, "write layer", table="reach")
    assert split["delta_first"] is not None
    assert (split["delta_later"], split["n_texts"]) == (None, 0)
    assert notes(found, "delta_nats of later tokens is null")


def test_norms_that_are_nan_leave_no_layer_and_no_condition() -> None:
    lens = bos_lens()
    with torch.no_grad():
        lens.original_model.get_input_embeddings().weight[0, 5] = float("nan")
    metric = plugins().metric(METRIC)
    asked = metric(lens.info, metric.Params())
    texts = texts_from(TEXTS)
    encoder = Encoder(lens.text_tokenizer, bos_token_id=0)
    tokens = [encoder.tokens(text, 512) for text in texts]
    gather(lens, tokens, asked, [[0, 1, 2, 3]])
    assert asked.conditions() == []
    found = run(METRIC, lens, params={"seeds": 0})
    assert [one["ppl"] for one in rows(found, METRIC)] == [None]
    assert notes(found, "baseline: ppl", "NaN or infinite")
    assert not notes(found, "no layer adds to the norm")
    assert any("NaN or infinite in every layer" in note for note in asked.warnings)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("RoPE", {"write layer": 1, "largest BOS ratio": 1, "first BOS ratio > 2": 0}),
        ("DroPE", {"write layer": 1, "largest BOS ratio": 2, "first BOS ratio > 2": 1}),
    ],
)
def test_the_definitions_on_published_curves(model: str, layers: dict[str, int]) -> None:
    """Norms of two 7B models as they were stored: in one the study ablated a layer that writes nearly nothing."""
    curves = json.loads((GOLDENS / "bos_curves.json").read_text())[model]
    metric = plugins().metric(METRIC)
    asked = metric(info(n_layers=32), metric.Params(at="definitions", seeds=0))
    for layer, (norm, ratio) in enumerate(zip(curves["bos_norm"], curves["bos_ratio"], strict=True)):
        stream = torch.tensor([[[norm], [norm / ratio]]], dtype=torch.float64)
        added = torch.tensor([[[curves["mlp_norm"].get(str(layer), 0.0)], [1.0]]], dtype=torch.float64)
        points = {"hook_resid_post": stream, "hook_mlp_out": added}
        asked.update(view(points if layer else points | {"hook_resid_pre": 0 * stream}, (2,), layer))
    found = asked.conditions()
    for condition in (BASELINE, *found):
        asked.record(condition, Outcome("a", 0, "a", 2, np.array([1.0]), np.array([3]), np.array([3])))
    asked.losses.conditions = {condition.key: condition for condition in found}
    used = {record["definition"]: record for record in asked.compute()["layers_used"].records()}
    assert {name: used[name]["layer"] for name in layers} == layers
    assert used["write layer"]["removed"] > 0.99
    no_ops = [
        note for note in asked.warnings if "nearly a no-op; most of that norm is written by layer 1" in note
    ]
    expected = (
        "largest BOS ratio: the MLP of layer 2 adds a vector of norm 7.28 to position 0, whose norm is 504"
    )
    assert [note.split(": removing")[0] for note in no_ops] == ([expected] if model == "DroPE" else [])


def test_a_layer_that_is_not_there_is_refused() -> None:
    asked = [(plugins().metric(METRIC), {"layer": 2})]
    found = phaselens.run(toy_lens("llama"), metrics=asked, texts=[letters(4)])
    (failure,) = found.metrics[METRIC].failures
    assert failure.message == "layer is 2, but llama has layers 0 to 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "params", [{"at": "definitions", "layer": 0}, {"at": "sweep"}, {"at": "all", "seeds": 0}]
)
def test_the_contract(params: dict[str, Any]) -> None:
    check_metric(plugins().metric(METRIC), params)
