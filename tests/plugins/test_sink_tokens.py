"""Sink tokens against dense float64 attention and residuals, planted ones, their mask, and hostile input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.testing import check_metric, plant, tiny_model
from phaselens_plugins._sink_tokens import is_delimiter
from phaselens_plugins.sink_tokens import SinkTokens
from tests.marks import mark_later_slow
from tests.toys import letters, toy_lens, toy_tokenizer

TEXTS = [letters(length, length) for length in (11, 39, 23)]


def rows_of(run: Any, table: str) -> list[dict[str, Any]]:
    assert not run.failed, run.metrics["sink-tokens"].failures
    return run.rows("sink-tokens", table).records()


def dense_layers(family: str, text: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return attention [head, query, key] and residual [pos, d_model] of each layer, from the eager float64 forward."""
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation("eager")
    ids = torch.tensor([toy_tokenizer()(text)["input_ids"]])
    residuals: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _module, _args, output: residuals.append(output.reshape(ids.shape[1], -1).numpy())
        )
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    return [(matrix[0].numpy(), x) for matrix, x in zip(attentions, residuals, strict=True)]


def dense_tokens(family: str, text: str, window: int | None, factor: float, mass: float) -> dict[int, Any]:
    """Return what the table `tokens` must have, by position, by loops over the dense matrix."""
    listed: dict[int, dict[str, Any]] = {}
    largest: dict[int, list[float]] = {}
    for layer, (attention, x) in enumerate(dense_layers(family, text)):
        pattern, n = attention.mean(0), len(x)
        norms = np.sqrt((x**2).sum(1))
        n_of_first = min(n, window or n) - 1
        for position in range(n):
            queries = range(position + 1, min(n, position + (window or n)))
            received = np.mean([pattern[query, position] for query in queries]) if queries else np.nan
            ratio = norms[position] / np.median(norms)
            largest.setdefault(position, [0.0, 0.0])
            largest[position][0] = max(largest[position][0], ratio)
            largest[position][1] = max(largest[position][1], 0.0 if np.isnan(received) else received)
            has_enough = 0 < len(queries) >= min(8, (n_of_first + 1) // 2)
            is_carrying, is_receiving = ratio >= factor, has_enough and received >= mass
            if not (is_carrying or is_receiving):
                continue
            row = listed.setdefault(position, {"layers": [], "kinds": set(), "secondary": []})
            row["layers"].append(layer)
            row["kinds"] |= {"carries"} if is_carrying else set()
            row["kinds"] |= {"receives"} if is_receiving else set()
            if position and x[position] @ x[0] / norms[position] / norms[0] > 0.1:
                row["secondary"].append(layer)
    return {position: row | {"largest": largest[position]} for position, row in listed.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "mistral", "qwen3"], 2))
def test_listed_tokens_equal_those_of_the_dense_matrix(family: str) -> None:
    lens = toy_lens(family)
    params = {"massive_factor": 1.2, "mass": 0.08, "similarity": 0.1}
    run = phaselens.run(lens, metrics=("sink-tokens", params), texts=TEXTS, batch_tokens=64)
    tokens = rows_of(run, "tokens")
    n_seen = 0
    for number, text in enumerate(TEXTS):
        expected = dense_tokens(family, text, lens.info.windows[0], 1.2, 0.08)
        rows = {row["position"]: row for row in tokens if row["text"] == str(number)}
        assert rows.keys() == expected.keys()
        ids = toy_tokenizer()(text)["input_ids"]
        for position, row in rows.items():
            truth = expected[position]
            kind = "both" if len(truth["kinds"]) == 2 else next(iter(truth["kinds"]))
            assert (row["first_layer"], row["last_layer"], row["n_layers"], row["kind"]) == (
                min(truth["layers"]), max(truth["layers"]), len(truth["layers"]), kind
            )  # fmt: skip
            assert row["token_id"] == ids[position]
            assert row["is_bos"] == (position == 0)
            assert row["n_secondary"] == len(truth["secondary"])
            assert row["secondary_first"] == min(truth["secondary"], default=None)
            assert row["ratio"] == pytest.approx(truth["largest"][0], rel=1e-5)
            assert (row["mass"] or 0.0) == pytest.approx(truth["largest"][1], abs=1e-5)
            n_seen += 1
    assert n_seen > 6
    assert [(row["text"], row["position"]) for row in rows_of(run, "mask")] == [
        (row["text"], row["position"]) for row in tokens
    ]
    by_layer = rows_of(run, "texts")
    for row in by_layer:
        listed_here = [
            token
            for token in tokens
            if token["text"] == row["text"] and token["first_layer"] <= row["layer"] <= token["last_layer"]
        ]
        assert row["listed"] == len(listed_here)


