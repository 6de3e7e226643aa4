"""The sinks metric against closed forms and dense float64 attention, and on missing or non-finite input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phaselens.attention import sink_score, uniform_sink
from phaselens.plugin import Batch, LayerView
from phaselens_plugins.sinks import SinkParams, Sinks, strongest_position
from tests.toys import toy_info

HARMONIC = {length: sum(1 / n for n in range(1, length + 1)) for length in range(1, 65)}


def both_scores(sink: torch.Tensor, lengths: torch.Tensor, key: int) -> list[torch.Tensor]:
    """Return the scores without query 0 and with it."""
    return [sink_score(sink, lengths, include_query0=include, position=key) for include in (False, True)]


def uniform_score(length: int, key: int = 0, window: int | None = None, first_query: int = 0) -> float:
    """Return the score of uniform attention; NaN where no query counts."""
    score = uniform_sink(length, not first_query, key, window)
    return float("nan") if score is None else score


def causal(n_heads: int, length: int, seed: int, sharpness: float = 3.0) -> np.ndarray:
    """Return random causal attention [head, query, key] in float64."""
    scores = sharpness * np.random.default_rng(seed).normal(size=(n_heads, length, length))
    scores[:, ~np.tri(length, dtype=bool)] = -np.inf
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def feed(metric: Sinks, matrices: Sequence[Sequence[np.ndarray]], first_index: int = 0) -> Sinks:
    """Update the metric with attention matrices [text][layer] as one padded batch, as the lens does."""
    lengths = tuple(layers[0].shape[-1] for layers in matrices)
    max_length, n_heads = max(lengths), matrices[0][0].shape[0]
    indices = tuple(range(first_index, first_index + len(lengths)))
    tokens = torch.zeros(len(lengths), max_length, dtype=torch.long)
    batch = Batch(tuple(f"t{index}" for index in indices), indices, lengths, tokens)
    for layer in range(len(matrices[0])):
        sink = torch.full((len(lengths), n_heads, max_length), 7.0)  # pads must have no effect
        received = torch.full((len(lengths), n_heads, max_length), 7.0)
        for row, layers in enumerate(matrices):
            if metric.sink_position < lengths[row]:
                sink[row, :, : lengths[row]] = torch.tensor(layers[layer][:, :, metric.sink_position])
            received[row, :, : lengths[row]] = torch.tensor(layers[layer].sum(1))
        metric.update(LayerView(layer, batch, {"attn.hook_sink": sink, "attn.hook_received": received}))
    return metric


def sinks(**params: object) -> Sinks:
    return Sinks(toy_info(), SinkParams(**params))


def records(metric: Sinks, table: str) -> list[dict[str, Any]]:
    return metric.compute()[table].records()


LENGTHS = (5, 12, 9, 20)
MATRICES = [
    [causal(2, length, 10 * length + layer, sharpness=4 - layer) for layer in range(2)] for length in LENGTHS
]


# -- pure functions ---------------------------------------------------------------------------------------


def test_the_worked_example_of_five_tokens() -> None:
    matrix = np.array(
        [[1, 0, 0, 0, 0], [0.6, 0.4, 0, 0, 0], [0.5, 0.2, 0.3, 0, 0], [0.7, 0.1, 0.1, 0.1, 0], [0.2] * 5]
    )
    importance = [0.6, 0.225, 0.2, 0.15, 0.2]
    for key, expected in enumerate(importance):
        sink = torch.tensor(matrix[:, key])[None, None]
        score, score_all = both_scores(sink, torch.tensor([5]), key)
        assert score_all.item() == pytest.approx(expected, abs=1e-12)
        assert score.item() == pytest.approx(0.5 if key == 0 else expected, abs=1e-12)


@pytest.mark.parametrize("length", [1, 2, 4, 8, 9, 10, 64])
def test_uniform_attention_has_its_closed_form(length: int) -> None:
    assert uniform_score(length) == pytest.approx(HARMONIC[length] / length, abs=1e-14)
    if length > 1:
        expected = (HARMONIC[length] - 1) / (length - 1)
        assert uniform_score(length, first_query=1) == pytest.approx(expected, abs=1e-14)


def test_uniform_attention_alone_passes_the_usual_threshold_on_short_texts() -> None:
    assert [length for length in range(2, 65) if uniform_score(length) >= 0.3] == list(range(2, 10))
    assert [length for length in range(2, 65) if uniform_score(length, first_query=1) >= 0.3] == [2, 3, 4, 5]


@given(st.integers(2, 30), st.integers(0, 29), st.integers(1, 30), st.integers(0, 1))
def test_the_null_is_the_score_of_a_uniform_matrix(
    length: int, key: int, window: int, first_query: int
) -> None:
    query, keys = np.arange(length)[:, None], np.arange(length)[None]
    visible = (keys <= query) & (query - keys < window)
    matrix = visible / visible.sum(1, keepdims=True)
    value = uniform_score(length, key, window, first_query)
    column = matrix[max(key, first_query) :, key : key + 1]
    if not column.any():
        assert np.isnan(value)
    else:
        assert value == pytest.approx(column[column > 0].mean(), abs=1e-14)


@given(st.integers(0, 6), st.integers(1, 9), st.integers(0, 5))
def test_pads_have_no_effect(key: int, length: int, n_pads: int) -> None:
    sink = torch.rand(1, 2, length, dtype=torch.float64)
    padded = torch.cat([sink, torch.full((1, 2, n_pads), torch.nan, dtype=torch.float64)], -1)
    for score, padded_score in zip(
        both_scores(sink, torch.tensor([length]), key),
        both_scores(padded, torch.tensor([length]), key),
        strict=True,
    ):
        assert torch.allclose(score, padded_score, rtol=0, atol=1e-15, equal_nan=True)


def test_a_planted_sink_at_position_seven_is_found() -> None:
    matrix = causal(1, 20, seed=3, sharpness=0.1)
    matrix[:, 7:] = 0
    matrix[:, 7:, 7], matrix[:, 7:, 0] = 0.8, 0.2
    position, score = strongest_position(torch.tensor(matrix.sum(1))[None], torch.tensor([20]))
    assert position.item() == 7
    assert score.item() == pytest.approx(0.8, abs=1e-12)


def test_the_strongest_position_is_never_zero_and_never_a_pad() -> None:
    received = torch.tensor([[[9.0, 0.1, 0.2, 0.1, 8.0]]], dtype=torch.float64)
    position, score = strongest_position(received, torch.tensor([4]))
    assert (position.item(), score.item()) == (2, 0.1)
    position, score = strongest_position(received, torch.tensor([1]))
    assert torch.isnan(position).all()
    assert torch.isnan(score).all()


def test_a_mean_over_few_queries_makes_no_key_the_strongest() -> None:
    """Only the last query sees the last key; its attention to itself is no evidence of a sink."""
    matrix = causal(1, 20, seed=3, sharpness=0.1)
    matrix[:, 19], matrix[:, 19, 19] = 0, 1
    lengths, received = torch.tensor([20]), torch.tensor(matrix.sum(1))[None]
    assert strongest_position(received, lengths, min_queries=1)[0].item() == 19
    for min_queries in (2, 8):
        position = int(strongest_position(received, lengths, min_queries=min_queries)[0])
        scores = matrix[0].sum(0) / np.arange(20, 0, -1)
        assert position == 1 + int(scores[1 : 21 - min_queries].argmax())


# -- the metric, fed by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 3])
def test_texts_hold_the_means_of_the_dense_matrix(key: int) -> None:
    rows = records(feed(sinks(sink_position=key), MATRICES), "texts")
    assert [(row["text"], row["layer"], row["head"]) for row in rows] == [
        (f"t{text}", layer, head) for text in range(4) for layer in range(2) for head in range(2)
    ]
    for row in rows:
        text = int(row["text"][1:])
        column = MATRICES[text][row["layer"]][row["head"], :, key]
        assert row["score_all"] == pytest.approx(column[key:].mean(), abs=1e-7)
        assert row["score"] == pytest.approx(column[max(key, 1) :].mean(), abs=1e-7)
        assert row["null_all"] == pytest.approx(uniform_score(LENGTHS[text], key), abs=1e-12)
        assert row["null"] == pytest.approx(uniform_score(LENGTHS[text], key, first_query=1), abs=1e-12)
        assert row["n_tokens"] == LENGTHS[text]


def scores(*, include_query0: bool) -> np.ndarray:
    """Compute the scores [text, layer, head] from the matrices."""
    first_query = 0 if include_query0 else 1
    return np.array([[matrix[:, first_query:, 0].mean(1) for matrix in layers] for layers in MATRICES])


@pytest.mark.parametrize("include_query0", [False, True])
@pytest.mark.parametrize("order", ["threshold_then_mean", "mean_then_threshold"])
def test_rates_follow_the_chosen_definition(include_query0: bool, order: str) -> None:
    metric = feed(sinks(include_query0=include_query0, order=order, threshold=0.25), MATRICES)
    score = scores(include_query0=include_query0)
    null = np.array([uniform_score(length, first_query=0 if include_query0 else 1) for length in LENGTHS])
    if order == "threshold_then_mean":
        rates, null_rate = (score >= 0.25).mean((0, 2)), (null >= 0.25).mean()
    else:
        rates, null_rate = (score.mean(0) >= 0.25).mean(1), float(null.mean() >= 0.25)
    layers = records(metric, "layers")
    assert [row["sink_rate"] for row in layers] == pytest.approx(rates.tolist(), abs=1e-12)
    assert [row["mean_score"] for row in layers] == pytest.approx(score.mean((0, 2)).tolist(), abs=1e-7)
    assert [row["null_rate"] for row in layers] == pytest.approx([null_rate] * 2, abs=1e-12)
    assert all(row["ci_low"] <= row["sink_rate"] <= row["ci_high"] for row in layers)
    (summary,) = records(metric, "summary")
    assert summary["sink_rate"] == pytest.approx(rates.mean(), abs=1e-12)
    assert summary["mean_score"] == pytest.approx(score.mean(), abs=1e-7)
    assert summary["n_texts"] == 4
    heads = records(metric, "heads")
    assert [row["score"] for row in heads] == pytest.approx(score.mean(0).ravel().tolist(), abs=1e-7)
    assert all(row["ci_low"] <= row["score"] <= row["ci_high"] and row["n_texts"] == 4 for row in heads)
    assert [row["null"] for row in heads] == pytest.approx([null.mean()] * 4, abs=1e-12)


def test_the_two_orders_and_the_two_scores_differ_where_they_should() -> None:
    metrics = [
        feed(sinks(threshold=0.25, order=order, include_query0=include_query0), MATRICES)
        for order in ("threshold_then_mean", "mean_then_threshold")
        for include_query0 in (False, True)
    ]
    rates = [[row["sink_rate"] for row in records(metric, "layers")] for metric in metrics]
    assert len({tuple(rate) for rate in rates}) == 4


def test_a_score_at_the_threshold_is_a_sink() -> None:
    matrix = np.array([[[1.0, 0.0], [0.5, 0.5]]] * 2)
    (first_layer, _) = records(feed(sinks(threshold=0.5), [[matrix, matrix]] * 2), "layers")
    assert first_layer["sink_rate"] == 1.0


def test_positions_hold_the_most_frequent_strongest_key() -> None:
    metric = feed(sinks(), MATRICES)
    strongest = records(metric, "strongest")
    for row in strongest:
        text = int(row["text"][1:])
        matrix = MATRICES[text][row["layer"]][row["head"]]
        length = LENGTHS[text]
        scores = [matrix[key:length, key].mean() for key in range(length)]
        last_key = length - min(8, length // 2)  # the last key that enough queries see
        strongest_key = 1 + int(np.argmax(scores[1 : last_key + 1]))
        assert row["position"] == strongest_key
        assert row["score"] == pytest.approx(scores[strongest_key], abs=1e-6)
        assert row["null"] == pytest.approx(uniform_score(LENGTHS[text], strongest_key), abs=1e-12)
    for row in records(metric, "positions"):
        of_head = [
            strongest_row
            for strongest_row in strongest
            if (strongest_row["layer"], strongest_row["head"]) == (row["layer"], row["head"])
        ]
        keys = [strongest_row["position"] for strongest_row in of_head]
        assert row["share"] == max(map(keys.count, keys)) / 4
        assert keys.count(row["position"]) == row["share"] * 4
        assert row["score"] == pytest.approx(
            np.mean([strongest_row["score"] for strongest_row in of_head]), abs=1e-12
        )
        assert row["n_texts"] == 4


def test_without_strongest_the_kernel_call_and_the_tables_are_skipped() -> None:
    metric = feed(sinks(strongest=False), MATRICES)
    assert metric.hooks() == ["blocks.{layer}.attn.hook_sink"]
    assert set(metric.compute()) == {"texts", "heads", "layers", "summary"}


def test_halves_merged_equal_the_whole() -> None:
    unsplit = feed(sinks(), MATRICES).compute()
    halves = [feed(sinks(), MATRICES[:2]), feed(sinks(), MATRICES[2:], first_index=2)]
    halves[1].merge(halves[0])
    assert halves[1].compute() == unsplit


def test_uniform_heads_score_their_null() -> None:
    uniform = [[np.tri(length)[None] / np.arange(1, length + 1)[None, :, None]] * 2 for length in (3, 6, 40)]
    metric = feed(sinks(include_query0=True), uniform)
    assert all(row["score"] == pytest.approx(row["null"], abs=1e-7) for row in records(metric, "texts"))
    for row in records(metric, "layers"):
        assert row["sink_rate"] == row["null_rate"] == pytest.approx(2 / 3, abs=1e-15)


# -- missing values ----------------------------------------------------------------------------------------


def test_a_text_of_one_token_is_missing_with_the_reason_and_left_out_of_rates() -> None:
    one_token = [[causal(2, 1, 0)] * 2]
    metric = feed(sinks(), [*MATRICES, *one_token])
    tables = metric.compute()
    row = tables["texts"].records()[-1]
    assert (row["text"], row["score"], row["null"], row["n_tokens"]) == ("t4", None, None, 1)
    assert row["score_all"] == row["null_all"] == 1.0
    assert tables["strongest"].records()[-1]["position"] is None
    assert metric.warnings == ["score is missing: fewer than two tokens in text 't4'"]
    tables_without_it = feed(sinks(), MATRICES).compute()
    for name in ("heads", "layers", "summary", "positions"):
        assert tables[name] == tables_without_it[name], name


def test_only_texts_of_one_token_leave_everything_null() -> None:
    metric = feed(sinks(), [[causal(2, 1, 0)] * 2] * 2)
    tables = metric.compute()
    assert tables["summary"].rows == [(None, None, None, 0)]
    assert tables["layers"].rows == [(layer, *(None,) * 6) for layer in range(2)]
    assert {row[2:] for row in tables["heads"].rows} == {(*(None,) * 8, 0)}


def test_a_text_too_short_for_the_position_is_missing_with_the_reason() -> None:
    metric = feed(sinks(sink_position=9), MATRICES[:2])
    texts = records(metric, "texts")
    assert [row["score"] is None for row in texts] == [True] * 4 + [False] * 4
    assert "score is missing: fewer than 10 tokens in text 't0'" in metric.warnings


def test_one_text_has_no_interval_and_a_warning() -> None:
    metric = feed(sinks(), MATRICES[:1])
    layers = records(metric, "layers")
    assert all(row["ci_low"] is None and row["sink_rate"] is not None for row in layers)
    assert "fewer than 2 texts with a score: intervals are missing" in metric.warnings


@pytest.mark.parametrize("bad_value", [np.nan, np.inf])
def test_attention_that_is_not_finite_is_missing_and_not_counted_as_no_sink(bad_value: float) -> None:
    matrices = [[matrix.copy() for matrix in layers] for layers in MATRICES]
    matrices[1][1][0, 5, :] = bad_value
    metric = feed(sinks(), matrices)
    tables = metric.compute()
    null_rows = [row for row in tables["texts"].records() if row["score"] is None]
    assert [(row["text"], row["layer"], row["head"]) for row in null_rows] == [("t1", 1, 0)]
    score = scores(include_query0=False)
    finite_texts = [0, 2, 3]
    layers = tables["layers"].records()
    assert layers[0]["sink_rate"] == pytest.approx((score[:, 0] >= 0.3).mean(), abs=1e-12)
    assert layers[1]["sink_rate"] == pytest.approx((score[finite_texts, 1] >= 0.3).mean(), abs=1e-12)
    assert tables["summary"].records()[0]["n_texts"] == 3
    assert [row["n_texts"] for row in tables["heads"].records()] == [4, 4, 3, 4]
    (reason,) = [warning for warning in metric.warnings if "NaN or infinite" in warning]
    assert "in layer 1 (1 heads) for text 't1'" in reason
    assert not any(table.not_finite for table in tables.values())


def test_an_undefined_strongest_position_has_a_reason() -> None:
    matrices = [[matrix.copy() for matrix in layers] for layers in MATRICES]
    matrices[2][0][1, 3, :] = np.nan  # query 3 does not see key 5, so the score of key 5 is defined
    metric = feed(sinks(sink_position=5), matrices)
    tables = metric.compute()
    assert [row["text"] for row in tables["strongest"].records() if row["position"] is None] == ["t2"]
    assert "the strongest position is missing: attention is NaN or infinite for text 't2'" in metric.warnings
