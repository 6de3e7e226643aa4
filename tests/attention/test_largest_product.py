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
