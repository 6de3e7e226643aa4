"""Scores of any size: float32 where it is enough, float64 where it is not, and the difference is found."""

import pytest
import torch
from tools.bench import precision

from phaselens import attention
from phaselens.attention._guard import beyond_single
from phaselens.attention._problem import Problem
from tests.attention.reference import dense, worst


def shaped(shape, bound, *, n=160, heads=2, d=64, seed=0):
    return precision.shaped(shape, bound, n=n, heads=heads, d=d, seed=seed)


def errors(q, k, **options):
    """(sink alone, sink, entropy, received relative above 1, lse relative above 1) against float64."""
    want = dense(q, k, **options)
    _, lse = attention.attend(q, k, k, **options)
    found = attention.summarise(q, k, lse, position=0, entropy=True, received=True, **options)
    refined = attention.refine_lse(q, k, lse, **options)
    return {
        "sink alone": worst(attention.sink_mass(q, k, lse, **options), want.pattern[..., 0]),
        "sink": worst(found.sink, want.pattern[..., 0]),
        "entropy": worst(found.entropy, want.entropy),
        "received": worst(
            found.received / want.received.clamp(min=1), want.received / want.received.clamp(min=1)
        ),
        "lse": worst(refined / want.lse.abs().clamp(min=1), want.lse / want.lse.abs().clamp(min=1)),
        "near the diagonal": worst(
            attention.distance_mass(q, k, lse, longest=5, **options) / q.shape[2],
            torch.stack([want.pattern.diagonal(-i, -2, -1).sum(-1) for i in range(5)], -1) / q.shape[2],
        ),
        "window": worst(
            attention.window_mass(q, k, lse, 5, **options),
            torch.stack([want.pattern[..., i, max(1, i - 5) : i].sum(-1) for i in range(q.shape[2])], -1),
        ),
    }


@pytest.mark.parametrize("kind", ["any", "aligned", "rivals", "sink"])
@pytest.mark.parametrize("bound", [30.0, 100.0, 1e3, 1e6])
def test_exact_at_every_size_of_score(kind, bound):
    q, k = shaped(kind, bound)
    found = errors(q, k, scale=1.0)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("options", [{"window": 9}, {"softcap": 30.0}, {"sinks": torch.tensor([3.0, 900.0])}])
def test_exact_at_large_scores_with_windows_caps_and_learned_sinks(options):
    q, k = shaped("aligned", 1000.0, n=40)
    found = errors(q, k, scale=1.0, **options)
    assert max(found.values()) < 1e-5, found


def test_exact_at_large_scores_with_masks_and_shared_keys():
    q, k = shaped("aligned", 1000.0, n=40, heads=4)
    k = k[:, ::2]
    mask = torch.ones(1, 4, 40, 40, dtype=torch.bool).tril()
    mask[:, 1, :, :4] = False
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    bias[:, 2] *= 0.5
    for each in (mask, bias):
        want = dense(q, k, scale=1.0, mask=each)
        _, lse = attention.attend(q, k, k, scale=1.0, mask=each)
        found = attention.summarise(q, k, lse, position=6, entropy=True, received=True, scale=1.0, mask=each)
        assert worst(found.sink, want.pattern[..., 6]) < 1e-6
        assert worst(found.entropy, want.entropy) < 1e-6
        assert worst(found.received, want.received) < 1e-5


def drope_layer_1(n, seed=0):
    """Queries and keys with the per-head norms of a DroPE model's layer 1, in float16, d_head 128."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 2, n, 128, generator=generator) for _ in range(2))
    k[:, :, 0] = 0.2 * k[:, :, 0] + q.mean(2)  # a key that queries like
    q, k = 1164 * q / q.norm(dim=-1, keepdim=True), 975 * k / k.norm(dim=-1, keepdim=True)
    return q.half(), k.half()


def test_float16_scores_near_a_million_where_eager_gives_nan():
    q, k = drope_layer_1(100)
    scale = 128**-0.5
    eager = ((q @ k.transpose(-1, -2)) * scale).masked_fill(~torch.ones(100, 100).tril().bool(), -torch.inf)
    assert eager.isinf().any()
    assert eager.softmax(-1, dtype=torch.float32).isnan().any()
    found = errors(q, k, scale=scale)
    assert max(found.values()) < 1e-5, found
    _, _, pattern = attention.explicit(q, k, k, scale=scale)
    assert pattern.isfinite().all()


def test_ties_at_a_million_are_split_as_they_are():
    """Two equal keys and one that is worse by 1 in 1e6: what a float32 score cannot tell apart."""
    q = torch.full((1, 1, 3, 64), 125.0)
    k = torch.full((1, 1, 3, 64), 125.0)
    k[0, 0, 2, 0] -= 2**-7  # 125·2⁻⁷ ≈ 0.977 of 1e6
    _, lse = attention.attend(q, k, k, scale=1.0)
    last = [attention.sink_mass(q, k, lse, position, scale=1.0)[0, 0, 2].item() for position in range(3)]
    rest = float(torch.tensor(-125 * 2**-7, dtype=torch.float64).exp())
    assert last == pytest.approx([1 / (2 + rest), 1 / (2 + rest), rest / (2 + rest)], abs=1e-6)


def test_ordinary_heads_are_left_to_float32():
    """Norms as in Llama-2-7B (scale·‖q‖·‖k‖ of 20 to 60), 4,096 tokens' worth of log-sum-exp."""
    for seed, d in ((0, 64), (1, 128)):
        q, k = shaped("any", 60.0, n=300, d=d, seed=seed)
        _, lse = attention.attend(q, k, k, scale=1.0)
        assert not beyond_single(Problem(q, k, 1.0), lse + 4.0).any()


def test_only_the_heads_that_need_it_are_done_again():
    q, k = shaped("any", 20.0, heads=4, n=30)
    q[:, 2] *= 1000
    _, lse = attention.attend(q, k, k, scale=1.0)
    assert beyond_single(Problem(q, k, 1.0), lse).tolist() == [[False, False, True, False]]
    refined = attention.refine_lse(q, k, lse, scale=1.0)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(refined[:, others], lse[:, others])
    assert max(errors(q, k, scale=1.0).values()) < 1e-5


def test_a_torch_that_rounds_products_is_answered_in_float64():
    q, k = shaped("any", 20.0, n=16)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert Problem(q, k, 1.0).accumulate == torch.float64
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert Problem(q, k, 1.0).accumulate == torch.float32
