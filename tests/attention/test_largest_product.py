"""The largest product of a query and a key that it sees, against the matrix of all products in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens import attention
from phaselens.attention import _largest_product, largest_product
from phaselens.errors import InputError
from tests.attention.reference import dense as dense_attention
from tests.attention.reference import random_qkv


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


def searched(
    q: torch.Tensor, k: torch.Tensor, window: int | None = None, by_query: torch.Tensor | None = None
) -> list[tuple[float, int, int]]:
    largest = largest_product(q, k, window=window, by_query=by_query)
    return list(zip(largest.value.tolist(), largest.query.tolist(), largest.key.tolist(), strict=True))


def of_queries(q: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the streamed largest product of each query."""
    _, lse = attention.attend(q, k, k, **options)
    largest = attention.summarise(q, k, lse, largest=True, entropy=True, **options).largest
    assert largest is not None
    return largest


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
    by_query = of_queries(q.transpose(0, 1)[None], k.transpose(0, 1)[None], scale=0.3, window=window)[0]
    assert searched(q, k, window, by_query) == searched(q, k, window)
    for (value, query, key), (dense_value, dense_query, dense_key) in zip(
        searched(q, k, window), expected, strict=True
    ):
        assert value == pytest.approx(dense_value, rel=1e-12)
        assert (query, key) == (dense_query, dense_key)


@pytest.mark.parametrize("window", [None, 3])
def test_products_may_all_be_small(window: int | None) -> None:
    q, k = (1e-3 * torch.randn(24, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert [value for value, _, _ in searched(q, k, window)] == pytest.approx(
        [value for value, _, _ in dense(q, k, window)], rel=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 24), window=st.none() | st.integers(1, 25), seed=st.integers(0, 999))
def test_the_first_of_equal_products_counts(n: int, window: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-1, 2, (n, 2, 2), generator=generator).float() for _ in range(2))
    assert searched(q, k, window) == dense(q, k, window)


def test_states_in_half_precision_and_of_any_size_do_not_overflow() -> None:
    q = torch.full((4, 2, 8), 2000.0, dtype=torch.float16)
    assert largest_product(q, q).value.tolist() == [8 * 2000.0**2] * 2
    q = torch.full((9, 1, 2), 1e20)
    q[8] *= -3
    value, query, key = searched(q, torch.full((9, 1, 2), 1e30))[0]
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


def test_what_is_known_by_query_must_fit() -> None:
    with pytest.raises(InputError, match="expected by_query"):
        largest_product(torch.ones(5, 4, 8), torch.ones(5, 2, 8), by_query=torch.ones(4, 4))


@pytest.mark.parametrize("shape", [(2, 5, 1), (5, 4), (4, 4), (4, 6), (2, 5)])
def test_an_error_for_what_is_known_by_query_has_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=r"^expected by_query \[head, query\] = \(4, 5\), received "
    ) as caught:
        largest_product(torch.ones(5, 4, 8), torch.ones(5, 2, 8), by_query=torch.ones(shape))
    assert str(caught.value).endswith(f"received {shape}")


