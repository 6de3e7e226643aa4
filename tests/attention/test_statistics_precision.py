"""Statistics that a lower precision would spoil: long indices, masses, products and ties in half precision."""

from __future__ import annotations

import math

import pytest
import torch

from phaselens import attention
from phaselens.attention import _key_blocks, _problem
from tests.attention.reference import dense, largest_difference, random_qkv

N = 320


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_statistic(dtype: torch.dtype) -> None:
    """Whole numbers above 256 and all products are beyond bfloat16."""
    q, k, _ = random_qkv(N, batch=1, group=2, dtype=dtype)
    labels = (torch.arange(N) % 3)[None]
    expected = dense(q, k, scale=0.6)
    summary = attention.summarise(
        q, k, expected.lse.float(), scale=0.6, top=True, segments=labels, largest=True
    )
    assert summary.top.dtype == summary.segments.dtype == summary.largest.dtype == torch.float32
    assert torch.equal(summary.top[..., 0].long(), expected.pattern.argmax(-1))
    assert int(summary.top[..., 0].max()) > 256
    in_segment = torch.stack([expected.pattern[..., labels[0] == label].sum(-1) for label in range(3)], -1)
    assert largest_difference(summary.segments, in_segment) < 1e-5
    assert largest_difference(summary.largest, largest_products(q, k)) < 1e-4


