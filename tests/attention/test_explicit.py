"""The dense path against float64, its gradients and edited scores."""

import pytest
import torch

from phaselens import attention
from tests.attention.reference import dense, largest_difference, random_qkv


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"softcap": 1.0}, {"sink_logits": torch.tensor([0.3, 2.0, 1, 1])}]
)
def test_the_dense_path_equals_float64(dtype, options):
    q, k, v = random_qkv(9, group=2, d_v=5, dtype=dtype)
    expected = dense(q, k, v, scale=0.8, **options)
    out, scores, pattern = attention.explicit(q, k, v, scale=0.8, **options)
    exact = dtype == torch.float64
    assert (out.dtype, scores.dtype, pattern.dtype) == (dtype, dtype if exact else torch.float32, dtype)
    limit = 1e-12 if exact else 8 * torch.finfo(dtype).eps
    assert largest_difference(out, expected.out) < limit
    assert largest_difference(pattern, expected.pattern) < limit
    assert (scores == -torch.inf).equal(expected.pattern == 0)


def test_the_dense_path_has_gradients():
    q, k, v = (x.requires_grad_() for x in random_qkv(5, batch=1, group=2, d=3, dtype=torch.float64))
    sink_logits = torch.tensor([0.3, 1.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., 2, :] = False

    def run(q, k, v, sink_logits):
        out, _, pattern = attention.explicit(
            q, k, v, scale=0.8, softcap=3.0, sink_logits=sink_logits, mask=mask
        )
        return out, torch.special.entr(pattern + 0.01).sum(-1)

    assert torch.autograd.gradcheck(run, (q, k, v, sink_logits))


def test_the_dense_path_continues_from_edited_scores():
    q, k, _ = random_qkv(6)
    scores = attention.explicit_scores(q, k, scale=1.0)
    hidden = scores.index_fill(-1, torch.tensor([0]), -torch.inf)
    pattern = attention.explicit_pattern(hidden)
    assert (pattern[..., 0] == 0).all()
    assert (pattern[..., 0, :] == 0).all()  # row 0 sees no other key
    torch.testing.assert_close(pattern[..., 1:, :].sum(-1), torch.ones(2, 2, 5))


@pytest.mark.parametrize("n_queries", [9, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "softcap": 1.0},
        {"bias": torch.arange(9.0).view(1, 1, 1, 9) * 3},
        {
            "bias": torch.arange(9.0).view(1, 1, 1, 9) * 1e6,
            "sink_logits": torch.tensor([0.5, 3e6, -2.0, 7e6]),
        },
        {"hidden_keys": torch.tensor([[2], [-1]])},
    ],
    ids=["window and cap", "bias", "large bias", "hidden keys"],
)
def test_the_dense_path_equals_float64_for_every_number_of_key_heads(options, kv_heads, n_queries):
    q, k, v = random_qkv(n_queries, 9, kv_heads=kv_heads, group=4 // kv_heads, d_v=5)
    hidden = options.get("hidden_keys")
    if hidden is None:
        expected = dense(q, k, v, scale=0.8, **options)
    else:
        mask = torch.ones(2, 1, n_queries, 9, dtype=torch.bool).tril(9 - n_queries)
        mask[0, ..., 2] = False
        expected = dense(q, k, v, scale=0.8, mask=mask)
    out, scores, pattern = attention.explicit(q, k, v, scale=0.8, **options)
    assert (out.dtype, pattern.dtype) == (torch.float32, torch.float32)
    assert largest_difference(out, expected.out) < 1e-5
    assert largest_difference(pattern, expected.pattern) < 1e-5
    assert largest_difference(scores, expected.scores) < 1e-5 * max(
        1.0, float(scores[scores > -torch.inf].max())
    )
    sink_logits = options.get("sink_logits")
    plain = {name: value for name, value in options.items() if name not in ("sink_logits", "hidden_keys")}
    if hidden is None:
        assert torch.equal(attention.explicit_scores(q, k, scale=0.8, **plain), scores)
    assert torch.equal(attention.explicit_pattern(scores, sink_logits=sink_logits).float(), pattern)


@pytest.mark.parametrize(
    ("size", "dtype"), [(32.0, torch.float32), (-32.5, torch.float64), (40.0, torch.float64)]
)
def test_a_large_bias_makes_scores_wide(size, dtype):
    q, k, _ = random_qkv(4)
    bias = torch.zeros(1, 1, 1, 4)
    bias[..., 2] = size
    assert attention.explicit_scores(q, k, scale=1.0, bias=bias).dtype == dtype


def test_a_row_that_sees_nothing_has_no_weights_and_no_gradient_that_is_nan():
    scores = torch.zeros(1, 2, 3, 3).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    scores[0, 1, 1] = -torch.inf
    scores.requires_grad_()
    for sink_logits in (None, torch.tensor([0.0, 1.0])):
        pattern = attention.explicit_pattern(scores, sink_logits=sink_logits)
        assert pattern[0, 1, 1].tolist() == [0.0, 0.0, 0.0]
        total = 0.5 if sink_logits is not None else 1.0
        assert pattern[0, 0, 0].tolist() == [total, 0.0, 0.0]
        (gradient,) = torch.autograd.grad(pattern.square().sum(), scores)
        assert not gradient.isnan().any()


def test_one_token_attends_to_itself():
    q, k, v = random_qkv(1)
    out, scores, pattern = attention.explicit(q, k, v, scale=0.5)
    assert torch.equal(pattern, torch.ones_like(pattern))
    assert torch.equal(out, v)
    assert largest_difference(scores[..., 0], (q.double() * k.double()).sum(-1) * 0.5) < 1e-6
