"""Massive cells and norms of pairs against rotations, simulation and published tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phaselens.attention import gaussian_massive_share, massive_cells, norm_matrix, pair_norms

DATA = Path(__file__).parents[1] / "data"
GOLDENS = DATA / "goldens"
FIXTURES = json.loads((DATA / "unit_fixtures.json").read_text())


def test_the_share_of_gaussian_massive_cells_agrees_with_simulation() -> None:
    rng = np.random.default_rng(2)
    norms = np.sqrt((rng.standard_normal((200000, 3)) ** 2).sum(1))
    assert gaussian_massive_share(3, 1.5) == pytest.approx((norms > 1.5 * norms.mean()).mean(), rel=0.05)


@pytest.mark.parametrize(
    "pairs", [[(0, 4), (1, 5), (2, 6), (3, 7)], [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2), (1, 3)], [(5, 2)]]
)
def test_a_rotation_keeps_the_norms_of_the_pairs_that_it_mixes(pairs: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 2, 8, generator=generator, dtype=torch.float64)
    turned = states.clone()
    for dim_a, dim_b in pairs:
        angle = torch.rand(40, 1, generator=generator, dtype=torch.float64) * 6
        turned[..., dim_a] = states[..., dim_a] * angle.cos() - states[..., dim_b] * angle.sin()
        turned[..., dim_b] = states[..., dim_a] * angle.sin() + states[..., dim_b] * angle.cos()
    norms, turned_norms = norm_matrix(states), norm_matrix(turned)
    assert pair_norms(norms, pairs).shape == (2, len(pairs))
    torch.testing.assert_close(
        pair_norms(norms, pairs), pair_norms(turned_norms, pairs), atol=1e-12, rtol=1e-12
    )
    dim_a, dim_b = pairs[0]
    expected = states[..., [dim_a, dim_b]].square().sum((0, 2)).sqrt()
    torch.testing.assert_close(pair_norms(norms, pairs)[:, 0], expected, atol=1e-12, rtol=1e-12)
    assert pair_norms(norms, []).shape == (2, 0)


@pytest.mark.parametrize(("tensor", "name"), [("q", "q_post"), ("k", "k_post"), ("v", "v")])
def test_massive_values_of_published_tensors(tensor: str, name: str) -> None:
    stored: dict[str, Any] = json.loads((GOLDENS / "jin_qkv_llama2.json").read_text())
    norms, expected = torch.tensor(stored[f"M_{tensor}"], dtype=torch.float64), stored["massive"][name]
    cells = massive_cells(norms)
    assert cells.nonzero().tolist() == expected["positions_global"]
    assert int(cells.sum()) == expected["count_lambda5_global"]
    assert int(massive_cells(norms, 5.0, "per_head").sum()) == expected["count_lambda5_per_head"]
    assert float(norms.mean()) == pytest.approx(expected["mean"], rel=1e-4)
    assert math.isclose(float(norms.max()), expected["max"], rel_tol=1e-4)


def test_massive_values_of_the_fixture() -> None:
    from phaselens.attention import norm_matrix

    expected = FIXTURES["massive_values"]
    norms = norm_matrix(torch.tensor(expected["Q"], dtype=torch.float64))
    assert norms.tolist() == expected["M"]
    assert int(massive_cells(norms, expected["lam"]).sum()) == expected["count_global"]
    assert int(massive_cells(norms, expected["lam"], "per_head").sum()) == expected["count_per_head"]
