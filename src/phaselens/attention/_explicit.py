"""The dense path: every score and every weight, differentiable, for those who hook the matrix itself."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from phaselens.attention._attend import check_values
from phaselens.attention._problem import Problem, SoftmaxOptions
from phaselens.attention._strips import mix
from phaselens.errors import InputError, require_tensor


def explicit(
    q: Tensor, k: Tensor, v: Tensor, **options: Unpack[SoftmaxOptions]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, scores, pattern) with the full matrix: O(query · key) memory, differentiable.

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
    pattern = explicit_pattern(scores, sinks=problem.sinks).to(q.dtype)
    return mix(pattern, v), scores, pattern


def explicit_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scores [batch, head, query, key] as the softmax sees them, float32 or wider, −inf where hidden."""
    return _scores(Problem(q, k, scale, mask, window, softcap))


def _scores(problem: Problem) -> Tensor:
    dtype, cap = problem.accumulate, problem.softcap
    q, k = problem.q.to(dtype), problem.k.to(dtype)
    batch, n_heads, n_queries, d_head = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, d_head)
    scores = (grouped @ k.transpose(-1, -2) * problem.scale).view(batch, n_heads, n_queries, -1)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    hidden, bias = problem.block((0, n_queries), (0, problem.n_keys))
    if bias is not None:
        scores = scores + bias
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def explicit_pattern(scores: Tensor, *, sinks: Tensor | None = None) -> Tensor:
    """Softmax of scores [batch, head, query, key] over the keys, in the scores' dtype.

    `sinks` [head] takes part in the sum and is dropped: its rows sum to less than 1. A query that sees
    nothing gets a row of zeros.
    """
    require_tensor("scores", scores, "batch", "head", "query", "key")
    if sinks is not None:
        require_tensor("sinks", sinks)
    if sinks is not None and sinks.shape != scores.shape[1:2]:
        raise InputError(f"expected sinks [head] = {tuple(scores.shape[1:2])}, received {tuple(sinks.shape)}")
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    if sinks is None:
        pattern = scores.softmax(-1)
    else:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        pattern = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return pattern.masked_fill(blind, 0.0)
