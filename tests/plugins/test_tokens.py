"""The metric `tokens` against dense attention in float64, and which texts it keeps."""

from __future__ import annotations

import pytest
import torch

import phaselens
from phaselens.data import Text
from phaselens_plugins.tokens import Tokens
from tests.toys import letters, toy_lens

TEXTS = [letters(9), letters(14, 5), letters(11, 2)]


def test_received_attention_and_norms_equal_those_of_the_dense_model() -> None:
    lens = toy_lens()
    run = phaselens.run(lens, metrics=[("tokens", {"n_texts": 1})], texts=TEXTS)
    tokens = lens.encoder().tokenize(Text("a", TEXTS[0]), 512).ids
    _, cache = lens.run_with_cache(torch.tensor([tokens]))
    records = run.rows("tokens", "tokens").records()
    assert len(records) == lens.info.n_layers * len(tokens)
    for layer in range(lens.info.n_layers):
        pattern = cache["pattern", layer][0].double()
        n_queries = torch.arange(len(tokens), 0, -1)
        received = pattern.sum(1).mean(0) / n_queries
        norms = cache["resid_post", layer][0].double().norm(dim=-1)
        rows = [record for record in records if record["layer"] == layer]
        assert [record["received"] for record in rows] == pytest.approx(received.tolist(), rel=1e-5)
        assert [record["norm"] for record in rows] == pytest.approx(norms.tolist(), rel=1e-5)
        uniform = [
            sum(1 / n for n in range(key + 1, len(tokens) + 1)) / (len(tokens) - key)
            for key in range(len(tokens))
        ]
        assert [record["null"] for record in rows] == pytest.approx(uniform)


def test_the_first_texts_and_positions_are_kept_whatever_the_shards() -> None:
    lens = toy_lens()
    params = {"n_texts": 2, "n_positions": 4}
    whole = phaselens.run(lens, metrics=[("tokens", params)], texts=TEXTS)
    shards = phaselens.run(lens, metrics=[("tokens", params)], texts=TEXTS, shard_tokens=1, batch_tokens=1)
    words = whole.rows("tokens", "words")
    assert words.rows == shards.rows("tokens", "words").rows
    assert sorted(set(words.column("text"))) == sorted({text.id for text in whole.texts[:2]})
    assert max(position for position in words.column("position") if isinstance(position, int)) == 3
    for first, second in zip(
        whole.rows("tokens", "tokens").rows, shards.rows("tokens", "tokens").rows, strict=True
    ):
        assert first[:4] == second[:4]
        assert first[4:] == pytest.approx(second[4:], rel=1e-5)


def test_a_batch_without_a_kept_text_costs_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = toy_lens()
    batches: list[tuple[int, ...]] = []
    stream = lens.stream
    monkeypatch.setattr(
        lens,
        "stream",
        lambda tokens, *args, **kw: (batches.append(tokens.shape), stream(tokens, *args, **kw))[1],
    )
    phaselens.run(lens, metrics=[("tokens", {"n_texts": 1})], texts=TEXTS, batch_tokens=1)
    assert len(batches) == 1


def test_a_printed_run_leaves_the_metric_out() -> None:
    run = phaselens.run(toy_lens(), metrics=["bos-norm", "tokens"], texts=TEXTS)
    assert "values by token" not in str(run)
    assert not Tokens.prints