def largest_products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The largest |q·k| of each query, float64."""
    return (
        dense(q, k, scale=1.0)
        .scores.masked_fill(~torch.ones(q.shape[2], k.shape[2]).tril().bool(), 0.0)
        .abs()
        .amax(-1)
    )


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sink_logits": True}])
@pytest.mark.parametrize(("scale", "kv_heads"), [(1e-6, 2), (0.05, 2), (0.6, 2), (0.005, 2500)])
def test_products_do_not_lose_digits_to_a_small_scale(
    scale: float, kv_heads: int, options: dict[str, object]
) -> None:
    q, k, _ = random_qkv(100 if kv_heads == 2 else 6, batch=1, kv_heads=kv_heads, d=4)
    if "sink_logits" in options:
        options = {"sink_logits": torch.full((kv_heads,), 30.0)}
    lse = dense(q, k, scale=scale, **options).lse
    largest = attention.summarise(q, k, lse.float(), scale=scale, largest=True, **options).largest
    assert largest_difference(largest, largest_products(q, k)) < 3e-6


@pytest.mark.parametrize(("gap", "n_equal"), [(0.7e-5, 2), (1.3e-5, 1)])
def test_weights_that_differ_by_a_hundred_thousandth_are_equal(gap: float, n_equal: int) -> None:
    scores = torch.tensor([0.0, -gap, -1.0])
    k, q = scores.view(1, 1, 3, 1), torch.ones(1, 1, 1, 1)
    lse = scores.logsumexp(0).view(1, 1, 1)
    key, count = attention.top_keys(q, k, lse, scale=1.0)
    assert (int(key), int(count)) == (0, n_equal)


def test_the_only_token_has_nothing_left_beside_itself() -> None:
    q, k, v = random_qkv(1)
    remainder = attention.attend_without(q, k, v, torch.tensor([[0]]), scale=1.0)
    assert not remainder.out.any()
    assert (remainder.lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_additive_mask_hides_from_half_of_its_most_negative_number_on(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(3, batch=1, kv_heads=1, dtype=dtype)
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(1, 1, 3, 3, dtype=dtype)
    mask[0, 0, 1] = lowest / 2
    mask[0, 0, 2] = lowest / 2.5
    _, _, pattern = attention.explicit(q, k, v, scale=0.0, mask=mask)
    assert pattern[0, 0, 1].tolist() == [0.0] * 3
    assert pattern[0, 0, 2].float().tolist() == pytest.approx([1 / 3] * 3, rel=1e-2)


def test_distances_are_those_of_real_queries() -> None:
    q, k, _ = random_qkv(9, dtype=torch.float64)
    expected = dense(q, k, scale=0.6)
    lengths = torch.tensor([9, 4])
    mass = attention.distance_mass(q, k, expected.lse, lengths=lengths, scale=0.6)
    for text, length in enumerate(lengths.tolist()):
        for distance in range(9):
            diagonal = expected.pattern[text, :, :length].diagonal(-distance, 1, 2).sum(-1)
            assert largest_difference(mass[text, :, distance], diagonal) < 1e-12


STREAMS: dict[str, dict[str, object]] = {
    "summarise": {"entropy": True},
    "distance_mass": {},
    "window_mass": {"width": 2},
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_statistic_that_has_no_gradient_says_its_name(name: str) -> None:
    q, k, _ = random_qkv(5)
    lse = dense(q, k, scale=0.6).lse.float()
    with pytest.raises(RuntimeError, match=rf"^{name} streams through kernels"):
        getattr(attention, name)(q.requires_grad_(), k, lse, scale=0.6, **STREAMS[name])


@pytest.mark.parametrize("gain", [1.0, 1000.0])
def test_masses_near_a_query_leave_out_the_keys_after_it(
    monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    """With a mask that shows later keys, too, in float32 and where a head is computed again in float64."""
    monkeypatch.setattr(_key_blocks, "ROWS", 4)
    q, k, _ = random_qkv(11, kv_heads=1, group=2)
    q = q * gain
    mask = torch.ones(1, 1, 11, 11, dtype=torch.bool)
    mask[..., :2] = False
    expected = dense(q, k, scale=0.6, mask=mask)
    lse = expected.lse.float() if gain == 1 else expected.lse
    query, key = torch.arange(11)[:, None], torch.arange(11)
    near = (key < query) & (key >= query - 3)
    mass = attention.window_mass(q, k, lse, 3, exclude_first=False, scale=0.6, mask=mask)
    assert largest_difference(mass, (expected.pattern * near).sum(-1)) < 2e-6
    for longest in (None, 4):
        distances = attention.distance_mass(q, k, lse, longest=longest, scale=0.6, mask=mask)
        for distance in range(4):
            diagonal = expected.pattern.diagonal(-distance, -2, -1).sum(-1)
            assert largest_difference(distances[..., distance], diagonal) < 1e-5


@pytest.mark.parametrize("position", [0, 5, 16])
def test_statistics_are_wide_where_torch_rounds_float32_products(
    monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    monkeypatch.setattr(_problem, "products_are_exact", lambda device: False)
    q, k, _ = random_qkv(17, group=2)
    expected = dense(q, k, scale=0.6)
    sink = attention.sink_mass(q, k, expected.lse, position, scale=0.6)
    assert sink.dtype == torch.float64
    assert largest_difference(sink, expected.pattern[..., position]) < 1e-12


def test_queries_may_be_real_anywhere() -> None:
    """As those of a text that is padded on its left."""
    q, k, _ = random_qkv(9, d=5, dtype=torch.float64)
    expected = dense(q, k, scale=0.6)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :3] = real[1, 5] = False
    received = attention.summarise(q, k, expected.lse, scale=0.6, received=True, real=real).received
    counted = expected.pattern.masked_fill(~real[:, None, :, None], 0.0).sum(-2)
    assert largest_difference(received, counted) < 1e-12
    with pytest.raises(ValueError, match=r"real \[batch, query\] = \(2, 9\), received real \(2, 5\)"):
        attention.summarise(q, k, expected.lse, scale=0.6, real=real[:, :5])


@pytest.mark.parametrize(("batch", "kv_heads", "n"), [(4, 1, 6), (1, 4, 1), (1, 3, 6)])
def test_one_large_head_leaves_the_others_their_statistics(batch: int, kv_heads: int, n: int) -> None:
    q, k, _ = random_qkv(n, batch=batch, kv_heads=kv_heads)
    q[0, 0] *= 3000
    expected = dense(q, k, scale=0.6)
    summary = attention.summarise(q, k, expected.lse, scale=0.6, entropy=True, received=True)
    assert largest_difference(summary.received, expected.received) < 1e-5
    assert largest_difference(summary.entropy, expected.entropy) < 1e-5


def test_a_large_head_beside_a_far_larger_sink_logit_has_no_mass() -> None:
    q, k, _ = random_qkv(6, batch=1)
    logits = torch.tensor([1e5, 0.0])
    expected = dense(q * 3000, k, scale=0.6, sink_logits=logits)
    summary = attention.summarise(
        q * 3000, k, expected.lse, scale=0.6, sink_logits=logits, entropy=True, received=True
    )
    assert largest_difference(summary.received, expected.received) < 1e-6
    assert largest_difference(summary.entropy, expected.entropy) < 1e-6


def test_biased_scores_are_wide_where_torch_rounds_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_problem, "products_are_exact", lambda device: False)
    q, k, v = random_qkv(9)
    bias = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(2))
    for options in ({"bias": bias}, {"bias": bias, "mask": torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()}):
        out, lse = attention.attend(q, k, v, scale=0.6, **options)
        expected = dense(q, k, v, scale=0.6, **options)
        assert largest_difference(out, expected.out) < 1e-6
        assert largest_difference(lse, expected.lse) < 1e-6


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"window": 3}])
def test_a_mask_that_hides_everything_leaves_nothing(options: dict[str, object]) -> None:
    q, k, v = random_qkv(6)
    out, lse = attention.attend(q, k, v, scale=0.6, mask=torch.zeros(1, 1, 6, 6, dtype=torch.bool), **options)
    assert not out.any()
    assert (lse == -math.inf).all()


def test_a_sink_logit_far_above_all_scores_takes_everything() -> None:
    q, k, _ = random_qkv(6)
    logits = torch.tensor([900.0, 300.0])
    bias = torch.zeros(1, 1, 1, 6)
    for options in ({}, {"bias": bias}, {"softcap": 3.0}):
        expected = dense(q, k, scale=0.6, sink_logits=logits, **options)
        summary = attention.summarise(
            q, k, expected.lse, scale=0.6, sink_logits=logits, entropy=True, received=True, **options
        )
        assert largest_difference(summary.entropy, expected.entropy) < 1e-6
        assert largest_difference(summary.received, expected.received) < 1e-6
    out, lse = attention.attend(q, k, k, scale=0.6, sink_logits=logits, softcap=3.0)
    assert out.isfinite().all()
    assert largest_difference(lse, dense(q, k, scale=0.6, sink_logits=logits, softcap=3.0).lse) < 1e-4
