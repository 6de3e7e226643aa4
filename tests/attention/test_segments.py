"""Attention by segment of keys and the largest weight of each query, against dense float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phaselens import attention
from phaselens.attention import TIE, _key_blocks
from phaselens.errors import InputError
from tests.attention.reference import dense, random_qkv


def labels_of(batch: int, n_keys: int, seed: int = 0) -> torch.Tensor:
    """Random segments 0 … 3 of the keys of each text; some keys are in none."""
    return torch.randint(-1, 4, (batch, n_keys), generator=torch.Generator().manual_seed(seed))


def reference_top(pattern: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first key whose weight is the largest, ties included, and the number of such keys; NaN for an empty row."""
    largest = pattern.amax(-1, keepdim=True)
    is_top = pattern >= largest * (1 - TIE)
    empty = ~(largest[..., 0] > 0)
    first = is_top.double().argmax(-1).double().masked_fill(empty, torch.nan)
    return first, is_top.sum(-1).double().masked_fill(empty, torch.nan)


def assert_equals_dense(q: Any, k: Any, tolerance: float, **options: Any) -> None:
    expected = dense(q, k, **options)
    _, lse = attention.attend(q, k, k, **options)
    labels = labels_of(len(q), k.shape[2])
    for segments in (labels, labels[:1]):
        mass = attention.segment_mass(q, k, lse, segments, n_segments=5, **options)
        for segment in range(5):
            columns = (segments == segment)[:, None, None, :]
            assert torch.allclose(
                mass[..., segment].double(), (expected.pattern * columns).sum(-1), rtol=0, atol=tolerance
            )
    key, count = attention.top_keys(q, k, lse, **options)
    first, n_top = reference_top(expected.pattern)
    assert torch.equal(key.isnan(), first.isnan())
    weight = expected.pattern.gather(-1, torch.nan_to_num(key).long()[..., None])[..., 0]
    assert torch.allclose(weight, expected.pattern.amax(-1), rtol=0, atol=2 * tolerance)
    if q.dtype == torch.float64:
        assert torch.allclose(key, first, rtol=0, atol=0, equal_nan=True)
        assert torch.allclose(count, n_top, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.4},
        {"scale": 3.0, "window": 4},
        {"scale": 0.7, "softcap": 2.0, "sink_logits": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    ],
    ids=["causal", "window", "cap and sink logits"],
)
def test_segments_and_top_keys_equal_dense(
    dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    if "sink_logits" in options:
        options = {**options, "sink_logits": options["sink_logits"].to(dtype)}
    q, k, _ = random_qkv(23, kv_heads=2, group=2, dtype=dtype)
    assert_equals_dense(q, k, tolerance, **options)
    assert_equals_dense(q[:, :, -5:], k, tolerance, **options)


def test_heads_whose_scores_are_too_large_for_float32_equal_dense() -> None:
    q, k, _ = random_qkv(40, batch=3, kv_heads=3, dtype=torch.float32)
    q[1, 1] *= 3000.0
    k[1, 1] *= 100.0
    assert_equals_dense(q, k, 1e-5, scale=0.5)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_shape_and_block_size_equal_dense(data: Any) -> None:
    n_keys = data.draw(st.integers(1, 40))
    n_queries = data.draw(st.integers(1, n_keys))
    batch, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    q, k, _ = random_qkv(n_queries, n_keys, batch=batch, kv_heads=kv_heads, group=group, dtype=torch.float64)
    window = data.draw(st.none() | st.integers(1, n_keys))
    with (
        patch.object(_key_blocks, "ROWS", data.draw(st.integers(1, 9))),
        patch.object(_key_blocks, "CPU_ELEMENTS", data.draw(st.integers(1, 500))),
    ):
        assert_equals_dense(q, k, 1e-12, scale=0.6, window=window)


def test_a_mask_that_hides_everything_leaves_no_top_key() -> None:
    q, k, _ = random_qkv(6, dtype=torch.float64)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., 2, :] = False
    assert_equals_dense(q, k, 1e-12, scale=0.6, mask=mask)
    _, lse = attention.attend(q, k, k, scale=0.6, mask=mask)
    key, count = attention.top_keys(q, k, lse, scale=0.6, mask=mask)
    assert key[..., 2].isnan().all()
    assert count[..., 2].isnan().all()
    assert not key[..., [0, 1, 3, 4, 5]].isnan().any()


def test_equal_keys_are_counted_and_the_first_is_named() -> None:
    k = torch.randn(1, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    k[0, 0, [2, 5, 7]] = 3.0
    q = torch.ones(1, 1, 9, 8)
    _, lse = attention.attend(q, k, k, scale=1.0)
    key, count = attention.top_keys(q, k, lse, scale=1.0)
    assert key[0, 0, 2:].tolist() == [2.0] * 7
    assert count[0, 0, 2:].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    almost = k.clone()
    almost[0, 0, 5] *= 1 + 1e-8  # less than rounding
    assert torch.equal(attention.top_keys(q, almost, lse, scale=1.0)[0], key)


def test_nan_makes_nan_where_it_is_used() -> None:
    q, k, _ = random_qkv(7, dtype=torch.float32)
    k[0, 0, 4] = torch.nan
    _, lse = attention.attend(q, k, k, scale=0.6)
    key, _ = attention.top_keys(q, k, lse, scale=0.6)
    mass = attention.segment_mass(q, k, lse, torch.zeros(1, 7, dtype=torch.long), scale=0.6)
    for values in (key, mass[..., 0]):
        assert values[0, 0].isnan().tolist() == [False] * 4 + [True] * 3
        assert not values[1].isnan().any()


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (torch.zeros(1, 4), r"segments \[batch \| 1, n\] as a tensor of whole numbers, received torch.float32"),
        (torch.zeros(3, 4, dtype=torch.long), "expected segments .* for 2 texts"),
        (torch.zeros(1, 3, dtype=torch.long), "expected segments .* with 4 keys"),
    ],
)  # fmt: skip
def test_segments_that_do_not_fit_the_keys_are_refused(segments: torch.Tensor, message: str) -> None:
    q, k, _ = random_qkv(4)
    _, lse = attention.attend(q, k, k, scale=1.0)
    with pytest.raises(ValueError, match=message) as caught:
        attention.segment_mass(q, k, lse, segments, scale=1.0)
    assert isinstance(caught.value, InputError) or "keys" in message
