"""Biases of the scores, such as ALiBi's: exact for any size, with one row for all queries or one for each."""

from __future__ import annotations

import pytest
import torch

from phaselens import attention
from tests.attention.reference import dense, random_qkv

N = 300


def alibi(n_heads: int, n_keys: int = N, steepest: float = 0.7) -> torch.Tensor:
    """Slopes times positions, [1, head, 1, key], as Bloom has them."""
    slopes = steepest * 0.5 ** torch.arange(n_heads)
    return (slopes[:, None] * torch.arange(n_keys))[None, :, None]


def by_distance(n_heads: int) -> torch.Tensor:
    """A bias for each distance, [1, head, query, key], as of relative positions."""
    position = torch.arange(N)
    table = torch.randn(n_heads, N, generator=torch.Generator().manual_seed(5)) * 3
    return table[None, :, (position[:, None] - position).clamp(min=0)]


def per_text(n_heads: int) -> torch.Tensor:
    """Slopes times positions that begin anew within the second text, [batch, head, 1, key]."""
    shifted = torch.stack([torch.arange(N), (torch.arange(N) - 20).clamp(min=0)])
    slopes = 0.5 ** torch.arange(n_heads)
    return slopes[None, :, None, None] * shifted[:, None, None]


def check(q, k, v, **options):
    """Compare attend and all statistics with the dense reference in float64."""
    expected = dense(q, k, v, **options)
    out, lse = attention.attend(q, k, v, **options)
    torch.testing.assert_close(lse.double(), expected.lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), expected.out, atol=2e-5, rtol=1e-5)
    n = q.shape[2]
    summary = attention.summarise(
        q, k, lse, position=0, entropy=True, received=True, distances=n, refine=True, **options
    )
    by_distance = torch.stack(
        [expected.pattern.diagonal(-distance, dim1=-2, dim2=-1).sum(-1) for distance in range(n)], -1
    )
    for name, value in (
        ("sink", expected.pattern[..., 0]),
        ("entropy", expected.entropy),
        ("received", expected.received),
        ("distance", by_distance),
    ):
        # Masses of hundreds of queries have the rounding of their size.
        torch.testing.assert_close(getattr(summary, name).double(), value, atol=1e-5, rtol=2e-7, msg=name)
    torch.testing.assert_close(summary.lse.double(), expected.lse, atol=1e-5, rtol=1e-6)
    window = attention.window_mass(q, k, lse, 5, include_self=True, **options)
    in_window = expected.pattern.tril().triu(-5)
    in_window[..., 0] = 0.0
    torch.testing.assert_close(window.double(), in_window.sum(-1), atol=1e-5, rtol=0)
    _, scores, pattern = attention.explicit(q, k, v, **options)
    torch.testing.assert_close(pattern.double(), expected.pattern, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.logsumexp(-1).double(), expected.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make_bias", [alibi, by_distance, per_text])
@pytest.mark.parametrize("window", [None, 7])
def test_statistics_with_a_bias_equal_dense(make_bias, window):
    q, k, v = random_qkv(N, kv_heads=2, group=2)
    check(q, k, v, scale=0.35, bias=make_bias(4), window=window)


def test_a_bias_of_thousands_loses_no_digits():
    """At position 300 of a slope of 20, float32 rounds a score by 2e-4."""
    q, k, v = random_qkv(N, kv_heads=2)
    check(q, k, v, scale=0.35, bias=alibi(2, steepest=20.0))
    check(q, k, v, scale=0.35, bias=alibi(2, steepest=0.01) + 6000.0)


def test_a_bias_adds_to_a_mask_and_a_softcap():
    q, k, v = random_qkv(40, kv_heads=2)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[1, :, :, :3] = False
    mask[1, :, 3:, 2] = True
    mask[1, :, :3, 0] = True
    check(q, k, v, scale=0.35, bias=alibi(2, 40), mask=mask, softcap=2.0)


def test_sink_logits_are_not_biased():
    q, k, v = random_qkv(40, kv_heads=2)
    options = {"scale": 0.35, "bias": alibi(2, 40), "sink_logits": torch.tensor([20.0, 3.0])}
    expected = dense(q, k, v, **options)
    _, lse = attention.attend(q, k, v, **options)
    torch.testing.assert_close(lse.double(), expected.lse, atol=1e-5, rtol=1e-5)
    summary = attention.summarise(q, k, lse, position=0, received=True, **options)
    torch.testing.assert_close(summary.sink.double(), expected.pattern[..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(summary.received.double(), expected.received, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_queries", [1, 5])
def test_cached_decoding_aligns_the_bias_with_the_keys(n_queries):
    q, k, v = random_qkv(n_queries, 60)
    expected = dense(q, k, v, scale=0.35, bias=alibi(2, 60))
    out, lse = attention.attend(q, k, v, scale=0.35, bias=alibi(2, 60))
    torch.testing.assert_close(lse.double(), expected.lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), expected.out, atol=2e-5, rtol=1e-5)


def test_half_precision_does_not_round_the_bias():
    q, k, v = random_qkv(N, dtype=torch.bfloat16)
    expected = dense(q, k, v, scale=0.35, bias=alibi(2))
    _, lse = attention.attend(q, k, v, scale=0.35, bias=alibi(2))
    torch.testing.assert_close(lse.double(), expected.lse, atol=1e-5, rtol=1e-5)
    entropy = attention.row_entropy(q, k, lse, scale=0.35, bias=alibi(2))
    torch.testing.assert_close(entropy.double(), expected.entropy, atol=1e-5, rtol=0)


def test_the_explicit_path_has_a_gradient_for_the_bias():
    q, k, v = random_qkv(8)
    bias = alibi(2, 8).double().requires_grad_()
    attention.explicit(q.double(), k.double(), v.double(), scale=0.35, bias=bias)[0].sum().backward()
    assert bool(bias.grad.any())


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (
            torch.zeros(1, 2, 1, 7),
            r"expected a bias \[batch \| 1, head \| 1, query \| 1, key\] for \(2, 2, 8, 8\)",
        ),
        (torch.zeros(1, 3, 1, 8), "expected a bias"),
        (torch.full((1, 1, 1, 8), -torch.inf), "finite numbers, .* hide keys by a mask"),
        (torch.zeros(1, 1, 1, 8, dtype=torch.long), "finite numbers, received torch.int64"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(bias, message):
    q, k, v = random_qkv(8)
    with pytest.raises(ValueError, match=message):
        attention.attend(q, k, v, scale=1.0, bias=bias)
