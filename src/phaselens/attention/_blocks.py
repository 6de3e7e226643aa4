"""Scores in blocks of queries × keys, on any device: what no fused kernel gives, in O(L · block) memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.attention._problem import Problem

ROWS = 256
"""Queries in a block."""
COLS = 1024
"""Keys in a block."""


class Block(NamedTuple):
    """scores [batch, head, row, col] of queries rows[0] … rows[1]−1 on keys cols[0] … cols[1]−1."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    scores: Tensor


def score_block(
    problem: Problem, rows: tuple[int, int], cols: tuple[int, int], dtype: torch.dtype | None = None
) -> Tensor:
    """Scores of one block as the softmax sees them: scaled, capped, biased, −inf where hidden."""
    dtype = dtype or problem.accumulate
    q = problem.q[:, :, rows[0] : rows[1]].to(dtype)
    k = problem.k[:, :, cols[0] : cols[1]].to(dtype)
    batch, n_heads, n_rows, d_head = q.shape
    n_kv = k.shape[1]
    grouped = q.reshape(batch, n_kv, problem.group * n_rows, d_head)
    scores = (grouped @ k.transpose(-1, -2)).view(batch, n_heads, n_rows, -1).mul_(problem.scale)
    if problem.softcap is not None:
        scores = scores.div_(problem.softcap).tanh_().mul_(problem.softcap)
    hidden, bias = problem.block(rows, cols)
    if bias is not None:
        scores += bias
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) of at most `step`."""
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def row_blocks(problem: Problem, rows: tuple[int, int], dtype: torch.dtype | None = None) -> Iterator[Block]:
    """The blocks of keys that one block of queries can see."""
    for cols in spans(*problem.key_range(*rows), COLS):
        yield Block(rows, cols, score_block(problem, rows, cols, dtype))


def blocks(problem: Problem, dtype: torch.dtype | None = None) -> Iterator[Block]:
    """All blocks that hold a visible pair, queries in order."""
    for rows in spans(0, problem.n_queries, ROWS):
        yield from row_blocks(problem, rows, dtype)


def weights(block: Block, lse: Tensor) -> Tensor:
    """p [batch, head, row, col] = exp(s − lse); 0 for a query that sees nothing (its lse is −inf)."""
    norm = lse[:, :, block.rows[0] : block.rows[1], None].to(block.scores.dtype)
    blind = norm == -torch.inf
    return (block.scores - norm.masked_fill(blind, 0.0)).exp_()


def attend(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Online softmax: (out, lse) in the accumulating dtype, without learned sinks."""
    dtype = problem.accumulate
    batch, n_heads, n_queries, _ = problem.q.shape
    out = v.new_zeros((batch, n_heads, n_queries, v.shape[-1]), dtype=dtype)
    lse = out.new_full((batch, n_heads, n_queries), -torch.inf)
    for rows in spans(0, n_queries, ROWS):
        top = out.new_full((batch, n_heads, rows[1] - rows[0], 1), -torch.inf)
        total = torch.zeros_like(top)
        mixed = out[:, :, rows[0] : rows[1]]
        for block in row_blocks(problem, rows):
            new_top = torch.maximum(top, block.scores.amax(-1, keepdim=True))
            base = new_top.masked_fill(new_top == -torch.inf, 0.0)
            fade = (top - base).exp_()
            p = (block.scores - base).exp_()
            total = total * fade + p.sum(-1, keepdim=True)
            mixed *= fade
            mixed += mix(p, v[:, :, block.cols[0] : block.cols[1]].to(dtype))
            top = new_top
        seen = total != 0
        mixed /= total.where(seen, torch.ones_like(total))
        base = top.masked_fill(top == -torch.inf, 0.0)
        lse[:, :, rows[0] : rows[1]] = (base + total.log()).squeeze(-1)
    return out, lse


def mix(p: Tensor, v: Tensor) -> Tensor:
    """p [batch, head, row, col] times v [batch, kv_head, col, d_v], each value head shared by its group."""
    batch, n_heads, n_rows, n_cols = p.shape
    n_kv = v.shape[1]
    return (p.reshape(batch, n_kv, -1, n_cols) @ v).view(batch, n_heads, n_rows, v.shape[-1])
