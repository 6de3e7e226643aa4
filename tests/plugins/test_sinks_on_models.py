"""Sinks of tiny models against their own eager attention in float64, text by text without padding."""

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.testing import tiny_model
from tests.toys import letters, toy_lens, toy_tokenizer

TEXTS = [letters(length, length) for length in (11, 4, 17, 8)]


def eager_attention(family: str) -> list[np.ndarray]:
    """Return the attention [layer, head, query, key] of each text."""
    model = tiny_model(family).double()
    model.set_attn_implementation("eager")
    matrices = []
    for text in TEXTS:
        ids = torch.tensor([toy_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            attentions = model(ids, output_attentions=True, use_cache=False).attentions
        matrices.append(torch.stack([layer_attention[0] for layer_attention in attentions]).double().numpy())
    return matrices


def cells(run: Any, table: str, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in run.table("sinks", table).to_pylist()]


@pytest.mark.parametrize(
    "family",
    [
        "llama-gqa",
        "mistral",
        "gemma2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gpt2", "gpt-oss", "llama-drope-qk-norm-nope")
        ),
    ],
)
@pytest.mark.parametrize("key", [0, 2])
def test_scores_equal_those_of_the_dense_matrices(family: str, key: int) -> None:
    dense, lens = eager_attention(family), toy_lens(family)
    windows = {"mistral": (7, 7), "gemma2": (7, None), "gpt-oss": (7, None)}.get(family, (None, None))
    run = phaselens.run([lens], metrics=("sinks", {"sink_position": key}), texts=TEXTS, batch_tokens=40)
    expected, strongest = [], []
    for matrix in dense:
        length = matrix.shape[-1]
        for layer, head in np.ndindex(matrix.shape[:2]):
            window = windows[layer]
            columns = [
                matrix[layer, head, position : window and position + window, position]
                for position in range(length)
            ]
            n_skipped = int(key == 0)
            expected.append((columns[key][n_skipped:].mean(), columns[key].mean()))
            means = [column.mean() for column in columns]
            min_queries = min(8, (len(columns[1]) + 1) // 2)
            candidates = [position for position in range(1, length) if len(columns[position]) >= min_queries]
            strongest_key = max(candidates, key=means.__getitem__)
            strongest.append((strongest_key, means[strongest_key]))
    assert np.abs(np.array(cells(run, "texts", "score", "score_all")) - expected).max() < 1e-5
    assert np.abs(np.array(cells(run, "strongest", "position", "score")) - strongest).max() < 1e-5
    assert run.warnings == []


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_heads_without_queries_are_uniform_and_score_their_null(family: str) -> None:
    lens = toy_lens(family)
    with torch.no_grad():
        for layer in lens.original_model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    run = phaselens.run(lens, metrics="sinks", texts=TEXTS)
    for score, score_all, null, null_all in cells(run, "texts", "score", "score_all", "null", "null_all"):
        assert (score, score_all) == (pytest.approx(null, abs=1e-6), pytest.approx(null_all, abs=1e-6))
    for rate, null in cells(run, "layers", "sink_rate", "null_rate"):
        assert rate == null
    windows = {lens.info.windows[layer] for layer in range(2)}
    assert windows == ({7} if family == "mistral" else {None})


def test_weights_that_are_not_finite_give_a_missing_value_and_not_zero() -> None:
    lens = toy_lens()
    with torch.no_grad():
        lens.original_model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    run = phaselens.run(lens, metrics="sinks", texts=TEXTS)
    scores = cells(run, "texts", "layer", "head", "score")
    assert all((score is None) == ((layer, head) == (1, 0)) for layer, head, score in scores)
    assert [rate is None for (rate,) in cells(run, "layers", "sink_rate")] == [False, True]
    assert cells(run, "summary", "sink_rate", "n_texts") == [(None, 0)]
    assert any("NaN or infinite in layer 1" in warning for warning in run.warnings)
    assert run.metrics["sinks"].status == "ok"


@pytest.mark.slow
def test_the_share_of_a_learned_sink_logit_is_what_the_keys_lack() -> None:
    """GPT-OSS' rows sum to less than 1; a family without sink logits has 0 there."""
    lens, texts = toy_lens("gpt-oss", dtype=torch.float64), [letters(9), letters(15, 3)]
    result = phaselens.run(lens, metrics="sinks", texts=texts)
    assert lens.info.learned_sinks == (0, 1)
    for layer in range(2):
        shares, nulls = [], []
        for text in texts:
            ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
            _, cache = lens.run_with_cache(ids)
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            shares.append(1 - pattern.sum(-1)[:, 1:].mean(-1))
            n_keys = (pattern[0] > 0).sum(-1)[1:]
            nulls.append((1 / (n_keys + 1)).mean())
        heads = [r for r in result.rows("sinks", "heads").records() if r["layer"] == layer]
        expected = torch.stack(shares).mean(0).tolist()
        assert [head["learned_sink"] for head in heads] == pytest.approx(expected, abs=1e-9)
        assert [head["learned_sink_null"] for head in heads] == pytest.approx([float(sum(nulls) / 2)] * 4)
        (record,) = [r for r in result.rows("sinks", "layers").records() if r["layer"] == layer]
        assert record["learned_sink"] == pytest.approx(sum(expected) / 4, abs=1e-9)
    without = phaselens.run(toy_lens("llama"), metrics="sinks", texts=texts)
    assert without.rows("sinks", "summary").records()[0]["learned_sink"] == 0.0
    assert {r["learned_sink_null"] for r in without.rows("sinks", "texts").records()} == {0.0}
