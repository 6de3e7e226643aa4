"""Softmax weights in strips: a few queries against all the keys they can see, on any device, in O(key) memory.

A strip holds whole rows, so its own sum Z normalises them. That is what makes fp32 good enough: the rounding
of a long dot product is nearly the same in a score and in the log-sum-exp, and cancels in p / Z, where
exp(s − lse) would keep all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.attention._problem import Problem

ROWS = 128
"""Queries in a strip, where its keys leave room for as many."""
CPU_ELEMENTS = 1 << 20
"""Scores of a strip for each thread of a CPU. Where rows are long, up to 4 times as many."""
GPU_ELEMENTS = 1 << 24
"""Scores of a strip on a GPU, likewise."""

LN_2 = math.log(2)
_NEVER = -2000.0
"""A log weight whose exp2 is 0 in every dtype, and whose product with that 0 is 0."""


class Strip(NamedTuple):
    """Queries rows[0] … rows[1]−1 on keys cols[0] … cols[1]−1, of some batch rows and heads.

    `log2_p` and `p` = 2 ** log2_p are [batch, head, row, col], up to a factor a row; p / total are the
    weights. (Base 2, because exp slows down forty times where it underflows, and exp2 does not.) `total`
    [batch, head, row] sums p with the learned sink's column, `real` without it; `norm` is `total`, or 1 for a
    query that sees nothing. `reference` [batch, head, row], in nats, was subtracted from the scores. Both large
    tensors are overwritten by the next strip.
    """

    batch: slice
    heads: slice
    rows: tuple[int, int]
    cols: tuple[int, int]
    log2_p: Tensor
    p: Tensor
    real: Tensor
    total: Tensor
    norm: Tensor
    reference: Tensor

    @property
    def where(self) -> tuple[slice, slice, slice]:
        """Index of the strip's rows in a tensor [batch, head, query]."""
        return self.batch, self.heads, slice(*self.rows)


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) of at most `step`."""
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def strips(problem: Problem, lse: Tensor | None = None) -> Iterator[Strip]:
    """All strips, in the accumulating dtype of `problem`; queries that see nothing may be left out.

    With `lse` [batch, head, query] the scores are taken relative to it; it has to be right to within a few
    units. Without, relative to each row's largest score.
    """
    group, dtype = problem.group, problem.accumulate
    n_rows, batches, kv_heads = _sizes(problem)
    longest = max((problem.n_seen(*rows) for rows in spans(0, problem.n_queries, n_rows)), default=0)
    size = n_rows * group * longest * (batches[0][1] - batches[0][0]) * (kv_heads[0][1] - kv_heads[0][0])
    store, weights = (torch.empty(size, dtype=dtype, device=problem.q.device) for _ in range(2))
    for b0, b1 in batches:
        for h0, h1 in kv_heads:
            part = problem.part(slice(b0, b1), slice(h0, h1))
            norm = None if lse is None else lse[b0:b1, h0 * group : h1 * group].to(dtype)
            for strip in _of_part(part, norm, n_rows, store, weights):
                yield strip._replace(batch=slice(b0, b1), heads=slice(h0 * group, h1 * group))


def _sizes(problem: Problem) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows of a strip, and the spans of batch rows and key heads taken together: all heads, or one batch row."""
    batch, n_kv, group = problem.q.shape[0], problem.k.shape[1], problem.group
    if problem.q.device.type == "cpu":
        room = CPU_ELEMENTS * torch.get_num_threads()
    else:
        room = GPU_ELEMENTS
    n_keys = problem.n_seen(max(0, problem.n_queries - ROWS), problem.n_queries)
    row = max(1, group * n_keys)
    n_rows = max(1, min(ROWS, 4 * room // row))
    units = max(1, room // (n_rows * row))
    if units >= n_kv:
        return n_rows, list(spans(0, batch, max(1, units // n_kv))), [(0, n_kv)]
    return n_rows, list(spans(0, batch, 1)), list(spans(0, n_kv, units))


def _of_part(
    problem: Problem, lse: Tensor | None, n_rows: int, store: Tensor, weights: Tensor
) -> Iterator[Strip]:
    dtype, group = problem.accumulate, problem.group
    batch, n_heads, n_queries, d_head = problem.q.shape
    units = batch * problem.k.shape[1]
    # Contiguous, for a product of many heads that lie between each other's rows takes a sixth longer.
    q = problem.q.to(dtype).contiguous().view(units, group, n_queries, d_head)
    k = problem.k.to(dtype).contiguous().view(units, problem.n_keys, d_head).transpose(-1, -2)
    if lse is None:
        references, low = q.new_zeros(problem.q.shape[:3]), -torch.inf
    else:
        references, low = lse.masked_fill(lse == -torch.inf, 0.0), _NEVER
    offsets = (references / -LN_2).view(units, group, n_queries)
    hidden: dict[tuple[int, ...], Tensor | None] = {}
    for start, stop in spans(0, n_queries, n_rows):
        first, last = problem.key_range(start, stop)
        if first == last:
            continue
        shape = (batch, n_heads, stop - start, last - first)
        n_cells = shape[0] * shape[1] * shape[2] * shape[3]
        scores, p = store[:n_cells].view(shape), weights[:n_cells].view(shape)
        reference = references[:, :, start:stop]
        _fill(scores, problem, q[:, :, start:stop], k[:, :, first:last], offsets[:, :, start:stop])
        _hide(scores, problem, (start, stop), (first, last), low, hidden)
        if lse is None:
            top = scores.amax(-1)
            top = top.masked_fill(top == -torch.inf, 0.0)
            scores -= top[..., None]
            scores.masked_fill_(scores == -torch.inf, _NEVER)
            reference = top * LN_2
        torch.exp2(scores, out=p)
        real = p.sum(-1)
        total = real
        if problem.sinks is not None:
            total = real + (problem.sinks.to(dtype)[None, :, None] - reference).exp()
        norm = total.masked_fill(total == 0, 1.0)
        yield Strip(slice(0), slice(0), (start, stop), (first, last), scores, p, real, total, norm, reference)


def _fill(scores: Tensor, problem: Problem, q: Tensor, k: Tensor, offset: Tensor) -> None:
    """scores := (scale · q k, capped) / ln 2 + offset; q [unit, group, row, d_head], k [unit, d_head, col]."""
    units, group, n_rows, d_head = q.shape
    flat = scores.view(units, group * n_rows, -1)
    queries = q.reshape(units, group * n_rows, d_head)
    if problem.softcap is None:
        start = offset.reshape(units, group * n_rows, 1)
        torch.baddbmm(start, queries, k, alpha=problem.scale / LN_2, out=flat)
    else:
        torch.bmm(queries, k, out=flat)
        scores.mul_(problem.scale / problem.softcap).tanh_()
        scores.mul_(problem.softcap / LN_2)
        flat += offset.reshape(units, group * n_rows, 1)


def _hide(
    scores: Tensor,
    problem: Problem,
    rows: tuple[int, int],
    cols: tuple[int, int],
    low: float,
    known: dict[tuple[int, ...], Tensor | None],
) -> None:
    """Biases added, hidden cells set to `low`. Without a mask, what is hidden depends on distances only: `known`
    keeps it for the next strip."""
    for edge in problem.edges(rows, cols):
        place = (rows[1] - rows[0], edge[0] - rows[0], edge[1] - rows[0])
        if problem.mask is not None:
            hidden, bias = problem.block(rows, edge)
        else:
            if place not in known:
                known[place] = problem.block(rows, edge)[0]
            hidden, bias = known[place], None
        view = scores[..., edge[0] - cols[0] : edge[1] - cols[0]]
        if bias is not None:
            view += bias / LN_2
        if hidden is not None:
            view.masked_fill_(hidden, low)


def attend(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [batch, head, query, d_v], lse) over the real keys, both in the accumulating dtype."""
    batch, n_heads, n_queries, _ = problem.q.shape
    out = v.new_zeros((batch, n_heads, n_queries, v.shape[-1]), dtype=problem.accumulate)
    lse = out.new_full((batch, n_heads, n_queries), -torch.inf)
    for strip in strips(problem):
        values = v[strip.batch, :, slice(*strip.cols)].to(out.dtype)
        if values.shape[1] != strip.p.shape[1] // problem.group:
            values = values[:, strip.heads.start // problem.group : strip.heads.stop // problem.group]
        total = strip.real[..., None]
        out[strip.where] = mix(strip.p, values) / total.masked_fill(total == 0, 1.0)
        lse[strip.where] = strip.real.log() + strip.reference
    return out, lse


def mix(p: Tensor, v: Tensor) -> Tensor:
    """p [batch, head, row, col] times v [batch, kv_head, col, d_v], each value head shared by its group."""
    batch, n_heads, n_rows, n_cols = p.shape
    n_kv = v.shape[1]
    return (p.reshape(batch, n_kv, -1, n_cols) @ v).view(batch, n_heads, n_rows, v.shape[-1])
