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
