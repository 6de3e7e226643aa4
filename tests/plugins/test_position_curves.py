"""Curves by position against plain float64 sums over the dense matrix, with planted truths and hostile input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.testing import check_metric, plant, tiny_model
from phaselens_plugins._position_bins import PositionBins, pooled_means
from phaselens_plugins.position_curves import PositionCurves
from tests.marks import mark_later_slow
from tests.toys import letters, toy_lens, toy_tokenizer

TEXTS = [letters(length, length) for length in (11, 39, 17)]
COLUMNS = ("sink", "sink_null", "entropy", "entropy_null", "norm", "cosine")


def rows_of(run: Any, table: str) -> list[dict[str, Any]]:
    assert not run.failed, run.metrics["position-curves"].failures
    return run.rows("position-curves", table).records()


def dense_values(family: str, text: str, windows: tuple[int | None, ...]) -> tuple[list[dict[str, Any]], Any]:
    """Return the values [pos] of each layer and the losses [pos − 1], from the family's eager float64 forward."""
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation("eager")
    ids = torch.tensor([toy_tokenizer()(text)["input_ids"]])
    residuals: list[np.ndarray] = []
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    for layer in layers:
        layer.register_forward_hook(
            lambda _module, _args, output: residuals.append(
                (output[0] if isinstance(output, tuple) else output).reshape(ids.shape[1], -1).numpy()
            )
        )
    with torch.no_grad():
        output = model(ids, output_attentions=True, use_cache=False)
    by_layer = []
    n = ids.shape[1]
    n_seen = np.arange(1, n + 1)
    for layer, (attention, x) in enumerate(zip(output.attentions, residuals, strict=True)):
        pattern = attention[0].numpy()
        window = windows[layer] or n
        n_keys = np.minimum(n_seen, window)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -(np.where(pattern > 0, pattern * np.log(pattern), 0.0)).sum(-1).mean(0) / np.log(
                n_keys
            )
        norm = np.sqrt((x**2).sum(-1))
        sees_first = np.arange(n) < window
        by_layer.append(
            {
                "sink": np.where(sees_first, pattern[:, :, 0].mean(0), np.nan),
                "sink_null": np.where(sees_first, 1 / n_keys, np.nan),
                "entropy": np.where(n_keys > 1, entropy, np.nan),
                "entropy_null": np.where(n_keys > 1, 1.0, np.nan),
                "norm": norm,
                "cosine": x @ x[0] / norm / norm[0],
            }
        )
    loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="none").numpy()
    return by_layer, loss


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "mistral", "gemma2", "gpt2", "gpt-oss"], 2))
def test_bins_are_means_of_the_dense_values(family: str) -> None:
    lens = toy_lens(family)
    run = phaselens.run(lens, metrics="position-curves", texts=TEXTS, batch_tokens=64)
    windows = lens.info.windows
    dense = [dense_values(family, text, windows) for text in TEXTS]
    for row in rows_of(run, "texts"):
        values = dense[int(row["text"])][0][row["layer"]]
        positions = slice(row["first"], row["last"] + 1)
        assert row["n_positions"] == len(values["norm"][positions])
        for column in COLUMNS:
            part = values[column][positions]
            if np.isnan(part).all():
                assert row[column] is None
            else:
                assert row[column] == pytest.approx(np.nanmean(part), rel=1e-5, abs=1e-5), (column, row)
    for row in rows_of(run, "losses"):
        loss = dense[int(row["text"])][1]
        assert row["loss"] == pytest.approx(loss[row["first"] - 1 : row["last"]].mean(), rel=1e-5)


def test_a_bin_has_the_texts_that_reach_it_and_their_interval() -> None:
    run = phaselens.run(toy_lens(), metrics="position-curves", texts=TEXTS)
    bins = rows_of(run, "bins")
    assert [(row["condition"], row["n_texts"]) for row in bins] == [
        ("1", 3), ("2–3", 3), ("4–7", 3), ("8–15", 3), ("16–31", 2), ("32–63", 1)
    ]  # fmt: skip
    by_text = {(row["text"], row["first"]): row["loss"] for row in rows_of(run, "losses")}
    last = bins[-1]
    assert last["loss"] == pytest.approx(by_text["1", 32])
    assert last["loss_low"] is None
    assert bins[4]["loss"] == pytest.approx((by_text["1", 16] + by_text["2", 16]) / 2)
    ends = sorted((by_text["1", 16], by_text["2", 16]))
    assert [bins[4]["loss_low"], bins[4]["loss_high"]] == pytest.approx(ends)
    assert bins[0]["loss_null"] == pytest.approx(np.log(67))
    assert any("only one text reaches position 32" in warning for warning in run.warnings)
    layers = rows_of(run, "layers")
    assert bins[2]["sink"] == pytest.approx(np.mean([row["sink"] for row in layers if row["first"] == 4]))


