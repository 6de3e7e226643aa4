"""Scores of any size: float32 where it is accurate enough, float64 elsewhere."""

import pytest
import torch
from tools.bench import precision

from phaselens import attention
from phaselens.attention._precision import needs_float64
from phaselens.attention._problem import Problem
from tests.attention.reference import dense, largest_difference


def queries_and_keys(shape, bound, *, n=160, heads=2, d=64, seed=0):
    return precision.draw_problem(shape, bound, n=n, heads=heads, d=d, seed=seed)


def largest_errors(q, k, **options):
    """Largest differences from float64 by statistic; received and lse are relative above 1."""
    expected = dense(q, k, **options)
    _, lse = attention.attend(q, k, k, **options)
    statistics = attention.summarise(q, k, lse, position=0, entropy=True, received=True, **options)
    refined = attention.refine_lse(q, k, lse, **options)
    return {
        "sink alone": largest_difference(attention.sink_mass(q, k, lse, **options), expected.pattern[..., 0]),
        "sink": largest_difference(statistics.sink, expected.pattern[..., 0]),
        "entropy": largest_difference(statistics.entropy, expected.entropy),
        "received": largest_difference(
            statistics.received / expected.received.clamp(min=1),
            expected.received / expected.received.clamp(min=1),
        ),
        "lse": largest_difference(
            refined / expected.lse.abs().clamp(min=1), expected.lse / expected.lse.abs().clamp(min=1)
        ),
        "near the diagonal": largest_difference(
            attention.distance_mass(q, k, lse, longest=5, **options) / q.shape[2],
            torch.stack([expected.pattern.diagonal(-i, -2, -1).sum(-1) for i in range(5)], -1) / q.shape[2],
        ),
        "window": largest_difference(
            attention.window_mass(q, k, lse, 5, **options),
            torch.stack([expected.pattern[..., i, max(1, i - 5) : i].sum(-1) for i in range(q.shape[2])], -1),
        ),
    }


@pytest.mark.parametrize("shape", ["any", "aligned", "rivals", "sink"])
@pytest.mark.parametrize("bound", [30.0, 100.0, 1e3, 1e6])
def test_scores_of_every_size_equal_float64(shape, bound):
    q, k = queries_and_keys(shape, bound)
    differences = largest_errors(q, k, scale=1.0)
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize(
    "options", [{"window": 9}, {"softcap": 30.0}, {"sink_logits": torch.tensor([3.0, 900.0])}]
)
def test_large_scores_with_windows_caps_and_sink_logits_equal_float64(options):
    q, k = queries_and_keys("aligned", 1000.0, n=40)
    differences = largest_errors(q, k, scale=1.0, **options)
    assert max(differences.values()) < 1e-5, differences


def test_large_scores_with_masks_and_shared_keys_equal_float64():
    q, k = queries_and_keys("aligned", 1000.0, n=40, heads=4)
    k = k[:, ::2]
    mask = torch.ones(1, 4, 40, 40, dtype=torch.bool).tril()
    mask[:, 1, :, :4] = False
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    bias[:, 2] *= 0.5
    for attention_mask in (mask, bias):
        expected = dense(q, k, scale=1.0, mask=attention_mask)
        _, lse = attention.attend(q, k, k, scale=1.0, mask=attention_mask)
        statistics = attention.summarise(
            q, k, lse, position=6, entropy=True, received=True, scale=1.0, mask=attention_mask
        )
        assert largest_difference(statistics.sink, expected.pattern[..., 6]) < 1e-6
        assert largest_difference(statistics.entropy, expected.entropy) < 1e-6
        assert largest_difference(statistics.received, expected.received) < 1e-5


