"""Distances between rows at their limits: rows of many sizes, zero rows, no row, other types, wrong arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from phaselens.errors import InputError
from phaselens.spectrum import adjacency, prefix_spread, rank_collapse, relative_change


def uneven(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Return rows whose norms span several orders."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x * torch.exp(3 * torch.randn(n, 1, generator=generator, dtype=torch.float64))


def test_the_relative_change_equals_dense_numpy() -> None:
    for n in (1, 300):
        x, changed = uneven(n, 4), uneven(n, 4, seed=1)
        expected = np.linalg.norm((changed - x).numpy(), axis=1) / np.linalg.norm(x.numpy(), axis=1)
        np.testing.assert_allclose(relative_change(x, changed).numpy(), expected, rtol=1e-12)


def test_a_zero_row_has_no_relative_change() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    changed = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    change = relative_change(x, changed)
    assert change[:2].isnan().all()
    assert change[2] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_rows_there_are_no_values_in_float64(dtype: torch.dtype) -> None:
    x = torch.zeros(0, 3, dtype=dtype)
    for values in (prefix_spread(x), relative_change(x, x)):
        assert values.shape == (0,)
        assert values.dtype == torch.float64


def test_adjacency_of_rows_of_many_sizes_equals_dense_numpy() -> None:
    x = uneven(200, 3)
    partners = torch.randint(0, 200, (199,), generator=torch.Generator().manual_seed(1))
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    cosines = unit @ unit.T
    differences = np.array([cosines[i, i + 1] - cosines[i, partners[i]] for i in range(199)])
    assert adjacency(x, partners) == pytest.approx(np.mean(0.5 + 0.5 * np.sign(differences.round(14))))


def test_one_row_may_be_the_partner_of_all() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 1.0]])
    assert adjacency(x, torch.tensor([0, 0])) == 0
    assert adjacency(x, torch.tensor([2, 2])) == 0.75, "closer to the next row; a tie, which counts as half"


def test_orthogonal_rows_of_norm_1_spread_like_random_ones() -> None:
    assert prefix_spread(torch.eye(4)).tolist() == pytest.approx([math.sqrt(1 - 1 / n) for n in (1, 2, 3, 4)])
    assert rank_collapse(torch.eye(4)) == pytest.approx(math.sqrt(3 / 4))


def test_prefixes_of_zero_rows_are_missing_until_the_first_other_row() -> None:
    spread = prefix_spread(torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 1.0]]))
    assert spread[:2].isnan().all()
    assert float(spread[2]) == pytest.approx(math.sqrt(2 / 3))


X = torch.ones(3, 2)
MATRIX = r"a tensor \[pos, d_model\], received a tensor \[2\]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_collapse(X[0]), f"expected x as {MATRIX}"),
        (lambda: prefix_spread(X[0]), f"expected x as {MATRIX}"),
        (lambda: relative_change(X[0], X), f"expected x as {MATRIX}"),
        (lambda: relative_change(X, X[0]), f"expected changed as {MATRIX}"),
        (lambda: relative_change(X, X[:2]), r"expected changed of shape \[3, 2\], received \[2, 2\]"),
        (lambda: adjacency(X[0], torch.tensor([0])), f"expected x as {MATRIX}"),
        (lambda: adjacency(X, torch.tensor([[0, 1]])), r"expected partners as a tensor \[pos − 1\], received one of"),
        (lambda: adjacency(X[:0], torch.tensor([0])), r"expected partners \[0\] as whole numbers"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_of_a_spread(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