def test_positions_beyond_the_trained_length_are_marked() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 12}
    lens = toy_lens("llama", rope_parameters=rope, max_position_embeddings=48)
    assert (lens.info.n_ctx, lens.info.n_ctx_trained) == (48, 12)
    run = phaselens.run(lens, metrics="position-curves", texts=TEXTS)
    assert [row["beyond"] for row in rows_of(run, "bins")] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    (summary,) = rows_of(run, "summary")
    losses = rows_of(run, "losses")
    means_within = [
        np.average(
            [row["loss"] for row in losses if row["text"] == text and row["last"] < 12],
            weights=[row["n_positions"] for row in losses if row["text"] == text and row["last"] < 12],
        )
        for text in "012"
    ]
    assert summary["loss_within"] == pytest.approx(np.mean(means_within))
    assert summary["n_ctx_trained"] == 12
    assert any("the bin across the trained length, 12, counts as neither" in text for text in run.warnings)
    finer = phaselens.run(lens, metrics=("position-curves", {"per_octave": 4}), texts=TEXTS)
    assert len(rows_of(finer, "bins")) > len(rows_of(run, "bins"))


def test_uniform_attention_and_a_sink_are_found() -> None:
    uniform = plant("uniform attention")
    run = phaselens.run(uniform.lens, metrics="position-curves", texts=[uniform.text])
    for row in rows_of(run, "layers"):
        assert (row["sink"], row["entropy"]) == (pytest.approx(row["sink_null"]), pytest.approx(1.0))
    sink = plant("pure sink")
    run = phaselens.run(sink.lens, metrics="position-curves", texts=[sink.text])
    planted = [row for row in rows_of(run, "layers") if row["layer"] == sink.layer]
    assert all(row["sink"] >= 0.25 > row["sink_null"] for row in planted if row["first"] >= 8)


@pytest.mark.slow
def test_missing_values_have_reasons() -> None:
    lens = toy_lens("mistral")
    windowed = phaselens.run(lens, metrics="position-curves", texts=TEXTS)
    assert any("sink is missing from position 7 on in layer 0, 1" in text for text in windowed.warnings)
    assert rows_of(windowed, "bins")[4]["sink"] is None
    broken = toy_lens("llama", num_hidden_layers=3)
    with torch.no_grad():
        broken.original_model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    run = phaselens.run(broken, metrics="position-curves", texts=TEXTS)
    layers = rows_of(run, "layers")
    assert all(row["norm"] is None for row in layers if row["layer"] == 1)
    assert all(row["norm"] is not None for row in layers if row["layer"] == 0)
    assert all(row["loss"] is None for row in rows_of(run, "bins"))
    assert any("NaN or infinite in layer 1, 2" in text for text in run.warnings)
    assert any("loss is missing: logits are NaN or infinite" in text for text in run.warnings)
    single = phaselens.run(toy_lens(), metrics="position-curves", texts=["a"], bos="never")
    assert rows_of(single, "bins") == []
    assert any("only one token" in text for text in single.warnings)


def test_bins_of_finer_steps_cover_all_positions_once() -> None:
    for per_octave in (1, 3, 16):
        edges = PositionBins(per_octave).edges
        assert edges[0] == 1
        assert all(first < second for first, second in pairwise(edges))
        assert {2**exponent for exponent in range(25)} <= set(edges)
    means, counts = PositionBins(2).means(torch.arange(9.0))
    assert pooled_means(means.numpy(), counts.numpy(), range(5)) == pytest.approx(4.0)
    assert np.isnan(pooled_means(means.numpy(), counts.numpy(), []))


@pytest.mark.slow
def test_the_figure_has_a_panel_for_each_curve(tmp_path: Any) -> None:
    from phaselens.report.figures import draw

    run = phaselens.run(
        [toy_lens(label="a$x"), toy_lens("mistral", label="b")], metrics="position-curves", texts=TEXTS
    )
    assert [path.name for path in draw(run, tmp_path)] == ["position-curves.png", "position-curves.svg"]
    assert run.failed == []


@pytest.mark.slow
def test_the_contract() -> None:
    check_metric(PositionCurves, {"per_octave": 2})
