"""layer-ablation: attention, MLP, both, and both at position 0, in any layers, against a naive reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.plugin import InputError, plugins
from phaselens.testing import check_metric
from tests.marks import first_quick
from tests.plugins.ablations import content, naive, perplexity, predicted, row, rows, run
from tests.plugins.bos_models import READER, WRITER, bos_lens
from tests.toys import letters, toy_lens

METRIC = "layer-ablation"
ATTN, MLP = "blocks.{}.hook_attn_out", "blocks.{}.hook_mlp_out"
#: Name of the condition, points, position.
PARTS = {
    "attn": ("attention off", [ATTN], None),
    "mlp": ("MLP off", [MLP], None),
    "both": ("attention and MLP off", [ATTN, MLP], None),
    "bos_only": ("attention and MLP off at BOS", [ATTN, MLP], 0),
}


@pytest.mark.parametrize("family", first_quick(["llama-gqa", "gemma2", "gpt-neox"]))
def test_every_number_is_that_of_a_naive_implementation(family: str) -> None:
    from phaselens_plugins._causal import elsewhere

    lens = toy_lens(family, dtype=torch.float64)
    n = predicted(lens)
    found = run(METRIC, lens, params={"part": "each", "seeds": 1})
    assert len(rows(found, METRIC)) == 1 + lens.info.n_layers * (len(PARTS) + 1)
    for name, patterns, position in PARTS.values():
        for layer in range(lens.info.n_layers):
            points = [pattern.format(layer) for pattern in patterns]
            one = row(found, METRIC, name, layer)
            assert one["ppl"] == pytest.approx(perplexity(naive(lens, points, position), n), rel=1e-6)
            if position == 0:
                drawn = naive(lens, points, lambda length, text: elsewhere(length, content(text), 0))
                control = row(found, METRIC, f"other position: {name}", layer)
                assert control["ppl"] == pytest.approx(perplexity(drawn, n), rel=1e-6)


@pytest.mark.parametrize("part", ["attn", "both", "bos_only"])
def test_layers_together(part: str) -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64, num_hidden_layers=4)
    name, patterns, position = PARTS[part]
    params = {"part": part, "layers": "0,2-3", "together": True, "seeds": 0}
    one = row(run(METRIC, lens, params=params), METRIC, f"{name}, layers 0,2-3")
    points = [pattern.format(layer) for layer in (0, 2, 3) for pattern in patterns]
    expected = perplexity(naive(lens, points, position), predicted(lens))
    assert one["ppl"] == pytest.approx(expected, rel=1e-6)
    assert one["layer"] is None
    every = run(METRIC, lens, params=params | {"layers": "all"})
    assert [each["condition"] for each in rows(every, METRIC)] == ["baseline", f"{name}, all layers"]


def test_layers_one_by_one_are_those_named() -> None:
    lens = toy_lens("llama-gqa", num_hidden_layers=4)
    found = run(METRIC, lens, params={"part": "mlp", "layers": "3, 0-1"})
    assert [(one["condition"], one["layer"]) for one in rows(found, METRIC)[1:]] == [
        ("MLP off", 0),
        ("MLP off", 1),
        ("MLP off", 3),
    ]


def test_parts_that_are_zero_already_leave_the_ratio_at_exactly_one() -> None:
    found = run(METRIC, bos_lens(), params={"part": "each", "layers": f"0,{WRITER},{READER}", "seeds": 0})
    ratio = {(one["condition"], one["layer"]): one["ratio"] for one in rows(found, METRIC)[1:]}
    for name, _, _ in PARTS.values():
        assert ratio[name, 0] == 1.0
    assert ratio["attention off", WRITER] == 1.0
    assert ratio["MLP off", READER] == 1.0
    assert ratio["MLP off", WRITER] == ratio["attention and MLP off at BOS", WRITER] > 1.5
    assert ratio["attention off", READER] == ratio["attention and MLP off", READER] > 1.5


def test_a_model_without_any_layer_predicts_from_the_embedding_alone() -> None:
    """All parts of all layers off: the final norm and the unembedding of the token's own embedding are left."""
    lens = toy_lens("llama", dtype=torch.float64)
    found = run(METRIC, lens, params={"together": True}, texts=[letters(12)])
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
    assert row(found, METRIC, "attention and MLP off, all layers")["ppl"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ("5", "layer is 5, but llama has layers 0 to 1"),
        ("0-2", "layer is 2, but llama has layers 0 to 1"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: str, reason: str) -> None:
    asked: Any = [(plugins().metric(METRIC), {"layers": layers})]
    found = phaselens.run(toy_lens("llama"), metrics=asked, texts=[letters(4)])
    (failure,) = found.metrics[METRIC].failures
    assert failure.message == reason


@pytest.mark.parametrize("layers", ["1-0", "one", "0,,1", "-1"])
def test_what_names_no_layers_is_bad_input_before_anything_runs(layers: str) -> None:
    with pytest.raises(InputError, match="is no layer and no range; write all, or 0,2-4"):
        plugins().metric(METRIC).Params.parse({"layers": layers})


def test_order_and_batches_change_no_number() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    texts = [letters(9), letters(24, 3), letters(15, 11)]
    usual = run(METRIC, lens, texts, params={"part": "each", "seeds": 1})
    for options in ({"batch_tokens": 1, "texts": texts}, {"texts": texts[::-1]}):
        other = run(METRIC, lens, params={"part": "each", "seeds": 1}, **options)
        for one, two in zip(rows(usual, METRIC), rows(other, METRIC), strict=True):
            assert (two["condition"], two["layer"]) == (one["condition"], one["layer"])
            numbers = ("ppl", "ratio", "ci_low", "ci_high", "p_value", "ratio_length_weighted")
            found, expected = ([each[name] or np.nan for name in numbers] for each in (two, one))
            np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("params", [{"part": "each"}, {"part": "bos_only", "together": True}])
def test_the_contract(params: dict[str, Any]) -> None:
    check_metric(plugins().metric(METRIC), params)
