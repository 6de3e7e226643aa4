"""The MLP at BOS and queries and keys, alone and together: arms against whole forwards, and the interaction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from phaselens.testing import check_metric
from phaselens_plugins.combined import Combined
from tests.plugins.ablations import TEXTS, notes, predicted, row, rows, run, zero_at
from tests.plugins.qk_models import naive_loss, pooled, states, top_cells, write
from tests.plugins.test_qk_disruption import others
from tests.toys import toy_lens

NAME = "combined"
LAYER = 0


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens("llama-gqa", dtype=torch.float64)


@pytest.fixture(scope="module")
def found(lens: Any) -> Any:
    return run(NAME, lens, params={"layer": LAYER})


@pytest.fixture(scope="module")
def slow(lens: Any) -> dict[str, np.ndarray]:
    """Loss [text] of each arm by whole forwards."""
    points = [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in ("hook_rot_q", "hook_rot_k")]
    clean = {text: states(lens, text, points) for text in TEXTS}
    mlp = [(f"blocks.{LAYER}.hook_mlp_out", zero_at(0))]
    losses: dict[str, list[float]] = {"base": [], "bos": [], "qk": [], "both": []}
    for text in TEXTS:
        seen = [clean[other] for other in others(TEXTS, text)]
        disturb = [(point, write(top_cells(pooled(seen, point)))) for point in points]
        for arm, hooks in (("base", []), ("bos", mlp), ("qk", disturb), ("both", [*mlp, *disturb])):
            losses[arm].append(naive_loss(lens, text, hooks))
    return {arm: np.array(found) for arm, found in losses.items()}


def arms(found: Any) -> tuple[str, str, str]:
    """Names of the three conditions."""
    bos, qk, both = [r["condition"] for r in rows(found, NAME) if r["condition"] != "baseline"]
    return bos, qk, both


def test_each_arm_is_what_whole_forwards_give(found: Any, slow: dict[str, np.ndarray]) -> None:
    bos, qk, both = arms(found)
    assert qk == "top-1"
    assert both == f"{bos} + {qk}"
    for name, arm in ((bos, "bos"), (qk, "qk"), (both, "both")):
        measured = [r["loss"] for r in rows(found, NAME, "texts") if r["condition"] == name]
        assert measured == pytest.approx(slow[arm], abs=1e-6)
    assert [row(found, NAME, name)["layer"] for name in arms(found)] == [LAYER, None, LAYER]


def test_cells_are_chosen_without_the_mlp_s_removal(lens: Any, slow: dict[str, np.ndarray]) -> None:
    """Chosen under it, they would be others in this model, and the losses too."""
    points = [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in ("hook_rot_q", "hook_rot_k")]
    mlp = [(f"blocks.{LAYER}.hook_mlp_out", zero_at(0))]
    removed = {text: states(lens, text, points, mlp) for text in TEXTS}
    wrong = []
    for text in TEXTS:
        seen = [removed[other] for other in others(TEXTS, text)]
        wrong.append(
            naive_loss(lens, text, [*mlp, *((p, write(top_cells(pooled(seen, p)))) for p in points)])
        )
    assert np.abs(np.array(wrong) - slow["both"]).max() > 1e-4


def test_the_interaction_is_both_less_each_text_by_text(
    lens: Any, found: Any, slow: dict[str, np.ndarray]
) -> None:
    (one,) = rows(found, NAME, "interactions")
    n = predicted(lens)
    extra = slow["both"] - slow["bos"] - slow["qk"] + slow["base"]
    assert one["interaction"] == pytest.approx((extra * n).sum() / n.sum(), abs=1e-9)
    assert one["interaction"] == pytest.approx(
        one["delta_both"] - one["delta_bos_mlp"] - one["delta_qk"], abs=1e-9
    )
    assert one["ci_low"] < one["interaction"] < one["ci_high"]
    mean, n_texts = (extra * n).sum() / n.sum(), len(n)
    variance = (np.square(extra - mean) * n).sum() / n.sum() * n_texts / (n_texts - 1)
    assert one["d_z"] == pytest.approx(mean / np.sqrt(variance), rel=1e-6)
    assert one["n_texts"] == len(TEXTS)
    (contrast,) = rows(found, NAME, "contrasts")
    assert contrast["control"] == "sum of each alone"
    assert (contrast["condition"], contrast["delta_nats"]) == (one["condition"], one["interaction"])
    for arm, column in (("bos", "delta_bos_mlp"), ("qk", "delta_qk"), ("both", "delta_both")):
        assert one[column] == pytest.approx(((slow[arm] - slow["base"]) * n).sum() / n.sum(), abs=1e-6)


def test_two_that_cannot_meet_do_not_interact(lens: Any) -> None:
    """In a model of one layer no query and no key reads what its MLP writes at BOS, and BOS attends to itself alone."""
    alone = toy_lens("llama", dtype=torch.float64, num_hidden_layers=1)
    found = run(NAME, alone, params={"layer": 0})
    (one,) = rows(found, NAME, "interactions")
    assert abs(one["delta_qk"]) > 1e-4
    assert abs(one["delta_bos_mlp"]) > 1e-4
    assert one["interaction"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("disruption", ["massive", "top-1-mean", "study-top-1"])
def test_every_disruption_of_queries_and_keys(lens: Any, disruption: str) -> None:
    params = {"layer": 1, "disruption": disruption, "multiple": 1.3, "rotation": "pre"}
    measured = run(NAME, lens, params=params)
    bos, qk, both = arms(measured)
    assert qk == disruption
    alone = run("qk-disruption", lens, params={"conditions": disruption, "multiple": 1.3, "rotation": "pre"})
    assert row(measured, NAME, qk)["ppl"] == row(alone, "qk-disruption", disruption)["ppl"]
    assert row(measured, NAME, bos)["layer"] == 1
    assert row(measured, NAME, both)["ratio"] != 1


def test_the_layer_is_found_as_bos_mlp_finds_it(lens: Any) -> None:
    found, other = run(NAME, lens), run("bos-mlp", lens, params={"seeds": 0})
    writers = {
        r["condition"]: (r["layer"], r["ppl"]) for r in rows(other, "bos-mlp") if r["ratio"] is not None
    }
    mine = {r["condition"]: (r["layer"], r["ppl"]) for r in rows(found, NAME)}
    assert writers
    assert all(mine[name] == at for name, at in writers.items())


def test_without_a_massive_cell_there_is_no_combination_and_it_says_so(lens: Any) -> None:
    found = run(NAME, lens, params={"disruption": "massive", "multiple": 50})
    assert rows(found, NAME, "interactions") == []
    assert notes(found, "massive is left out")


def test_one_text_is_null_with_the_reason(lens: Any) -> None:
    found = run(NAME, lens, [TEXTS[0]])
    assert rows(found, NAME, "interactions") == []
    assert notes(found, "chosen on other texts")


@pytest.mark.slow
def test_it_keeps_the_contract() -> None:
    check_metric(Combined)
