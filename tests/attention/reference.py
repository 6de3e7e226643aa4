"""Dense float64 reference: every score and every weight, computed step by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseAttention:
    """out [batch, head, query, d_v], lse [batch, head, query], pattern and scores [batch, head, query, key]."""

    out: Tensor
    lse: Tensor
    pattern: Tensor
    scores: Tensor

    @property
    def entropy(self) -> Tensor:
        return torch.special.entr(self.pattern).sum(-1)

    @property
    def received(self) -> Tensor:
        return self.pattern.sum(-2)


def dense(
    q, k, v=None, *, scale, mask=None, window=None, softcap=None, sink_logits=None, bias=None
) -> DenseAttention:
    """Attention of q, k, v in float64, implemented independently; options as in phaselens.attention."""
    q, k = q.double(), k.double()
    v = k if v is None else v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    n_queries, n_keys = scores.shape[-2:]
    query = torch.arange(n_keys - n_queries, n_keys)[:, None]
    key = torch.arange(n_keys)[None, :]
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool)
    if mask is None or window is not None:
        visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    visible = visible[None, None].expand(scores.shape)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        hides = mask == torch.finfo(mask.dtype).min
        visible = visible & ~hides & (mask != -torch.inf)
        scores = scores + mask.double().masked_fill(~visible, 0.0)
    scores = scores.masked_fill(~visible, -torch.inf)
    column = scores
    if sink_logits is not None:
        column = torch.cat(
            [scores, sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1
        )
    lse = column.logsumexp(-1)
    pattern = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return DenseAttention(pattern @ v, lse, pattern, scores)


def random_qkv(
    n_queries, n_keys=None, *, batch=2, kv_heads=2, group=1, d=8, d_v=None, dtype=torch.float32, seed=0
):
    """Gaussian q, k, v in the shapes that phaselens.attention expects."""
    generator = torch.Generator().manual_seed(seed)
    n_keys = n_queries if n_keys is None else n_keys

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(batch, kv_heads * group, n_queries, d),
        draw(batch, kv_heads, n_keys, d),
        draw(batch, kv_heads, n_keys, d if d_v is None else d_v),
    )


def largest_difference(result: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; a NaN or an infinity on one side only counts as infinite."""
    result, expected = result.double(), expected.double()
    assert result.shape == expected.shape, (result.shape, expected.shape)
    is_equal = (result == expected) | (result.isnan() & expected.isnan())
    difference = (result - expected).abs().masked_fill(is_equal, 0.0)
    return float(difference.nan_to_num(nan=float("inf")).amax())
