"""Attention with its log-sum-exp, and the statistics of its rows and columns, without the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from phaselens.attention import _blocks, _kernels
from phaselens.attention._problem import Problem, no_gradient


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its rows: (out, lse), in O(query) memory.

    q [batch, head, query, d_head], k [batch, kv_head, key, d_head], v [batch, kv_head, key, d_v], where
    the number of heads is a multiple of kv_heads. out [batch, head, query, d_v] in q's dtype; lse [batch,
    head, query] in nats, float32 (float64 for float64 inputs).

    `mask` [batch | 1, head | 1, query, key] is bool (True = visible) or added to the scores; None is
    causal, the last query standing at the last key. `window` lets a query see itself and the window − 1
    keys before it. `softcap` c turns a score s into c·tanh(s/c). `sinks` [head] are learned logits: one
    more column of the softmax that has no value. A query that sees nothing gets out 0 and lse −inf (the
    sink's logit where there is one).

    Raises ValueError where shapes do not fit, RuntimeError where a gradient would be needed.

    >>> import torch
    >>> x = torch.zeros(1, 2, 4, 8)
    >>> out, lse = attend(x, x, x, scale=8 ** -0.5)
    >>> [round(value, 4) for value in lse[0, 0].exp().tolist()]
    [1.0, 2.0, 3.0, 4.0]
    """
    no_gradient("attend", q, k, v, sinks)
    problem = Problem(q, k, scale, mask, window, softcap, sinks)
    check_values(k, v)
    out, lse = _kernels.attend(problem, v)
    if sinks is not None:
        real, lse = lse, torch.logaddexp(lse, _column(sinks, lse))
        out = out * (real - lse).exp()[..., None]
    return out.to(q.dtype), lse


def sink_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    position: int = 0,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention mass [batch, head, query] that each query gives the key at `position`, a fraction of 1.

    exp(s − lse) with one dot product a row; exactly 0 where the query cannot see that key. `lse` and the
    keyword arguments are those of `attend`. METRICS: Gu et al. 2024 (2410.10781), section 3.

    >>> import torch
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in sink_mass(x, x, lse, scale=1.0)[0, 0].tolist()]
    [1.0, 0.5, 0.3333, 0.25]
    """
    no_gradient("sink_mass", q, k, lse)
    problem = Problem(q, k, scale, mask, window, softcap, sinks)
    _check_lse(problem, lse)
    if not 0 <= position < problem.n_keys:
        raise ValueError(f"expected a position in 0 … {problem.n_keys - 1}, received {position}")
    rows, cols = (0, problem.n_queries), (position, position + 1)
    block = _blocks.Block(rows, cols, _blocks.score_block(problem, rows, cols))
    return _blocks.weights(block, lse).squeeze(-1)


def row_entropy(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Entropy [batch, head, query] in nats of each query's attention, −Σ p ln p over the real keys.

    lse·Σp − scale·q·(Σ_j p_j k_j), where the bracket is attention with the keys as values. With learned
    sinks p is not renormalised: their column only takes its share. 0 for a query that sees nothing.

    >>> import torch
    >>> x = torch.zeros(1, 1, 4, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in row_entropy(x, x, lse, scale=1.0).exp()[0, 0].tolist()]
    [1.0, 2.0, 3.0, 4.0]
    """
    no_gradient("row_entropy", q, k, lse)
    problem = Problem(q, k, scale, mask, window, softcap, sinks)
    _check_lse(problem, lse)
    if softcap is not None or problem.has_bias:
        return _entropy_in_blocks(problem, lse)
    mean_key, real = _kernels.attend(problem, k)
    mean_score = (q.to(real.dtype) * mean_key.to(real.dtype)).sum(-1) * scale
    share = (real - lse).exp() if sinks is not None else 1.0
    return ((lse - mean_score) * share).masked_fill(real == -torch.inf, 0.0)


def _entropy_in_blocks(problem: Problem, lse: Tensor) -> Tensor:
    entropy = torch.zeros_like(lse)
    for block in _blocks.blocks(problem):
        rows = slice(*block.rows)
        p = _blocks.weights(block, lse)
        surprise = lse[:, :, rows, None] - block.scores
        entropy[:, :, rows] += (p * surprise.masked_fill(block.scores == -torch.inf, 0.0)).sum(-1)
    return entropy


def received_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention mass [batch, head, key] that each key receives, Σ_i p_ij, in queries.

    `lengths` [batch] are the numbers of real tokens of right-padded texts: queries at positions from
    there on are not counted.

    >>> import torch
    >>> x = torch.zeros(1, 1, 3, 8)
    >>> _, lse = attend(x, x, x, scale=1.0)
    >>> [round(value, 4) for value in received_mass(x, x, lse, scale=1.0)[0, 0].tolist()]
    [1.8333, 0.8333, 0.3333]
    """
    no_gradient("received_mass", q, k, lse)
    problem = Problem(q, k, scale, mask, window, softcap, sinks)
    _check_lse(problem, lse)
    received = lse.new_zeros((*q.shape[:2], problem.n_keys))
    real = _real_queries(problem, lengths)
    for block in _blocks.blocks(problem):
        p = _blocks.weights(block, lse)
        if real is not None:
            p = p.masked_fill(~real[:, None, slice(*block.rows), None], 0.0)
        received[:, :, slice(*block.cols)] += p.sum(-2)
    return received


def _real_queries(problem: Problem, lengths: Tensor | None) -> Tensor | None:
    """[batch, query], True where a query is no pad."""
    if lengths is None:
        return None
    batch = problem.q.shape[0]
    if lengths.shape != (batch,):
        raise ValueError(f"expected lengths [batch] = ({batch},), received {tuple(lengths.shape)}")
    position = torch.arange(problem.n_queries, device=problem.q.device) + problem.offset
    return position[None, :] < lengths.to(problem.q.device)[:, None]


def check_values(k: Tensor, v: Tensor) -> None:
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or v.dtype != k.dtype:
        front = ", ".join(str(size) for size in k.shape[:3])
        raise ValueError(
            f"expected v [batch, kv_head, key, d_v] = ({front}, d_v) of {k.dtype}, "
            f"received {tuple(v.shape)} of {v.dtype}"
        )


def _check_lse(problem: Problem, lse: Tensor) -> None:
    if lse.shape != problem.q.shape[:3]:
        raise ValueError(
            f"expected lse [batch, head, query] = {tuple(problem.q.shape[:3])}, received {tuple(lse.shape)}"
        )


def _column(sinks: Tensor, lse: Tensor) -> Tensor:
    return sinks.to(lse.dtype)[None, :, None].expand(lse.shape)
