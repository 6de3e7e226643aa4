"""The largest product of a query and a key that it sees, against the matrix of all products in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens.attention import _largest_product, largest_product
from phaselens.errors import InputError


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_largest_product, "_SIDE", 7)


def dense(q: torch.Tensor, k: torch.Tensor, window: int | None) -> list[tuple[float, int, int]]:
    """Return the largest product of each head, and its query and key, from the whole matrix in float64."""
    n, n_heads = q.shape[:2]
    keys = k.repeat_interleave(n_heads // k.shape[1], 1)
    products = torch.einsum("qhd,khd->hqk", q.double(), keys.double()).abs()
    query, key = torch.arange(n)[:, None], torch.arange(n)
    products = products.masked_fill((key > query) | (key <= query - (window or n)), -1.0)
    values, indices = products.flatten(1).max(1)
    return [
        (value, *divmod(index, n)) for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def streamed(q: torch.Tensor, k: torch.Tensor, window: int | None = None) -> list[tuple[float, int, int]]:
    largest = largest_product(q, k, window=window)
    return list(zip(largest.value.tolist(), largest.query.tolist(), largest.key.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 24),
    heads=st.sampled_from([(4, 2), (3, 3), (2, 1)]),
    window=st.none() | st.integers(1, 25),
    seed=st.integers(0, 999),
)
def test_it_is_that_of_the_visible_pairs(
    n: int, heads: tuple[int, int], window: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, n_heads, 8, generator=generator) for n_heads in heads)
    expected = dense(q, k, window)
    for (value, query, key), (dense_value, dense_query, dense_key) in zip(
        streamed(q, k, window), expected, strict=True
    ):
        assert value == pytest.approx(dense_value, rel=1e-12)
        assert (query, key) == (dense_query, dense_key)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 24), window=st.none() | st.integers(1, 25), seed=st.integers(0, 999))
def test_the_first_of_equal_products_counts(n: int, window: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-1, 2, (n, 2, 2), generator=generator).float() for _ in range(2))
    assert streamed(q, k, window) == dense(q, k, window)


def test_states_in_half_precision_and_of_any_size_do_not_overflow() -> None:
    q = torch.full((4, 2, 8), 2000.0, dtype=torch.float16)
    assert largest_product(q, q).value.tolist() == [8 * 2000.0**2] * 2
    q = torch.full((9, 1, 2), 1e20)
    q[8] *= -3
    value, query, key = streamed(q, torch.full((9, 1, 2), 1e30))[0]
    assert (value, query, key) == (pytest.approx(6e50, rel=1e-6), 8, 0)


def test_a_head_that_is_not_finite_has_no_largest_product() -> None:
    q = torch.ones(4, 2, 8)
    q[1, 0, 0] = torch.inf
    largest = largest_product(q, torch.ones(4, 2, 8))
    assert largest.value.isnan().tolist() == [True, False]
    assert (largest.query.tolist()[0], largest.key.tolist()[0]) == (-1, -1)
    k = torch.ones(4, 1, 8)
    k[3, 0, 0] = torch.nan
    assert largest_product(torch.ones(4, 2, 8), k).value.isnan().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="expected k"):
        largest_product(torch.ones(5, 4, 8), torch.ones(5, 3, 8))
