"""Attention close to the diagonal: what queries give the keys 0, 1, 2, … positions before them, and no more."""

from __future__ import annotations

import torch
from torch import Tensor

from phaselens.attention._gather import Distance, redo
from phaselens.attention._guard import beyond_single
from phaselens.attention._problem import Problem
from phaselens.attention._strips import LN_2, spans, strips

ROWS = 64
"""Queries in a block."""
_EVEN = 16
"""Matrix products take twice as long where a side is not a multiple of this."""


def near_mass(problem: Problem, lse: Tensor, longest: int, real: Tensor | None) -> Tensor:
    """[batch, head, longest], in O(query · longest): the first distances of `Distance`."""

    def make(problem: Problem, real: Tensor | None) -> Distance:
        return Distance(problem, real, longest)

    large = beyond_single(problem, lse)
    if problem.mask is not None:
        gatherer = make(problem, real)
        if not large.all():
            for strip in strips(problem, lse):
                gatherer.add(strip)
        found = gatherer.found
    else:
        width = min(longest, problem.n_keys, problem.window or longest)
        found = lse.new_zeros((*problem.q.shape[:2], longest), dtype=problem.accumulate)
        if not large.all():
            found[..., :width] = _band(problem, lse, width, real)
    for batch, head in large.nonzero().tolist():
        found[batch, head] = redo(problem, batch, head, [make], real)[0].to(found.dtype)
    return found


def _band(problem: Problem, lse: Tensor, width: int, real: Tensor | None) -> Tensor:
    """[batch, head, width]: exp(s − lse) along the diagonals, for causal attention whose keys are all in reach."""
    dtype, group, n_queries = problem.accumulate, problem.group, problem.n_queries
    batch, n_heads, _, d_head = problem.q.shape
    units = batch * problem.k.shape[1]
    offset = (lse.to(dtype).masked_fill(lse == -torch.inf, 0.0) / -LN_2).view(units, group, n_queries)
    count = None if real is None or bool(real.all()) else real
    mass = offset.new_zeros((units, group, width))
    # Keys taken before a block's own: width − 1 at least, and so many that a block's product is fast.
    left = -(-(width - 1) // _EVEN) * _EVEN
    for start, stop in spans(0, n_queries, ROWS):
        n_rows, first = stop - start, start + problem.offset
        q = problem.q[:, :, start:stop].to(dtype).contiguous().view(units, group, n_rows, d_head)
        k = problem.k[:, :, max(0, first - left) : first + n_rows].to(dtype).contiguous()
        if first < left:  # zeros before the first key: every block has as many columns
            k = torch.nn.functional.pad(k, (0, 0, left - first, 0))
        k = k.view(units, -1, d_head).transpose(-1, -2)
        scores = _scores(problem, q, k, offset[:, :, start:stop])
        # Column c of row r is the key at distance left + r − c: one step right for each row down.
        *outer, step, _ = scores.stride()
        band = (units, group, n_rows, width), (*outer, step + 1, 1), left - width + 1
        p = scores.as_strided(*band).exp2()
        if first < width - 1:
            row = torch.arange(first, first + n_rows, device=p.device)[:, None]
            p = p.masked_fill(row < torch.arange(width - 1, -1, -1, device=p.device), 0.0)
        if count is not None:
            pad = ~count[:, None, None, start:stop, None]
            p = p.view(batch, -1, group, n_rows, width).masked_fill(pad, 0.0).view(p.shape)
        mass += p.sum(-2)
    return mass.flip(-1).view(batch, n_heads, width)


def _scores(problem: Problem, q: Tensor, k: Tensor, offset: Tensor) -> Tensor:
    """(scale · q k, capped) / ln 2 + offset, [unit, group, row, col]."""
    units, group, n_rows, d_head = q.shape
    queries, offset = q.reshape(units, group * n_rows, d_head), offset.reshape(units, group * n_rows, 1)
    if problem.softcap is None:
        scores = torch.baddbmm(offset, queries, k, alpha=problem.scale / LN_2)
    else:
        scores = torch.bmm(queries, k).mul_(problem.scale / problem.softcap).tanh_()
        scores = scores.mul_(problem.softcap / LN_2).add_(offset)
    return scores.view(units, group, n_rows, -1)
