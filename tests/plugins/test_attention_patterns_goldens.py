"""attention-patterns on published matrices: correct values match, known wrong ones differ as expected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from phaselens.attention import attend, explicit, summarise
from phaselens_plugins.attention_patterns import AttentionPatterns
from tests.plugins.views import attention_activations, info, rows, view

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
    """Return a stored matrix [head, query, key] in float64."""
    published = json.loads((GOLDENS / f"{FILES[name]}.json").read_text())
    pattern = torch.zeros(published["shape"], dtype=torch.float64)
    for head, queries in enumerate(published["rows"]):
        for query, keys in enumerate(queries):
            pattern[head, query, : len(keys)] = torch.tensor(keys, dtype=torch.float64)
    return pattern


def metric_on(pattern: torch.Tensor) -> AttentionPatterns:
    n_heads, n, _ = pattern.shape
    metric = AttentionPatterns(info(n_heads=n_heads, d_head=n), AttentionPatterns.Params())
    metric.update(view(attention_activations(pattern), (n,)))
    return metric


@pytest.mark.parametrize("name", FILES)
def test_values_of_stored_matrices(name: str) -> None:
    """The tolerance allows for float16 rows, which sum to 1 within 3e-4, while the metric normalises them."""
    expected = CHECKS[name]
    by_head = rows(metric_on(matrix(name)), "texts")

    def mean(column: str) -> float:
        return float(np.mean([row[column] for row in by_head]))

    assert mean("entropy") == pytest.approx(expected["true_entropy_nats_all_queries"], rel=5e-4)
    assert mean("entropy") == pytest.approx(expected["mixing_score_nats"], rel=5e-4)
    assert mean("entropy_normalised") == pytest.approx(expected["normalised_entropy_excl_q0"], rel=5e-4)
    assert mean("sink") == pytest.approx(expected["mean_sink_score_excl"], rel=5e-4)
    assert mean("local_with_bos") == pytest.approx(expected["local_mean_text0"], rel=5e-4)
    sink_rate = np.mean([row["sink"] >= 0.3 for row in by_head])
    assert sink_rate == expected["sink_rate_excl"]
    bos_share_of_local = [row["local_with_bos"] - row["local"] for row in by_head]
    assert min(bos_share_of_local) > -1e-6
    assert mean("local") < mean("local_with_bos"), "position 0 is not a neighbour"


@pytest.mark.parametrize("name", ["RoPE_layer31", "DroPE_layer15"])
def test_entropy_of_the_last_row_is_not_the_mean_entropy(name: str) -> None:
    """In float16 a clamp to 1e-10 underflows: every masked row turns NaN and then 0, so only the last row remains."""
    expected = CHECKS[name]
    metric = metric_on(matrix(name))
    mean_entropy_last = np.mean([row["entropy_last"] for row in rows(metric, "classes")])
    assert mean_entropy_last == pytest.approx(expected["last_row_entropy_over_T"], rel=5e-4)
    assert mean_entropy_last == pytest.approx(expected["script_entropy_float16_replica"], rel=0.02)
    assert np.mean([row["entropy"] for row in rows(metric, "texts")]) > 10 * mean_entropy_last


def test_clamped_scores_tie() -> None:
    """Scores near 1e5 clamped to ±100 tie, so their rows turn uniform, as in the published matrix of that layer."""
    expected = CHECKS["DroPE_layer1"]
    published = matrix("DroPE_layer1")
    keys_seen = torch.arange(1, 23)
    is_uniform = [
        (row[: int(n)] == row[0]).all() for head in published for row, n in zip(head, keys_seen, strict=True)
    ]
    assert sum(map(bool, is_uniform)) - len(published) == expected["rows_fully_uniform"], (
        "rows 0 are uniform anyway"
    )

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, 22, 128, generator=generator) for _ in range(2))
    q, k = (x / x.norm(dim=-1, keepdim=True) * size for x, size in ((q, 1164.0), (k, 975.0)))
    _, scores, pattern = explicit(q.double(), k.double(), k.double(), scale=128**-0.5)
    assert scores[scores > -torch.inf].abs().max() > 1e4
    clamped = scores.clamp(-100, 100).masked_fill(scores == -torch.inf, -torch.inf).softmax(-1)
    is_tied = (clamped == clamped.amax(-1, keepdim=True)).sum(-1) > 1
    assert is_tied.float().mean() > 0.5
    _, lse = attend(q, k, k, scale=128**-0.5)
    sink = summarise(q, k, lse, scale=128**-0.5, position=0).sink
    assert sink is not None
    assert torch.allclose(sink.double(), pattern[..., 0], atol=1e-5)
    assert (clamped[..., 0] - pattern[..., 0]).abs().max() > 0.1


def test_attention_of_the_fixture() -> None:
    expected = FIXTURES["attention"]
    metric = metric_on(torch.tensor([expected["A"]], dtype=torch.float64))
    (row,) = rows(metric, "texts")
    assert row["entropy"] == pytest.approx(expected["mixing_score_nats"], abs=1e-9)
    assert row["entropy_normalised"] == pytest.approx(expected["mean_normalised_q_ge_1"], abs=1e-9)
    assert row["concentration"] == pytest.approx(expected["colsum_concentration"], abs=1e-9)
    assert row["sink"] == pytest.approx(expected["sink_score_excl_q0"], abs=1e-9)
    assert row["local_with_bos"] == pytest.approx(expected["local_window5_as_in_study"], abs=1e-9)
    profile = rows(metric, "profile")
    assert [profile_row["attention"] for profile_row in profile[:5]] == pytest.approx(
        expected["distance_profile"], abs=1e-9
    )
    assert [profile_row["attention"] for profile_row in profile[5:]] == [None] * 59
    mass_on_diagonal = row["itself"] * 4 + 1
    assert mass_on_diagonal / 5 == pytest.approx(expected["distance_profile"][0], abs=1e-9)
