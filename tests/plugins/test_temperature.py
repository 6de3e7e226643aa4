"""Temperature against models whose own scale is changed, its best β by hand, and hostile input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from phaselens.errors import InputError
from phaselens.plugin import Site
from phaselens.testing import check_metric
from phaselens_plugins.temperature import ScaleByLength, Temperature, parse_betas
from tests.marks import mark_later_slow
from tests.plugins import ablations
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (11, 39, 17, 24)]
METRIC = "temperature"


def rows(result: Any, table: str) -> list[dict[str, Any]]:
    return ablations.rows(result, METRIC, table)


def token_losses(lens: Any, text: str, factors: dict[int, float]) -> np.ndarray:
    """Return the loss of each token but the first, with the module's own scale times a factor in some layers."""
    ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
    modules = {layer: lens.blocks[layer].attn.original_component for layer in factors}
    scales = {layer: module.scaling for layer, module in modules.items()}
    try:
        for layer, module in modules.items():
            module.scaling = scales[layer] * factors[layer]
        logits = lens.stream(ids, unembed=True)[0, :-1].double()
    finally:
        for layer, module in modules.items():
            module.scaling = scales[layer]
    losses: np.ndarray = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", mark_later_slow(["llama-gqa", "gemma2", "gpt-oss", "llama-drope-qk-norm-nope"], 2)
)
def test_losses_are_those_of_the_scaled_modules(family: str) -> None:
    lens = toy_lens(family, dtype=torch.float64)
    params = {"betas": "0.5, 1.3", "at": "sweep"}
    result = ablations.run(METRIC, lens, TEXTS, params=params, batch_tokens=64)
    losses = {(row["text"], row["condition"], row["layer"]): row["loss"] for row in rows(result, "texts")}
    for number, text in enumerate(TEXTS):
        for beta in (0.5, 1.3):
            everywhere = token_losses(lens, text, {0: beta, 1: beta})
            assert losses[str(number), f"β = {beta}", None] == pytest.approx(everywhere.mean(), rel=1e-6)
            for layer in (0, 1):
                one_layer = token_losses(lens, text, {layer: beta})
                assert losses[str(number), f"β = {beta}, one layer", layer] == pytest.approx(
                    one_layer.mean(), rel=1e-6
                )


def test_loss_by_position_and_the_best_beta() -> None:
    lens = toy_lens("llama", dtype=torch.float64)
    result = ablations.run(METRIC, lens, TEXTS, params={"betas": "0.5, 1, 2"})
    losses = {
        beta: [token_losses(lens, text, {0: beta, 1: beta}) for text in TEXTS] for beta in (0.5, 1.0, 2.0)
    }
    by_bin = {(row["condition"], row["first"]): row for row in rows(result, "lengths")}
    for first in (1, 4, 16):
        means = {
            beta: [text[first - 1 : 2 * first - 1].mean() for text in texts if len(text) >= first]
            for beta, texts in losses.items()
        }
        row = by_bin["β = 2", first]
        assert row["loss"] == pytest.approx(np.mean(means[2.0]), rel=1e-6)
        assert row["delta_nats"] == pytest.approx(np.mean(means[2.0]) - np.mean(means[1.0]), abs=1e-6)
        assert row["n_texts"] == len(means[1.0])
        best = min(means, key=lambda beta: (np.mean(means[beta]), abs(math.log(beta))))
        (chosen,) = [row for row in rows(result, "best") if row["first"] == first]
        assert chosen["beta"] == best
        assert chosen["gain"] == pytest.approx(np.mean(means[1.0]) - np.mean(means[best]), abs=1e-6)
        assert chosen["beta_low"] <= best <= chosen["beta_high"]
    (overall,) = [row for row in rows(result, "best") if row["first"] is None]
    (summary,) = rows(result, "summary")
    assert (summary["best_beta"], summary["gain_held_out"]) == (overall["beta"], overall["gain_held_out"])
    sweep = {row["beta"]: row for row in rows(result, "sweep")}
    assert (sweep[1.0]["ratio"], sweep[1.0]["delta_nats"], sweep[1.0]["ratio_low"]) == (1.0, 0.0, 1.0)
    total = sum(map(len, losses[1.0]))
    delta = sum((a - b).sum() for a, b in zip(losses[2.0], losses[1.0], strict=True)) / total
    assert sweep[2.0]["delta_nats"] == pytest.approx(delta, rel=1e-5)


