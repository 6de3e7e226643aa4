"""Rank collapse, prefix spread and adjacency against dense numpy, and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens.errors import InputError
from phaselens.spectrum import adjacency, prefix_spread, random_spread, rank_collapse


def dense_collapse(x: np.ndarray) -> float:
    return float(np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x))


def random_rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 99), st.sampled_from([0.0, 1.0, 1e6]))
def test_collapse_and_prefixes_equal_dense_numpy(n: int, d: int, seed: int, offset: float) -> None:
    x = random_rows(n, d, seed) + offset
    assert rank_collapse(x) == pytest.approx(dense_collapse(x.numpy()), rel=1e-9, abs=1e-15)
    expected = [dense_collapse(x[: t + 1].numpy()) for t in range(n)]
    assert prefix_spread(x).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_equal_rows_have_no_spread_in_any_precision() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.tensor([0.1, -3.0, 1e4], dtype=dtype).expand(200, 3)
        assert rank_collapse(x) < 1e-15
        assert float(prefix_spread(x).max()) < 1e-15


def test_random_directions_have_the_null_on_average() -> None:
    n, norms = 6, torch.tensor([9.0, 1.0, 1.0, 2.0, 1.0, 4.0], dtype=torch.float64)
    squares = []
    for seed in range(400):
        x = random_rows(n, 4, seed)
        squares.append(rank_collapse(norms[:, None] * x / x.norm(dim=1, keepdim=True)) ** 2)
    assert np.mean(squares) == pytest.approx(random_spread(n) ** 2, abs=4 * np.std(squares) / 20)


def test_rows_without_values() -> None:
    assert math.isnan(rank_collapse(torch.zeros(3, 2)))
    assert math.isnan(rank_collapse(torch.zeros(0, 2)))
    assert math.isnan(rank_collapse(torch.tensor([[1.0], [math.inf]])))
    assert prefix_spread(torch.zeros(0, 2)).tolist() == []
    assert prefix_spread(torch.zeros(2, 2)).isnan().all()
    assert math.isnan(random_spread(0))
    assert math.isnan(adjacency(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)))


def test_adjacency_counts_pairs_as_dense_numpy_does() -> None:
    x = random_rows(300, 5, 0)
    x[40:60] = x[40]  # equal rows: a pair of them ties with another one
    partners = torch.randint(0, 300, (299,), generator=torch.Generator().manual_seed(1))
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    cosines = unit @ unit.T
    differences = [cosines[i, i + 1] - cosines[i, partners[i]] for i in range(299)]
    expected = np.mean([0.5 if abs(d) < 1e-14 else float(d > 0) for d in differences])
    assert adjacency(x, partners) == pytest.approx(expected, abs=1e-12)


def test_adjacency_is_undefined_with_a_zero_row() -> None:
    x = torch.eye(4)
    x[2] = 0.0
    assert math.isnan(adjacency(x, torch.tensor([3, 3, 0])))
    x = torch.eye(4)
    x[0] = 0.0
    assert math.isnan(adjacency(x, torch.tensor([3, 3, 1]))), "it is not a neighbour of another row"


@pytest.mark.parametrize(
    ("partners", "message"),
    [
        (torch.tensor([1.0, 0.0]), r"partners \[2\] as whole numbers, received torch.float32"),
        (torch.tensor([1]), r"partners \[2\] as whole numbers, received torch.int64 \[1\]"),
        (torch.tensor([-1, 0]), "partners from 0 to 2, received -1 to 0"),
        (torch.tensor([0, 3]), "partners from 0 to 2, received 0 to 3"),
    ],
)
def test_adjacency_refuses_partners_that_are_no_rows(partners: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        adjacency(torch.ones(3, 2), partners)
