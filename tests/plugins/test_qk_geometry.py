"""Geometry of the sink on tiny models: against the model's own eager scores, planted truths, and overflow by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.lens.checks import capture
from phaselens.testing import check_metric, plant
from phaselens_plugins.qk_geometry import QkGeometry
from tests.marks import mark_later_slow
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (11, 29, 17)]


def rows_of(run: Any, table: str) -> list[dict[str, Any]]:
    assert not run.failed, run.metrics["qk-geometry"].failures
    return run.rows("qk-geometry", table).records()


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "mistral", "qwen3", "gpt2", "phi3"], 2))
def test_norms_and_products_equal_those_of_the_models_scores(family: str) -> None:
    lens = toy_lens(family, dtype=torch.float64)
    run = phaselens.run(lens, metrics="qk-geometry", texts=TEXTS, batch_tokens=64)
    rows, overflow = rows_of(run, "texts"), rows_of(run, "overflow")
    largest: dict[tuple[int, int], float] = {}
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        points = {
            (layer, point): f"blocks.{layer}.attn.{point}"
            for layer in range(2)
            for point in ("hook_attn_scores", "hook_rot_k", "hook_v")
        }
        _, activations = capture(lens, ids, points)
        for row in (row for row in rows if row["text"] == str(number)):
            layer, head = row["layer"], row["head"]
            scores = activations[layer, "hook_attn_scores"][0, head].numpy()
            visible = np.isfinite(scores)
            product = np.abs(scores[visible]).max() / lens.info.scales[layer]
            assert row["largest"] == pytest.approx(product, rel=1e-9)
            largest[layer, head] = max(largest.get((layer, head), 0.0), product)
            window = lens.info.windows[layer] or len(scores)
            biases = [
                scores[query, 0] - scores[query, 1:][visible[query, 1:]].mean()
                for query in range(1, min(len(scores), window))
            ]
            assert row["key_bias"] == pytest.approx(np.mean(biases), rel=1e-9, abs=1e-12)
            assert row["key_bias_sd"] == pytest.approx(np.std(biases), rel=1e-9, abs=1e-12)
            for name, point in (("key_norm", "hook_rot_k"), ("value_norm", "hook_v")):
                states = activations[layer, point][0]
                group = lens.info.n_heads // states.shape[1]
                norms = np.linalg.norm(states[:, head // group].numpy(), axis=-1)
                assert row[name] == pytest.approx(norms[0] / np.median(norms), rel=1e-9)
    for row in overflow:
        value = largest[row["layer"], row["head"]]
        assert (row["largest"], row["headroom"]) == pytest.approx((value, np.log2(65504 / value)), rel=1e-9)
        assert (row["overflows"], row["n_texts"]) == (0, 3)
    (summary,) = rows_of(run, "summary")
    assert summary["overflows"] == "none"
    assert summary["largest"] == pytest.approx(max(largest.values()))


def test_heads_that_would_overflow_are_named() -> None:
    lens = toy_lens("llama", num_attention_heads=4)
    attention = lens.original_model.model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight[16:24] *= 3e3
        attention.k_proj.weight[16:24] *= 3e3
    run = phaselens.run(lens, metrics="qk-geometry", texts=TEXTS)
    assert any("layer 1 head 2 would overflow in fp16" in warning for warning in run.warnings)
    assert [(row["layer"], row["head"]) for row in rows_of(run, "overflow") if row["overflows"]] == [(1, 2)]
    (summary,) = rows_of(run, "summary")
    assert summary["overflows"] == "layer 1 head 2"
    assert summary["headroom"] < 0
    # fp16 itself agrees: the products of that head, and of no other, are infinite.
    row = next(row for row in rows_of(run, "overflow") if row["overflows"])
    ids = torch.tensor([lens.text_tokenizer(TEXTS[int(row["text"])])["input_ids"]])
    points = {point: f"blocks.1.attn.{point}" for point in ("hook_rot_q", "hook_rot_k")}
    _, states = capture(lens, ids, points)
    q, k = (states[point][0].half().float() for point in ("hook_rot_q", "hook_rot_k"))
    products = torch.einsum("qhd,khd->hqk", q, k).half()
    causal = torch.ones(products.shape[1:], dtype=torch.bool).tril()
    assert products[:, causal].isinf().any(-1).tolist() == [False, False, True, False]
    assert bool(products[2, row["query"], row["key"]].isinf())


def test_a_planted_sink_is_preferred_by_the_same_amount_everywhere() -> None:
    planted = plant("pure sink", positions="nope")
    run = phaselens.run(planted.lens, metrics="qk-geometry", texts=[planted.text])
    (row,) = [
        row for row in rows_of(run, "texts") if (row["layer"], row["head"]) == (planted.layer, planted.head)
    ]
    assert row["cosine"] == pytest.approx(1.0)
    assert row["key_bias"] > 100
    assert row["key_bias_sd"] == pytest.approx(0.0, abs=1e-9)
    assert row["key_norm"] is None
    assert any("activations are all zero" in warning for warning in run.warnings)


@pytest.mark.slow
def test_another_key_can_be_measured_and_missing_values_have_reasons() -> None:
    lens = toy_lens("llama")
    run = phaselens.run(lens, metrics=("qk-geometry", {"sink_position": 12}), texts=TEXTS)
    rows = rows_of(run, "texts")
    assert all((row["cosine"] is None) == (row["text"] == "0") for row in rows)
    assert any("no token after position 12" in warning for warning in run.warnings)
    short = phaselens.run(lens, metrics="qk-geometry", texts=["a"], bos="never")
    assert any("fewer than two tokens" in warning for warning in short.warnings)
    with torch.no_grad():
        lens.original_model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    broken = phaselens.run(lens, metrics="qk-geometry", texts=TEXTS)
    assert any("NaN or infinite in layer 1" in warning for warning in broken.warnings)
    narrow = phaselens.run(toy_lens("mistral", sliding_window=1), metrics="qk-geometry", texts=TEXTS)
    assert all(row["cosine"] is None and row["largest"] is not None for row in rows_of(narrow, "texts"))
    assert any("with a window of 1" in warning for warning in narrow.warnings)


@pytest.mark.slow
def test_the_contract() -> None:
    check_metric(QkGeometry, {"sink_position": 1})