@pytest.mark.parametrize("n_products", [1, 3, 5, 8, 9, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_equal_products_in_several_blocks_leave_the_first(
    monkeypatch: pytest.MonkeyPatch, n_products: int, dtype: torch.dtype, window: int | None
) -> None:
    """Of candidates that are compared in blocks, also the last block counts, and the first of equal ones wins."""
    monkeypatch.setattr(_largest_product, "_N_PRODUCTS", n_products)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        q, k = (torch.randint(-1, 2, (9, 2, 2), generator=generator).to(dtype) for _ in range(2))
        assert searched(q, k, window) == dense(q, k, window)
        q[8, 1], k[7, 1] = torch.tensor([9.0, -9.0]), torch.tensor([-9.0, 9.0])
        assert searched(q, k, window) == dense(q, k, window)


def test_products_that_differ_by_rounding_are_equal_and_by_more_are_not() -> None:
    q = torch.ones(3, 1, 4, dtype=torch.float64)
    for factor, query in ((1 + 2**-52, 0), (1 + 1e-9, 1)):
        q[1] = factor
        assert searched(q, torch.ones_like(q))[0][1:] == (query, 0)
    # In float32, the first pass cannot tell them apart; in float64 the second product is larger by 1e-7.
    q = torch.ones(3, 1, 4)
    q[1, 0, 0] = 1 + 2**-22
    value, query, key = searched(q, torch.ones(3, 1, 4))[0]
    assert (value, query, key) == (4 + 2**-22, 1, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_known_by_query_is_not_used_where_it_is_not_finite(bad: float) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(9, 2, 4, generator=generator) for _ in range(2))
    by_query = torch.full((2, 9), bad)
    assert searched(q, k, None, by_query) == searched(q, k)
    assert [entry[1:] for entry in searched(q, k)] == [entry[1:] for entry in dense(q, k, None)]


def test_what_is_known_by_query_saves_the_other_queries() -> None:
    """A query that is known to have a small product is not compared."""
    q = k = torch.ones(4, 1, 2)
    by_query = torch.tensor([[0.0, 2.0, 2.0, 0.0]])
    assert searched(q, k, None, by_query) == [(2.0, 1, 0)]


def test_a_streamed_product_may_be_off_by_the_rounding_of_its_log_sum_exp() -> None:
    q = k = torch.ones(4, 1, 2)
    for excess in (1e-7, -1e-7):
        by_query = torch.tensor([[2.0, 2.0 + excess, 2.0, 2.0]])
        assert searched(q, k, None, by_query) == [(2.0, 0, 0)]


@pytest.mark.parametrize("size", [1, 2, 3, 9, 20])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 30])
def test_tiles_of_any_size_find_the_same(
    monkeypatch: pytest.MonkeyPatch, size: int, window: int | None
) -> None:
    monkeypatch.setattr(_largest_product, "_SIDE", size)
    generator = torch.Generator().manual_seed(size)
    for _ in range(5):
        q, k = (torch.randn(9, 2, 3, generator=generator) for _ in range(2))
        entries = searched(q, k, window)
        for (value, *indices), (dense_value, *dense_indices) in zip(
            entries, dense(q, k, window), strict=True
        ):
            assert value == pytest.approx(dense_value, rel=1e-12)
            assert indices == dense_indices


def test_results_are_in_float64_and_in_whole_numbers() -> None:
    largest = largest_product(torch.ones(3, 2, 4), torch.ones(3, 1, 4))
    assert (largest.value.dtype, largest.query.dtype, largest.key.dtype) == (
        torch.float64,
        torch.int64,
        torch.int64,
    )
    q = torch.ones(3, 2, 4)
    q[0, 1] = torch.nan
    largest = largest_product(q, torch.ones(3, 1, 4))
    assert (largest.query.tolist(), largest.key.tolist()) == ([0, -1], [0, -1])


def biases(*shape: int) -> torch.Tensor:
    return 5 * torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("n_queries", [23, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.4},
        {"scale": 1e-4},
        {"scale": 300.0},
        {"scale": 0.4, "window": 4},
        {"scale": 0.4, "softcap": 0.5},
        {"scale": 0.4, "sink_logits": torch.tensor([0.5, -1.0, 90.0, 0.0])},
        {"scale": 0.4, "bias": biases(1, 4, 1, 23)},
        {"scale": 0.4, "mask": torch.rand(2, 1, 23, 23, generator=torch.Generator().manual_seed(2)) < 0.1},
        {"scale": 0.4, "mask": biases(2, 1, 23, 23)},
    ],
    ids=[
        "causal",
        "small scale",
        "large scores",
        "window",
        "cap",
        "sink logits",
        "bias",
        "mask",
        "additive mask",
    ],
)
def test_that_of_each_query_equals_dense(
    dtype: torch.dtype, tolerance: float, n_queries: int, options: dict[str, Any]
) -> None:
    q, k, _ = random_qkv(23, kv_heads=2, group=2, dtype=dtype)
    q = q[:, :, -n_queries:]
    options = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    if "mask" in options:
        options["mask"] = options["mask"][:, :, -n_queries:]
    is_visible = dense_attention(q, k, **options).scores > -torch.inf
    products = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)).abs()
    expected = products.masked_fill(~is_visible, -1.0).amax(-1).masked_fill(~is_visible.any(-1), torch.nan)
    measured = of_queries(q, k, **options).double()
    assert torch.allclose(measured, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
