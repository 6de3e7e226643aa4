"""layer-ablation: attention, MLP, both, and both at position 0, in any layers, against a naive reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.plugin import InputError, plugins
from phaselens.testing import check_metric
from tests.marks import mark_later_slow
from tests.plugins.ablations import content, naive, perplexity, predicted, row, rows, run
from tests.plugins.bos_models import READER, WRITER, bos_lens
from tests.toys import letters, toy_lens

METRIC = "layer-ablation"
ATTN, MLP = "blocks.{}.hook_attn_out", "blocks.{}.hook_mlp_out"
#: Condition name, hook points and position of each part.
PARTS = {
    "attn": ("attention off", [ATTN], None),
    "mlp": ("MLP off", [MLP], None),
    "both": ("attention and MLP off", [ATTN, MLP], None),
    "bos_only": ("attention and MLP off at BOS", [ATTN, MLP], 0),
}


@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "gemma2", "gpt-neox"]))
def test_every_number_equals_a_naive_implementation(family: str) -> None:
    from phaselens_plugins._causal import draw_other_position

    lens = toy_lens(family, dtype=torch.float64)
    n = predicted(lens)
    result = run(METRIC, lens, params={"part": "each", "seeds": 1})
    assert len(rows(result, METRIC)) == 1 + lens.info.n_layers * (len(PARTS) + 1)
    for name, patterns, position in PARTS.values():
        for layer in range(lens.info.n_layers):
            points = [pattern.format(layer) for pattern in patterns]
            record = row(result, METRIC, name, layer)
            assert record["ppl"] == pytest.approx(perplexity(naive(lens, points, position), n), rel=1e-6)
            if position == 0:
                drawn = naive(
                    lens, points, lambda length, text: draw_other_position(length, content(text), 0)
                )
                control = row(result, METRIC, f"other position: {name}", layer)
                assert control["ppl"] == pytest.approx(perplexity(drawn, n), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attn", "both", "bos_only"])
def test_layers_can_be_ablated_together(part: str) -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64, num_hidden_layers=4)
    name, patterns, position = PARTS[part]
    params = {"part": part, "layers": "0,2-3", "together": True, "seeds": 0}
    record = row(run(METRIC, lens, params=params), METRIC, f"{name}, layers 0,2-3")
    points = [pattern.format(layer) for layer in (0, 2, 3) for pattern in patterns]
    expected = perplexity(naive(lens, points, position), predicted(lens))
    assert record["ppl"] == pytest.approx(expected, rel=1e-6)
    assert record["layer"] is None
    all_result = run(METRIC, lens, params=params | {"layers": "all"})
    assert [layer_record["condition"] for layer_record in rows(all_result, METRIC)] == [
        "baseline",
        f"{name}, all layers",
    ]


def test_only_the_named_layers_are_ablated_one_by_one() -> None:
    lens = toy_lens("llama-gqa", num_hidden_layers=4)
    result = run(METRIC, lens, params={"part": "mlp", "layers": "3, 0-1"})
    assert [(record["condition"], record["layer"]) for record in rows(result, METRIC)[1:]] == [
        ("MLP off", 0),
        ("MLP off", 1),
        ("MLP off", 3),
    ]


def test_parts_that_are_already_zero_give_a_ratio_of_exactly_one() -> None:
    result = run(METRIC, bos_lens(), params={"part": "each", "layers": f"0,{WRITER},{READER}", "seeds": 0})
    ratio = {(record["condition"], record["layer"]): record["ratio"] for record in rows(result, METRIC)[1:]}
    for name, _, _ in PARTS.values():
        assert ratio[name, 0] == 1.0
    assert ratio["attention off", WRITER] == 1.0
    assert ratio["MLP off", READER] == 1.0
    assert ratio["MLP off", WRITER] == ratio["attention and MLP off at BOS", WRITER] > 1.5
    assert ratio["attention off", READER] == ratio["attention and MLP off", READER] > 1.5


def test_without_any_layer_the_embedding_alone_predicts() -> None:
    """With all parts of all layers off, only the final norm and the unembedding of the token's embedding remain."""
    lens = toy_lens("llama", dtype=torch.float64)
    result = run(METRIC, lens, params={"together": True}, texts=[letters(12)])
    model = lens.original_model
    ids = torch.tensor(lens.text_tokenizer(letters(12))["input_ids"])
    with torch.no_grad():
        x = model.get_input_embeddings().weight[ids[:-1]]
        x = (
            x
            * (x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
            * model.model.norm.weight
        )
        logits = x @ model.lm_head.weight.T
    expected = torch.nn.functional.cross_entropy(logits, ids[1:]).exp().item()
    assert row(result, METRIC, "attention and MLP off, all layers")["ppl"] == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ("5", "layer is 5, but llama has layers 0 to 1"),
        ("0-2", "layer is 2, but llama has layers 0 to 1"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(layers: str, reason: str) -> None:
    metrics: Any = [(plugins().metric(METRIC), {"layers": layers})]
    result = phaselens.run(toy_lens("llama"), metrics=metrics, texts=[letters(4)])
    (failure,) = result.metrics[METRIC].failures
    assert failure.message == reason


@pytest.mark.parametrize("layers", ["1-0", "one", "0,,1", "-1"])
def test_text_without_layers_is_refused_before_anything_runs(layers: str) -> None:
    with pytest.raises(InputError, match="is neither a layer nor a range; write all, or 0,2-4"):
        plugins().metric(METRIC).Params.parse({"layers": layers})


@pytest.mark.slow
def test_order_and_batches_change_no_number() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    texts = [letters(9), letters(24, 3), letters(15, 11)]
    usual = run(METRIC, lens, texts, params={"part": "each", "seeds": 1})
    for options in ({"batch_tokens": 1, "texts": texts}, {"texts": texts[::-1]}):
        variant = run(METRIC, lens, params={"part": "each", "seeds": 1}, **options)
        for expected_row, actual_row in zip(rows(usual, METRIC), rows(variant, METRIC), strict=True):
            assert (actual_row["condition"], actual_row["layer"]) == (
                expected_row["condition"],
                expected_row["layer"],
            )
            numbers = ("ppl", "ratio", "ci_low", "ci_high", "p_value", "ratio_length_weighted")
            actual, expected = (
                [record_row[name] or np.nan for name in numbers] for record_row in (actual_row, expected_row)
            )
            np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("params", [{"part": "each"}, {"part": "bos_only", "together": True}])
def test_the_metric_keeps_the_contract(params: dict[str, Any]) -> None:
    check_metric(plugins().metric(METRIC), params)
