"""The probe of position against the normal equations, planted positions, and invariances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.testing import check_metric
from phaselens_plugins._probe_rows import fold_numbers
from phaselens_plugins._ridge import PENALTIES, cross_validate
from phaselens_plugins.position_probe import PositionProbe, ProbeParams
from tests.plugins.views import info, rows, view
from tests.toys import letters, toy_lens

D_MODEL = 8


def reference_predictions(
    rows: Sequence[np.ndarray], targets: Sequence[np.ndarray], fold_of: Sequence[int]
) -> tuple[list[np.ndarray], dict[int, float]]:
    """Nested cross-validation of one target by the normal equations: predictions, and the penalty of each fold."""

    def solve(chosen: list[int], penalty: float) -> Any:
        x, y = np.concatenate([rows[i] for i in chosen]), np.concatenate([targets[i] for i in chosen])
        centred = x - x.mean(0)
        scale = np.square(centred).sum() / len(x)
        gram = centred.T @ centred + penalty * scale * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, centred.T @ (y - y.mean()))
        return lambda new: (new - x.mean(0)) @ weights + y.mean()

    folds, texts = sorted(set(fold_of)), range(len(rows))
    predictions: list[Any] = [None] * len(rows)
    best = {}
    for fold in folds:
        errors = []
        for penalty in PENALTIES:
            error = 0.0
            for inner in set(folds) - {fold}:
                predict = solve([i for i in texts if fold_of[i] not in (fold, inner)], penalty)
                error += sum(
                    np.square(predict(rows[i]) - targets[i]).sum() for i in texts if fold_of[i] == inner
                )
            errors.append(error)
        best[fold] = PENALTIES[int(np.argmin(errors))]
        predict = solve([i for i in texts if fold_of[i] != fold], best[fold])
        for i in texts:
            if fold_of[i] == fold:
                predictions[i] = predict(rows[i])
    return predictions, best


@pytest.mark.parametrize("d", [3, 40])  # fewer and more dimensions than rows
def test_predictions_equal_those_of_the_normal_equations(d: int) -> None:
    generator = np.random.default_rng(d)
    lengths, fold_of = [5, 9, 4, 7, 6], [0, 1, 2, 0, 1]
    x = [generator.normal(size=(n, d)) * generator.uniform(0.1, 5, d) + 3 for n in lengths]
    y = [row[:, :1] * 0.3 + generator.normal(size=(len(row), 1)) * 0.2 for row in x]
    noise = [generator.normal(size=(n, 1)) for n in lengths]
    result = cross_validate(x, [np.concatenate(pair, 1) for pair in zip(y, noise, strict=True)], fold_of)
    for target, values in enumerate((y, noise)):
        predictions, penalties = reference_predictions(x, [array[:, 0] for array in values], fold_of)
        for got, expected in zip(result.predictions, predictions, strict=True):
            np.testing.assert_allclose(got[:, target], expected, rtol=1e-6, atol=1e-9)
        assert {fold: part.penalties[target] for fold, part in result.folds.items()} == penalties
    assert [part.n_tested for part in result.folds.values()] == [12, 15, 4]
    assert [part.n_fitted for part in result.folds.values()] == [19, 16, 27]


def test_the_table_equals_a_dense_computation_on_a_models_activations() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    texts = [letters(9 + 4 * index, 5 * index) for index in range(5)]
    options = {"rows": 100, "folds": 3, "permutations": 2}
    result = phaselens.run(lens, metrics=[("position-probe", options)], texts=texts)
    x: list[np.ndarray] = []
    for text in texts:
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        lens.stream(ids, [("blocks.1.hook_resid_post", lambda tensor, hook: x.append(tensor[0].numpy()))])
    hashes = [record.sha256 for record in result.texts]
    fold_of = fold_numbers(hashes, 3)
    lengths = [len(array) for array in x]
    for column, function in (("r2", lambda t, n: t / n), ("r2_log", lambda t, n: np.log1p(t))):
        y = [function(np.arange(1, n), n) for n in lengths]
        predictions, _ = reference_predictions([array[1:] for array in x], y, fold_of)
        errors, spreads = [], []
        for index, prediction in enumerate(predictions):
            fitted = np.concatenate([y[i] for i in range(5) if fold_of[i] != fold_of[index]])
            errors.append(np.square(y[index] - prediction).sum())
            spreads.append(np.square(y[index] - fitted.mean()).sum())
        records = [row for row in result.rows("position-probe", "texts").records() if row["layer"] == 1]
        for record, error, spread in zip(records, errors, spreads, strict=True):
            assert record[column] == pytest.approx(1 - error / spread, abs=1e-7)
        (layer,) = [row for row in result.rows("position-probe", "layers").records() if row["layer"] == 1]
        assert layer[column] == pytest.approx(1 - sum(errors) / sum(spreads), abs=1e-7)


def fed(texts: Sequence[torch.Tensor], params: ProbeParams | None = None) -> PositionProbe:
    """Return a metric of one layer that has seen these texts' rows [pos, d_model], one text at a time."""
    from dataclasses import replace

    metric = PositionProbe(
        info(d_head=D_MODEL // 2), params or ProbeParams(rows=50, folds=3, permutations=20)
    )
    for index, x in enumerate(texts):
        layer = view({"hook_resid_post": x[None], "hook_resid_pre": torch.ones_like(x)[None]}, (len(x),))
        batch = replace(layer.batch, texts=(f"text {index}",), indices=(index,), hashes=(f"{index:02d}",))
        metric.update(replace(layer, batch=batch))
    return metric


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_planted_positions_are_read_and_permuted_ones_are_not() -> None:
    """One dimension holds ln(1 + t): the probe of it is exact, and permuted positions leave nothing to read."""
    texts = [noise(40, index) for index in range(9)]
    for x in texts:
        x[:, 3] = 0.01 * torch.arange(40.0, dtype=torch.float64).log1p()
    metric = fed(texts)
    (layer,) = rows(metric, "layers")
    assert layer["r2_log"] > 0.999
    assert layer["r2_log_low"] > 0.999
    assert layer["r2"] > 0.8
    assert abs(layer["null"]) < 0.05
    assert abs(layer["r2_log_null"]) < 0.05
    (summary,) = rows(metric, "summary")
    assert (summary["r2_layer"], summary["n_texts"]) == (0, 9)
    assert summary["r2_embedding"] == pytest.approx(
        0.0, abs=1e-12
    )  # all rows are equal: the mean is predicted


def test_noise_has_no_position_and_no_likeness_of_neighbours() -> None:
    (layer,) = rows(fed([noise(60, index) for index in range(12)]), "layers")
    assert abs(layer["r2"]) < 0.05
    assert layer["adjacency"] == pytest.approx(0.5, abs=0.05)
    assert layer["prefix_spread"] == pytest.approx(layer["prefix_spread_null"], abs=0.02)


def test_a_walk_has_neighbours_that_are_alike() -> None:
    (layer,) = rows(fed([noise(60, index).cumsum(0) for index in range(6)]), "layers")
    assert layer["adjacency"] > 0.9
    assert layer["adjacency_low"] > layer["adjacency_null"] == 0.5


@pytest.mark.slow
def test_learned_positions_are_read_before_layer_0() -> None:
    texts = [letters(12, index) for index in range(20)]
    params = {"permutations": 3}
    learned, rotary = (
        phaselens.run(toy_lens(family), metrics=[("position-probe", params)], texts=texts)
        .rows("position-probe", "summary")
        .records()[0]
        for family in ("gpt2", "llama")
    )
    assert learned["r2_embedding"] > 0.3
    assert rotary["r2_embedding"] < 0.1


def test_a_factor_of_all_activations_changes_nothing() -> None:
    texts = [noise(20, index).cumsum(0) for index in range(5)]
    expected, scaled = rows(fed(texts), "layers"), rows(fed([1e4 * x for x in texts]), "layers")
    for name, value in expected[0].items():
        assert scaled[0][name] == pytest.approx(value, rel=1e-9)


def test_texts_of_equal_content_share_a_fold() -> None:
    assert fold_numbers(["b", "a", "b", "c", "d"], 3) == [1, 0, 1, 2, 0]
    lens = toy_lens()
    texts = [letters(20), letters(20), letters(15, 3)]
    result = phaselens.run(lens, metrics=["position-probe"], texts=texts)
    assert result.rows("position-probe", "layers").column("r2") == [None, None]
    assert any("use 3 texts of different content or more (usable: 2)" in note for note in result.warnings)


def test_short_texts_and_layers_that_are_not_finite_are_missing_with_their_reasons() -> None:
    texts = [noise(20, index) for index in range(6)]
    texts[2][7] = torch.nan
    texts += [noise(1, 6), noise(2, 7), noise(3, 8)]
    metric = fed(texts)
    records = rows(metric, "texts")
    missing = {name: [row["text"] for row in records if row[name] is None] for name in records[0]}
    assert missing["r2"] == missing["null"] == ["text 2", "text 6", "text 7"]
    assert missing["prefix_spread"] == ["text 2", "text 6", "text 7"]
    assert missing["adjacency"] == missing["adjacency_null"] == ["text 2", "text 6", "text 7", "text 8"]
    assert [row["n_rows"] for row in records[-3:]] == [0, 1, 2]
    notes = " | ".join(metric.warnings)
    for phrase in (
        "r2 is missing: fewer than 3 tokens for text 'text 6', 'text 7'",
        "adjacency is missing: fewer than 4 tokens for text 'text 6', 'text 7', 'text 8'",
        "r2 is missing: activations are NaN or infinite in layer 0 for text 'text 2'",
        "prefix_spread is missing: rows are zero, NaN or infinite in layer 0 for text 'text 2'",
    ):
        assert phrase in notes


def test_the_rows_that_are_drawn_depend_on_the_text_and_the_seed_alone() -> None:
    lens = toy_lens()
    texts = [letters(60, index) for index in range(4)]
    params = {"rows": 10, "permutations": 2}

    def measured(texts: list[str], **options: Any) -> list[dict[str, Any]]:
        run = phaselens.run(lens, metrics=[("position-probe", params)], texts=texts, **options)
        return run.rows("position-probe", "layers").records()

    expected = measured(texts)
    for row, expected_row in zip(measured(texts[::-1], batch_tokens=1), expected, strict=True):
        for column, value in row.items():
            if column != "model":
                assert value == pytest.approx(expected_row[column], rel=1e-4, abs=1e-5), column
    assert measured(texts, seed=1)[0]["r2"] != expected[0]["r2"]


@pytest.mark.slow
def test_it_keeps_the_contract() -> None:
    check_metric(PositionProbe)
    check_metric(PositionProbe, {"rows": 3, "folds": 3, "permutations": 1})
