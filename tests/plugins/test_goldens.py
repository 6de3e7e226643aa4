"""Published matrices and tensors, measured again: their true values match, the known-wrong ones differ as expected."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phaselens.attention import attend, explicit, massive_cells, summarise
from phaselens.spectrum import (
    bos_norm,
    compression_bound,
    massive_activations,
    require_bound,
    row_norms,
    spectrum,
)
from phaselens_plugins.attention_patterns import AttentionPatterns
from tests.plugins.views import from_matrix, info, rows, view

DATA = Path(__file__).parents[1] / "data"
GOLDENS = DATA / "goldens"
CHECKS = json.loads((GOLDENS / "attention_checks.json").read_text())["checks"]
FIXTURES = json.loads((DATA / "unit_fixtures.json").read_text())
FILES = {
    "RoPE_layer31": "attn_rope_layer31",
    "DroPE_layer15": "attn_drope_layer15",
    "DroPE_layer1": "attn_drope_layer1",
}


def matrix(name: str) -> torch.Tensor:
    """[head, query, key], float64."""
    stored = json.loads((GOLDENS / f"{FILES[name]}.json").read_text())
    pattern = torch.zeros(stored["shape"], dtype=torch.float64)
    for head, queries in enumerate(stored["rows"]):
        for query, keys in enumerate(queries):
            pattern[head, query, : len(keys)] = torch.tensor(keys, dtype=torch.float64)
    return pattern


def measured(pattern: torch.Tensor) -> AttentionPatterns:
    n_heads, n, _ = pattern.shape
    metric = AttentionPatterns(info(n_heads=n_heads, d_head=n), AttentionPatterns.Params())
    metric.update(view(from_matrix(pattern), (n,)))
    return metric


@pytest.mark.parametrize("name", FILES)
def test_values_of_stored_matrices(name: str) -> None:
    """float16 rows sum to 1 within 3e-4, and ours are normalised: hence the tolerance."""
    want = CHECKS[name]
    by_head = rows(measured(matrix(name)), "texts")

    def mean(column: str) -> float:
        return float(np.mean([row[column] for row in by_head]))

    assert mean("entropy") == pytest.approx(want["true_entropy_nats_all_queries"], rel=5e-4)
    assert mean("entropy") == pytest.approx(want["mixing_score_nats"], rel=5e-4)
    assert mean("entropy_normalised") == pytest.approx(want["normalised_entropy_excl_q0"], rel=5e-4)
    assert mean("sink") == pytest.approx(want["mean_sink_score_excl"], rel=5e-4)
    assert mean("local_with_bos") == pytest.approx(want["local_mean_text0"], rel=5e-4)
    rate = np.mean([row["sink"] >= 0.3 for row in by_head])
    assert rate == want["sink_rate_excl"]
    local = [row["local_with_bos"] - row["local"] for row in by_head]
    assert min(local) > -1e-6
    assert mean("local") < mean("local_with_bos"), "position 0 is no neighbour"


@pytest.mark.parametrize("name", ["RoPE_layer31", "DroPE_layer15"])
def test_entropy_of_the_last_row_is_not_the_mean_entropy(name: str) -> None:
    """In float16 a clamp to 1e-10 underflows, every masked row turns NaN and then 0, and the last row alone is left."""
    want = CHECKS[name]
    metric = measured(matrix(name))
    last = np.mean([row["entropy_last"] for row in rows(metric, "classes")])
    assert last == pytest.approx(want["last_row_entropy_over_T"], rel=5e-4)
    assert last == pytest.approx(want["script_entropy_float16_replica"], rel=0.02)
    assert np.mean([row["entropy"] for row in rows(metric, "texts")]) > 10 * last


def test_clamped_scores_tie() -> None:
    """Scores near 1e5 clamped to ±100 tie, so their rows turn uniform; the matrix stored for that layer shows it."""
    want = CHECKS["DroPE_layer1"]
    stored = matrix("DroPE_layer1")
    seen = torch.arange(1, 23)
    uniform = [(row[: int(n)] == row[0]).all() for head in stored for row, n in zip(head, seen, strict=True)]
    assert sum(map(bool, uniform)) - len(stored) == want["rows_fully_uniform"], "rows 0 are uniform anyway"

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, 22, 128, generator=generator) for _ in range(2))
    q, k = (x / x.norm(dim=-1, keepdim=True) * size for x, size in ((q, 1164.0), (k, 975.0)))
    _, scores, true = explicit(q.double(), k.double(), k.double(), scale=128**-0.5)
    assert scores[scores > -torch.inf].abs().max() > 1e4
    clamped = scores.clamp(-100, 100).masked_fill(scores == -torch.inf, -torch.inf).softmax(-1)
    ties = (clamped == clamped.amax(-1, keepdim=True)).sum(-1) > 1
    assert ties.float().mean() > 0.5
    _, lse = attend(q, k, k, scale=128**-0.5)
    ours = summarise(q, k, lse, scale=128**-0.5, position=0).sink
    assert ours is not None
    assert torch.allclose(ours.double(), true[..., 0], atol=1e-5)
    assert (clamped[..., 0] - true[..., 0]).abs().max() > 0.1


def test_unsquared_singular_values_give_another_entropy() -> None:
    want = FIXTURES["representation"]
    x = torch.tensor(want["X"], dtype=torch.float64)
    found = spectrum(x)
    assert found.entropy == pytest.approx(want["entropy_nats"], abs=1e-12)
    assert found.entropy_normalised == pytest.approx(want["entropy_norm_log_min_T_d"], abs=1e-12)
    assert found.anisotropy == pytest.approx(want["anisotropy_p1"], abs=1e-12)
    assert found.effective_rank == pytest.approx(want["effective_rank"], abs=1e-12)
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    p = s / s.sum()
    p = p[p > 1e-15]
    wrong = -(p * np.log(p)).sum()
    assert wrong == pytest.approx(want["WRONG_entropy_from_unsquared_sigma_nats"], abs=1e-6)
    assert wrong > 3 * found.entropy


def test_bound_of_the_fixture() -> None:
    want = FIXTURES["representation"]
    x = torch.tensor(want["X"], dtype=torch.float64)
    bound = compression_bound(x)
    theorem = want["theorem"]
    assert bound.anisotropy == pytest.approx(theorem["p_lower_bound_on_p1"], abs=1e-12)
    assert bound.entropy == pytest.approx(theorem["entropy_upper_bound_nats"], abs=1e-12)
    assert (bound.ratio, bound.alignment) == pytest.approx((theorem["c"], theorem["alpha"]))
    require_bound(spectrum(x), bound)
    with pytest.raises(ArithmeticError, match="below its bound"):
        require_bound(spectrum(x[1:]), bound)


def test_norms_of_the_fixture() -> None:
    want = FIXTURES["representation"]
    norms = row_norms(torch.tensor(want["X"], dtype=torch.float64))
    assert norms.tolist() == pytest.approx(want["row_norms"])
    found = bos_norm(norms)
    assert (found.norm, found.ratio) == pytest.approx((want["bos_norm"], want["bos_ratio"]))


def test_attention_of_the_fixture() -> None:
    want = FIXTURES["attention"]
    metric = measured(torch.tensor([want["A"]], dtype=torch.float64))
    (row,) = rows(metric, "texts")
    assert row["entropy"] == pytest.approx(want["mixing_score_nats"], abs=1e-9)
    assert row["entropy_normalised"] == pytest.approx(want["mean_normalised_q_ge_1"], abs=1e-9)
    assert row["concentration"] == pytest.approx(want["colsum_concentration"], abs=1e-9)
    assert row["sink"] == pytest.approx(want["sink_score_excl_q0"], abs=1e-9)
    assert row["local_with_bos"] == pytest.approx(want["local_window5_as_in_study"], abs=1e-9)
    profile = rows(metric, "profile")
    assert [each["attention"] for each in profile[:5]] == pytest.approx(want["distance_profile"], abs=1e-9)
    assert [each["attention"] for each in profile[5:]] == [None] * 59
    excluded = row["itself"] * 4 + 1
    assert excluded / 5 == pytest.approx(want["distance_profile"][0], abs=1e-9)


def test_massive_activation_of_the_fixture() -> None:
    want = FIXTURES["massive_activation"]
    x = torch.linspace(0.01, 0.4, 2000, dtype=torch.float64).view(1, 2000)
    x[0, 7], x[0, 9] = 767.6, 150.0
    found = massive_activations(x)
    assert found.median == pytest.approx(want["median_abs"], rel=1e-12)
    assert found.ratio == pytest.approx(want["ratio_idx7"], rel=1e-12)
    assert abs(found.values[1]) / found.median == pytest.approx(want["ratio_idx9"], rel=1e-12)
    assert found.n_massive == 1
    assert found.dimensions[:2] == [7, 9]


@pytest.mark.parametrize(("tensor", "name"), [("q", "q_post"), ("k", "k_post"), ("v", "v")])
def test_massive_values_of_published_tensors(tensor: str, name: str) -> None:
    stored: dict[str, Any] = json.loads((GOLDENS / "jin_qkv_llama2.json").read_text())
    norms, want = torch.tensor(stored[f"M_{tensor}"], dtype=torch.float64), stored["massive"][name]
    cells = massive_cells(norms)
    assert cells.nonzero().tolist() == want["positions_global"]
    assert int(cells.sum()) == want["count_lambda5_global"]
    assert int(massive_cells(norms, 5.0, "per_head").sum()) == want["count_lambda5_per_head"]
    assert float(norms.mean()) == pytest.approx(want["mean"], rel=1e-4)
    assert math.isclose(float(norms.max()), want["max"], rel_tol=1e-4)


def test_massive_values_of_the_fixture() -> None:
    from phaselens.attention import norm_matrix

    want = FIXTURES["massive_values"]
    norms = norm_matrix(torch.tensor(want["Q"], dtype=torch.float64))
    assert norms.tolist() == want["M"]
    assert int(massive_cells(norms, want["lam"]).sum()) == want["count_global"]
    assert int(massive_cells(norms, want["lam"], "per_head").sum()) == want["count_per_head"]
