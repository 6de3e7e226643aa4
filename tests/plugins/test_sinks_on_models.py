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
