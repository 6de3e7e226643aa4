"""The dense path: all scores and weights, differentiable, for hooks on the matrix itself."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from phaselens.attention._attend import check_values
from phaselens.attention._key_blocks import mix
from phaselens.attention._problem import Problem, SoftmaxOptions
from phaselens.errors import InputError, require_tensor

_LARGE_BIAS = 32.0
"""The size of a bias from which on its scores are computed in float64."""


def explicit(
    q: Tensor, k: Tensor, v: Tensor, **options: Unpack[SoftmaxOptions]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (out, scores, pattern) with the full matrix: O(query · key) memory, differentiable.

    out [batch, head, query, d_v] and pattern [batch, head, query, key] in q's dtype; scores [batch, head,
    query, key] in float32 or wider, −inf where hidden: half precision would overflow at 65,504. Arguments
    and errors as in `attend`.

    >>> import torch
    >>> q = k = torch.zeros(1, 1, 3, 4)
    >>> out, scores, pattern = explicit(q, k, torch.eye(3)[None, None], scale=0.5)
    >>> pattern[0, 0, 1].tolist()
    [0.5, 0.5, 0.0]
    """
    problem = Problem(q, k, **options)
    check_values(k, v)
    scores = _scores(problem)
    pattern = explicit_pattern(scores, sink_logits=problem.sink_logits).to(q.dtype)
    return mix(pattern, v), scores, pattern


def explicit_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the scores [batch, head, query, key] that enter the softmax, float32 or wider, −inf where hidden.

    float64 where a bias is so large that float32 would lose the differences between scores.
    """
    return _scores(Problem(q, k, scale, mask, window, softcap, bias=bias))


def _scores(problem: Problem) -> Tensor:
    dtype, cap = problem.compute_dtype, problem.softcap
    if problem.bias is not None and float(problem.bias.detach().abs().max()) > _LARGE_BIAS:
        dtype = torch.float64
    q, k = problem.q.to(dtype), problem.k.to(dtype)
    batch, n_heads, n_queries, d_head = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, d_head)
    scores = (grouped @ k.transpose(-1, -2) * problem.scale).view(batch, n_heads, n_queries, -1)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    hidden, bias = problem.mask_block((0, n_queries), (0, problem.n_keys))
    if bias is not None:
        scores = scores + bias
    if problem.row_shift is not None:
        scores = scores + problem.row_shift[..., None].to(dtype)
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def explicit_pattern(scores: Tensor, *, sink_logits: Tensor | None = None) -> Tensor:
    """Return the softmax of scores [batch, head, query, key] over the keys, in the scores' dtype.

    `sink_logits` [head] enter the sum and are dropped: rows then sum to less than 1. A query that sees
    nothing gets a row of zeros.

    Raises:
        InputError: unless sink_logits are [head].
    """
    require_tensor("scores", scores, "batch", "head", "query", "key")
    if sink_logits is not None:
        require_tensor("sink_logits", sink_logits)
    if sink_logits is not None and sink_logits.shape != scores.shape[1:2]:
        raise InputError(
            f"expected sink_logits [head] = {tuple(scores.shape[1:2])}, received {tuple(sink_logits.shape)}"
        )
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(sees_nothing, 0.0)
    if sink_logits is None:
        pattern = scores.softmax(-1)
    else:
        column = sink_logits.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        pattern = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return pattern.masked_fill(sees_nothing, 0.0)
