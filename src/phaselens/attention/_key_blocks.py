"""Softmax weights in blocks: a few queries and all the keys that they can see, on any device, in O(key) memory.

A block contains whole rows, so its own sum Z normalises them. This is why float32 is exact enough: the rounding of a
long dot product is nearly the same in a score and in the log-sum-exp, and cancels in p / Z, whereas exp(s − lse) would
keep all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.attention._problem import Problem

ROWS = 128
"""Most queries in a block; fewer where there are many keys."""
CPU_ELEMENTS = 1 << 20
"""Scores in a block for each CPU thread. Up to 4 times as many where rows are long."""
GPU_ELEMENTS = 1 << 24
"""Scores in a block on a GPU. Up to 4 times as many where rows are long."""

LN_2 = math.log(2)
_LOG2_ZERO = -2000.0
"""A log2 weight whose exp2 is 0 in every dtype, and whose product with that 0 is 0."""


class KeyBlock(NamedTuple):
    """Softmax weights of queries rows[0] … rows[1]−1 on keys cols[0] … cols[1]−1, for some batch rows and heads.

    `log2_p` and `p` = 2 ** log2_p are [batch, head, row, col], up to one factor per row; p / total are the weights.
    (Base 2, because exp is forty times slower where it underflows, and exp2 is not.) `total` [batch, head, row] sums p
    with the sink logit's column, `real` without it; `norm` is `total`, or 1 for a query that sees nothing.
    `reference` [batch, head, row], in nats, was subtracted from the scores. The next block overwrites `log2_p` and `p`.
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
    def row_index(self) -> tuple[slice, slice, slice]:
        """Index of the block's rows in a tensor [batch, head, query]."""
        return self.batch, self.heads, slice(*self.rows)


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive (start, stop) of at most `step`."""
    for span_start in range(start, stop, step):
        yield span_start, min(span_start + step, stop)


def key_blocks(problem: Problem, lse: Tensor | None = None) -> Iterator[KeyBlock]:
    """Yield all blocks of `problem`, in its `compute_dtype`; queries that see nothing may be left out.

    With a bias, scores and `KeyBlock.reference` are relative to `Problem.row_shift`, and `lse` is not. Scores are
    relative to `lse` [batch, head, query], which must be right to within a few units, or without `lse` to
    each row's largest score or sink logit.
    """
    group, dtype = problem.group, problem.compute_dtype
    n_rows, batches, kv_heads = _sizes(problem)
    longest = max((problem.n_visible(*rows) for rows in spans(0, problem.n_queries, n_rows)), default=0)
    # The first spans are the longest, and begin at 0.
    size = n_rows * group * longest * batches[0][1] * kv_heads[0][1]
    log2_buffer, p_buffer = (torch.empty(size, dtype=dtype, device=problem.q.device) for _ in range(2))
    for b0, b1 in batches:
        for h0, h1 in kv_heads:
            subset = problem.subset(slice(b0, b1), slice(h0, h1))
            norm = None if lse is None else lse[b0:b1, h0 * group : h1 * group].to(dtype)
            for block in _blocks_of_subset(subset, norm, n_rows, log2_buffer, p_buffer):
                yield block._replace(batch=slice(b0, b1), heads=slice(h0 * group, h1 * group))


def _sizes(problem: Problem) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the rows per block, and the spans of batch rows and key heads in a block: all heads, or one batch row."""
    batch, n_kv, group = problem.q.shape[0], problem.k.shape[1], problem.group
    if problem.q.device.type == "cpu":
        max_elements = CPU_ELEMENTS * torch.get_num_threads()
    else:
        max_elements = GPU_ELEMENTS
    n_keys = problem.n_visible(max(0, problem.n_queries - ROWS), problem.n_queries)
    row_elements = max(1, group * n_keys)
    n_rows = max(1, min(ROWS, 4 * max_elements // row_elements))
    units = max(1, max_elements // (n_rows * row_elements))
    if units >= n_kv:
        return n_rows, list(spans(0, batch, max(1, units // n_kv))), [(0, n_kv)]
    return n_rows, list(spans(0, batch, 1)), list(spans(0, n_kv, units))


def _blocks_of_subset(
    problem: Problem, lse: Tensor | None, n_rows: int, log2_buffer: Tensor, p_buffer: Tensor
) -> Iterator[KeyBlock]:
    dtype, group = problem.compute_dtype, problem.group
    batch, n_heads, n_queries, d_head = problem.q.shape
    units = batch * problem.k.shape[1]
    # Contiguous, because a product of many heads whose rows are interleaved takes a sixth longer.
    q = problem.q.to(dtype).contiguous().view(units, group, n_queries, d_head)
    k = problem.k.to(dtype).contiguous().view(units, problem.n_keys, d_head).transpose(-1, -2)
    if lse is None:
        references, hidden_score = q.new_zeros(problem.q.shape[:3]), -torch.inf
    else:
        lse = problem.relative(lse)
        references, hidden_score = lse.masked_fill(lse == -torch.inf, 0.0), _LOG2_ZERO
    offsets = (references / -LN_2).view(units, group, n_queries)
    masks: dict[tuple[int, ...], Tensor | None] = {}
    for start, stop in spans(0, n_queries, n_rows):
        first_key, key_end = problem.visible_keys(start, stop)
        if first_key == key_end:
            continue
        shape = (batch, n_heads, stop - start, key_end - first_key)
        n_cells = shape[0] * shape[1] * shape[2] * shape[3]
        scores, p = log2_buffer[:n_cells].view(shape), p_buffer[:n_cells].view(shape)
        reference = references[:, :, start:stop]
        _compute_scores(
            scores, problem, q[:, :, start:stop], k[:, :, first_key:key_end], offsets[:, :, start:stop]
        )
        _apply_mask(scores, problem, (start, stop), (first_key, key_end), hidden_score, masks)
        column = None
        if problem.sink_logits is not None:
            logits = problem.sink_logits.to(dtype)[None, :, None].expand(batch, -1, n_queries)
            column = problem.relative(logits)[:, :, start:stop]
        if lse is None:
            top = scores.amax(-1)
            if column is not None:  # beside a far larger logit, exp would overflow
                top = torch.maximum(top, column / LN_2)
            top = top.masked_fill(top == -torch.inf, 0.0)
            scores -= top[..., None]
            scores.masked_fill_(scores == -torch.inf, _LOG2_ZERO)
            reference = top * LN_2
        torch.exp2(scores, out=p)
        real = p.sum(-1)
        total = real if column is None else real + (column - reference).exp()
        norm = total.masked_fill(total == 0, 1.0)
        yield KeyBlock(
            slice(0), slice(0), (start, stop), (first_key, key_end), scores, p, real, total, norm, reference
        )


def _compute_scores(scores: Tensor, problem: Problem, q: Tensor, k: Tensor, offset: Tensor) -> None:
    """Set scores to (scale · q k, capped) / ln 2 + offset; q [unit, group, row, d_head], k [unit, d_head, col]."""
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


def _apply_mask(
    scores: Tensor,
    problem: Problem,
    rows: tuple[int, int],
    cols: tuple[int, int],
    hidden_score: float,
    masks: dict[tuple[int, ...], Tensor | None],
) -> None:
    """Add biases, and set hidden cells to `hidden_score`.

    Without a mask and hidden keys, which cells are hidden depends on distances only, and `masks` caches it for the
    next block.
    """
    for edge in problem.edges(rows, cols):
        key = (rows[1] - rows[0], edge[0] - rows[0], edge[1] - rows[0])
        if problem.mask is not None or problem.bias is not None or problem.hidden_keys is not None:
            hidden, bias = problem.mask_block(rows, edge)
        else:
            if key not in masks:
                masks[key] = problem.mask_block(rows, edge)[0]
            hidden, bias = masks[key], None
        view = scores[..., edge[0] - cols[0] : edge[1] - cols[0]]
        if bias is not None:
            view += bias / LN_2
        if hidden is not None:
            view.masked_fill_(hidden, hidden_score)


def attend(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out [batch, head, query, d_v], lse) over the real keys, both in `compute_dtype`."""
    batch, n_heads, n_queries, _ = problem.q.shape
    out = v.new_zeros((batch, n_heads, n_queries, v.shape[-1]), dtype=problem.compute_dtype)
    lse = out.new_full((batch, n_heads, n_queries), -torch.inf)
    for block in key_blocks(problem):
        values = v[block.batch, :, slice(*block.cols)].to(out.dtype)
        if values.shape[1] != block.p.shape[1] // problem.group:
            values = values[:, block.heads.start // problem.group : block.heads.stop // problem.group]
        total = block.real[..., None]
        out[block.row_index] = mix(block.p, values) / total.masked_fill(total == 0, 1.0)
        lse[block.row_index] = block.real.log() + block.reference
    return out, lse


def mix(p: Tensor, v: Tensor) -> Tensor:
    """Multiply p [batch, head, row, col] by v [batch, kv_head, col, d_v], each value head shared by its group."""
    batch, n_heads, n_rows, n_cols = p.shape
    n_kv = v.shape[1]
    return (p.reshape(batch, n_kv, -1, n_cols) @ v).view(batch, n_heads, n_rows, v.shape[-1])