def drope_layer_1(n, seed=0):
    """Queries and keys with the per-head norms of a DroPE model's layer 1, in float16, d_head 128."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 2, n, 128, generator=generator) for _ in range(2))
    k[:, :, 0] = 0.2 * k[:, :, 0] + q.mean(2)  # a key that the queries attend to
    q, k = 1164 * q / q.norm(dim=-1, keepdim=True), 975 * k / k.norm(dim=-1, keepdim=True)
    return q.half(), k.half()


def test_float16_scores_near_a_million_are_exact_where_eager_gives_nan():
    q, k = drope_layer_1(100)
    scale = 128**-0.5
    eager = ((q @ k.transpose(-1, -2)) * scale).masked_fill(~torch.ones(100, 100).tril().bool(), -torch.inf)
    assert eager.isinf().any()
    assert eager.softmax(-1, dtype=torch.float32).isnan().any()
    differences = largest_errors(q, k, scale=scale)
    assert max(differences.values()) < 1e-5, differences
    _, _, pattern = attention.explicit(q, k, k, scale=scale)
    assert pattern.isfinite().all()


def test_close_scores_near_a_million_are_distinguished():
    """Two equal keys and one with a score lower by 1 in 1e6, which float32 scores do not resolve."""
    q = torch.full((1, 1, 3, 64), 125.0)
    k = torch.full((1, 1, 3, 64), 125.0)
    k[0, 0, 2, 0] -= 2**-7  # 125·2⁻⁷ ≈ 0.977 of 1e6
    _, lse = attention.attend(q, k, k, scale=1.0)
    weights = [attention.sink_mass(q, k, lse, position, scale=1.0)[0, 0, 2].item() for position in range(3)]
    odds = float(torch.tensor(-125 * 2**-7, dtype=torch.float64).exp())
    assert weights == pytest.approx([1 / (2 + odds), 1 / (2 + odds), odds / (2 + odds)], abs=1e-6)


def test_ordinary_heads_use_float32():
    """Norms as in Llama-2-7B (scale·‖q‖·‖k‖ of 20 to 60) with the log-sum-exp of 4,096 tokens."""
    for seed, d in ((0, 64), (1, 128)):
        q, k = queries_and_keys("any", 60.0, n=300, d=d, seed=seed)
        _, lse = attention.attend(q, k, k, scale=1.0)
        assert not needs_float64(Problem(q, k, 1.0), lse + 4.0).any()


def test_only_heads_that_need_float64_are_recomputed():
    q, k = queries_and_keys("any", 20.0, heads=4, n=30)
    q[:, 2] *= 1000
    _, lse = attention.attend(q, k, k, scale=1.0)
    assert needs_float64(Problem(q, k, 1.0), lse).tolist() == [[False, False, True, False]]
    refined = attention.refine_lse(q, k, lse, scale=1.0)
    float32_heads = torch.tensor([0, 1, 3])
    assert torch.equal(refined[:, float32_heads], lse[:, float32_heads])
    assert max(largest_errors(q, k, scale=1.0).values()) < 1e-5


def test_float64_is_used_where_torch_rounds_products():
    q, k = queries_and_keys("any", 20.0, n=16)
    previous_precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert Problem(q, k, 1.0).compute_dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision(previous_precision)
    assert Problem(q, k, 1.0).compute_dtype == torch.float32


LIMIT = 1e-5 * 2**24  # in units of float32's rounding


def marks_float64(bound, lse, *, d=1, scale=1.0, **options):
    """Whether a head is computed in float64 whose largest score is bounded by `bound`, with this log-sum-exp."""
    q = torch.zeros(1, 2, 3, d)
    q[0, 0, 1, -1] = bound / 4 / abs(scale)
    k = torch.zeros(1, 1, 3, d)
    k[0, 0, 0, 0] = 4.0
    row_lse = torch.zeros(1, 2, 3)
    row_lse[0, 0, 2], row_lse[0, 0, 0] = lse, -torch.inf
    marks = needs_float64(Problem(q, k, scale, **options), row_lse)
    assert marks.tolist()[0][1] is False  # the other head has scores of 0
    return marks.tolist()[0][0]


@pytest.mark.parametrize("d", [1, 4, 64])
@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize(("factor", "marked"), [(0.999, False), (1.001, True)])
def test_float64_begins_at_the_documented_bound(d, scale, factor, marked):
    """0.8 of the bound of a score, plus 0.25 √d of the scores that matter, in units of rounding."""
    share = 0.25 * d**0.5
    assert marks_float64(factor * LIMIT / 0.8, 0.0, d=d, scale=scale) is marked
    largest = factor * LIMIT / (0.8 + share)
    for lse in (1e4, -1e4, largest):
        assert marks_float64(largest, lse, d=d, scale=scale) is marked
    half = factor * LIMIT / (0.8 + share / 2)
    assert marks_float64(half, half / 2, d=d, scale=scale) is marked
    assert marks_float64(half, -half / 2, d=d, scale=scale) is marked
    assert marks_float64(largest, 0.0, d=d, scale=scale, softcap=5.0) is marked
    doubled = factor * LIMIT / (0.8 + 2 * share)
    bias = torch.ones(1, 1, 1, 3)
    assert marks_float64(largest, 0.0, d=d, scale=scale, bias=bias) is marked
    assert marks_float64(doubled, 2 * doubled, d=d, scale=scale, bias=bias) is marked


def test_a_head_that_is_not_finite_is_computed_in_float64():
    for value in (torch.nan, torch.inf):
        assert marks_float64(value, 0.0)
        assert marks_float64(1.0, torch.nan)