@pytest.mark.slow
def test_planted_sinks_are_listed_with_their_layer() -> None:
    for kind, position in (("pure sink", 0), ("sink at position 7", 7)):
        planted = plant(kind)
        run = phaselens.run(planted.lens, metrics="sink-tokens", texts=[planted.text])
        (token,) = [row for row in rows_of(run, "tokens") if row["position"] == position]
        assert token["last_layer"] == planted.layer
        assert token["mass"] >= 0.25
        assert token["mass_layer"] == planted.layer
    massive = plant("massive token")
    run = phaselens.run(massive.lens, metrics="sink-tokens", texts=[massive.text])
    (token,) = [row for row in rows_of(run, "tokens") if row["kind"] in ("carries", "both")]
    assert (token["position"], token["is_bos"], token["first_layer"]) == (0, 1, 0)
    assert token["n_secondary"] == 0


def test_a_second_row_like_that_of_bos_is_a_secondary_sink() -> None:
    lens = toy_lens("llama")
    embedding = lens.original_model.get_input_embeddings().weight
    letter = lens.text_tokenizer("q", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        embedding[0] = 0.0
        embedding[0, 5] = 1e4
        embedding[letter] = 0.9 * embedding[0]
    run = phaselens.run(lens, metrics="sink-tokens", texts=["a b c d q e f g h i j k l m n o p"])
    rows = [row for row in rows_of(run, "tokens") if row["n_secondary"]]
    assert [
        (row["position"], row["token"], row["secondary_first"], row["secondary_last"]) for row in rows
    ] == [(5, "q", 0, 1)]
    (summary,) = rows_of(run, "summary")
    assert (summary["secondary"], summary["secondary_first"], summary["secondary_last"]) == (1.0, 0, 1)


def test_uniform_attention_lists_the_null() -> None:
    planted = plant("uniform attention")
    run = phaselens.run(planted.lens, metrics="sink-tokens", texts=["to be or not", planted.text])
    rows = rows_of(run, "texts")
    assert all(row["receiving"] == row["receiving_null"] for row in rows)
    assert rows[0]["receiving_null"] > 0


def test_texts_without_values_have_a_reason() -> None:
    lens = toy_lens("llama")
    run = phaselens.run(lens, metrics="sink-tokens", texts=["a", *TEXTS], bos="never")
    assert any("fewer than two tokens" in warning and "'0'" in warning for warning in run.warnings)
    assert all(row["text"] != "0" for row in rows_of(run, "mask"))
    with torch.no_grad():
        lens.original_model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    run = phaselens.run(lens, metrics="sink-tokens", texts=TEXTS)
    assert any("NaN or infinite in layer 1" in warning for warning in run.warnings)
    assert [row["listed"] is None for row in rows_of(run, "layers")] == [False, True]


def test_delimiters_are_marks_and_white_space() -> None:
    assert all(map(is_delimiter, (".", "\n", "Ċ", "▁.", "Ġ", "<0x0A>", "...")))
    assert not any(map(is_delimiter, ("a", "<s>", "", "-", "1.", "▁the")))


@pytest.mark.slow
@pytest.mark.parametrize("over", ["mean", "any"])
def test_the_contract(over: str) -> None:
    check_metric(SinkTokens, {"over": over})