def test_where_no_beta_changes_the_loss_the_best_is_that_of_the_unedited_model() -> None:
    """The token at position 1 is predicted by query 0, which sees one key."""
    result = ablations.run(METRIC, toy_lens("llama"), TEXTS, params={"betas": "0.5, 2"})
    (row,) = [row for row in rows(result, "best") if row["first"] == 1]
    names = ("beta", "beta_low", "beta_high", "gain", "gain_held_out")
    assert [row[name] for name in names] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_halved_scale_is_restored_by_beta_two() -> None:
    losses = {}
    for factor in (1.0, 0.5):
        lens = toy_lens("llama", dtype=torch.float64)
        for block in lens.blocks:
            block.attn.original_component.scaling *= factor
        result = ablations.run(METRIC, lens, TEXTS, params={"betas": "2"})
        losses[factor] = {(row["text"], row["condition"]): row["loss"] for row in rows(result, "texts")}
    for number in range(len(TEXTS)):
        assert losses[0.5][str(number), "β = 2"] == losses[1.0][str(number), "baseline"]
        assert losses[0.5][str(number), "baseline"] != losses[1.0][str(number), "baseline"]


def test_drope_sets_beta_by_the_length_of_each_text() -> None:
    lens = toy_lens("llama", dtype=torch.float64, max_position_embeddings=16)
    result = ablations.run(METRIC, lens, TEXTS, params={"betas": "1.1", "c": 0.4}, batch_tokens=200)
    losses = {
        row["text"]: row["loss"] for row in rows(result, "texts") if row["condition"] == "β = 1 + c ln s"
    }
    for number, text in enumerate(TEXTS):
        length = len(lens.text_tokenizer(text)["input_ids"])
        beta = 1 + 0.4 * max(0.0, math.log(length / 16))
        expected = token_losses(lens, text, {0: beta, 1: beta}).mean()
        assert losses[str(number)] == pytest.approx(expected, rel=1e-6)
    short = ablations.run(METRIC, lens, TEXTS[:1], params={"betas": "1.1"})
    assert all(row["condition"] != "β = 1 + c ln s" for row in rows(short, "conditions"))
    assert any("c ln s is missing: no text has more than the 16 tokens" in note for note in short.warnings)
    off = ablations.run(METRIC, lens, TEXTS[:1], params={"betas": "1.1", "c": "none"})
    assert not any("c ln s" in note for note in off.warnings)
    with pytest.raises(LookupError, match="depends on the text's length"):
        ScaleByLength(0.4, 16)(
            torch.ones(1, 2, 3, 4), Site("blocks.0.attn.hook_rot_q", 0, torch.arange(2)[None])
        )


def test_wrong_factors_and_layers_are_refused() -> None:
    for text in ("", "0", "-1", "inf", "nan", "1, a"):
        with pytest.raises(InputError, match="give numbers above 0"):
            Temperature.Params(betas=text)
    with pytest.raises(InputError, match="layers"):
        Temperature(toy_lens("llama").info, Temperature.Params(layers="7"))
    assert parse_betas("2,2.0, .5") == [0.5, 1.0, 2.0]


@pytest.mark.slow
def test_the_figure_is_drawn(tmp_path: Any) -> None:
    from phaselens.report.figures import draw

    result = ablations.run(METRIC, toy_lens(), TEXTS, params={"betas": "0.5, 2"})
    assert [path.name for path in draw(result, tmp_path)] == ["temperature.png", "temperature.svg"]
    assert result.failed == []


def test_the_figure_has_the_best_beta_of_each_layer_after_a_sweep() -> None:
    result = ablations.run(METRIC, toy_lens(), TEXTS, params={"betas": "0.5, 2", "at": "sweep"})
    figure = Figure()
    Temperature.plot(result.metrics[METRIC].tables, figure)
    by_layer = figure.axes[2].lines[-1]
    best = [row["beta"] for row in rows(result, "best") if row["layer"] is not None and row["first"] is None]
    assert (list(by_layer.get_xdata()), list(by_layer.get_ydata())) == ([0.0, 1.0], best)


@pytest.mark.slow
def test_the_contract() -> None:
    check_metric(Temperature, {"betas": "0.5, 2", "at": "sweep"})
