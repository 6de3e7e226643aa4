"""Statistics that are accumulated over the key blocks of a softmax, one class each, and the passes that feed them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from phaselens.attention._key_blocks import LN_2, KeyBlock, key_blocks
from phaselens.attention._precision import large_heads
from phaselens.attention._problem import Problem
from phaselens.errors import InputError, type_unless_whole


class Accumulator(Protocol):
    """Accumulator of one statistic, in `result` [batch, head, …], block by block."""

    result: Tensor

    def add(self, block: KeyBlock) -> None: ...


LargeHeads = Sequence[tuple[int, int]]
"""The batch row and head of each whose scores are too large for float32."""
MakeAccumulator = Callable[[Problem, Tensor | None], Accumulator]
"""A callable that creates an accumulator for a problem and the queries [batch, query] that count (None: all)."""


def accumulate(
    problem: Problem,
    lse: Tensor,
    large: LargeHeads,
    makers: Sequence[MakeAccumulator],
    real: Tensor | None = None,
) -> list[Tensor]:
    """Compute all statistics in one pass over the key blocks; heads too `large` for float32 run in float64."""
    accumulators = [make(problem, real) for make in makers]
    _run_pass(problem, lse, large, accumulators)
    _recompute_large_heads(problem, large, makers, accumulators, real)
    return [accumulator.result for accumulator in accumulators]


def accumulate_band(
    problem: Problem, lse: Tensor, n: int, make: Callable[[bool], MakeAccumulator], real: Tensor | None = None
) -> Tensor:
    """Compute one statistic of a query's own key and the n − 1 before it, as `accumulate`, in O(query · n).

    `make(whole_rows)` returns the maker. Blocks contain whole rows only in the heads that run in float64.
    """
    large = large_heads(problem, lse)
    window = n if problem.window is None else min(problem.window, n)
    band = replace(problem, window=window, sink_logits=None)
    accumulator = make(False)(band, real)
    _run_pass(band, lse, large, [accumulator])
    _recompute_large_heads(problem, large, [make(True)], [accumulator], real)
    return accumulator.result


def _run_pass(problem: Problem, lse: Tensor, large: LargeHeads, accumulators: Sequence[Accumulator]) -> None:
    if len(large) < lse.shape[0] * lse.shape[1]:
        for block in key_blocks(problem, lse):
            for accumulator in accumulators:
                accumulator.add(block)


def _recompute_large_heads(
    problem: Problem,
    large: LargeHeads,
    makers: Sequence[MakeAccumulator],
    accumulators: Sequence[Accumulator],
    real: Tensor | None,
) -> None:
    for batch, head in large:
        exact_results = accumulate_head(problem, batch, head, makers, real)
        for accumulator, exact in zip(accumulators, exact_results, strict=True):
            accumulator.result[batch, head] = exact.to(accumulator.result.dtype)


def accumulate_head(
    problem: Problem, batch: int, head: int, makers: Sequence[MakeAccumulator], real: Tensor | None
) -> list[Tensor]:
    """Compute the statistics of one head, in float64."""
    precise = problem.head(batch, head)
    accumulators = [make(precise, None if real is None else real[batch : batch + 1]) for make in makers]
    for block in key_blocks(precise):
        for accumulator in accumulators:
            accumulator.add(block)
    return [accumulator.result[0, 0] for accumulator in accumulators]


class KeyMass:
    """Mass [batch, head, query] of each query on the key at `position`."""

    def __init__(self, problem: Problem, position: int) -> None:
        self.result = problem.q.new_zeros(problem.q.shape[:3], dtype=problem.compute_dtype)
        self.position = position

    def add(self, block: KeyBlock) -> None:
        first_key, key_end = block.cols
        if first_key <= self.position < key_end:
            # Times the reciprocal, as in `DistanceMass`: a query's weight on its own key is then the same in both.
            self.result[block.row_index] = block.p[..., self.position - first_key] * block.norm.reciprocal()


class OwnMass:
    """Mass [batch, head, query] of each query on its own key."""

    def __init__(self, problem: Problem) -> None:
        self.result = problem.q.new_zeros(problem.q.shape[:3], dtype=problem.compute_dtype)
        self.offset = problem.offset

    def add(self, block: KeyBlock) -> None:
        first_column = block.rows[0] + self.offset - block.cols[0]
        own = block.p.diagonal(first_column, dim1=-2, dim2=-1)
        # The block has no column for a key that all of its queries cannot see.
        n_before = max(0, -first_column)
        own = pad(own, (n_before, block.p.shape[-2] - n_before - own.shape[-1]))
        self.result[block.row_index] = own * block.norm.reciprocal()


class SegmentMass:
    """Mass [batch, head, query, segment] of each query on each segment of keys.

    labels [batch | 1, key] are the keys' segments, from 0 to `n_segments` − 1; a key with another label is in none.
    """

    def __init__(self, problem: Problem, labels: Tensor, n_segments: int) -> None:
        shape = (*problem.q.shape[:3], n_segments)
        self.result = problem.q.new_zeros(shape, dtype=problem.compute_dtype)
        texts = slice(problem.first_text, problem.first_text + len(problem.q))
        segments = torch.arange(n_segments, device=labels.device)
        chosen = labels[texts] if len(labels) > 1 else labels
        self.membership = (chosen[..., None] == segments).to(problem.q.device, problem.compute_dtype)

    def add(self, block: KeyBlock) -> None:
        rows = block.batch if len(self.membership) > 1 else slice(None)
        mass = block.p @ self.membership[rows, None, slice(*block.cols)]
        self.result[block.row_index] = mass / block.norm[..., None]


TIE = 1e-5
"""Weights of a row that differ by this share of themselves, or less, count as equal: they may differ by rounding."""


class TopKey:
    """The key of each query's largest weight, and the number of keys that share it: [batch, head, query, 2].

    The first of several keys; NaN for a query that sees nothing or is NaN. Reads the block's log2_p.
    """

    def __init__(self, problem: Problem) -> None:
        shape = (*problem.q.shape[:3], 2)
        self.result = problem.q.new_full(shape, torch.nan, dtype=problem.compute_dtype)

    def add(self, block: KeyBlock) -> None:
        top = block.log2_p.amax(-1, keepdim=True)
        is_top = block.log2_p >= top - TIE / LN_2
        key = is_top.int().argmax(-1) + block.cols[0]
        pairs = torch.stack([key, is_top.sum(-1)], -1).to(self.result.dtype)
        self.result[block.row_index] = pairs.masked_fill(~(block.real > 0)[..., None], torch.nan)


SMALLEST_SCALE = 0.25
"""The smallest scale, times √d_head, with which products are read from scores. Smaller ones lose them to rounding."""


class RowLargest:
    """The largest |q·k| [batch, head, query] of each query and a key that it sees; NaN for a query that sees nothing.

    Reads the block's log2_p where a score is the product times the scale; otherwise the products are computed again.
    """

    def __init__(self, problem: Problem) -> None:
        self.result = problem.q.new_full(problem.q.shape[:3], torch.nan, dtype=problem.compute_dtype)
        self.problem = problem
        is_product = problem.softcap is None and problem.sink_logits is None and not problem.has_bias
        self.reads_scores = is_product and problem.scale * math.sqrt(problem.q.shape[-1]) >= SMALLEST_SCALE

    def add(self, block: KeyBlock) -> None:
        kv_heads = (head // self.problem.group for head in (block.heads.start, block.heads.stop))
        problem = self.problem.subset(block.batch, slice(*kv_heads))
        if self.reads_scores:
            values, factor, start = block.log2_p, LN_2 / problem.scale, block.reference / problem.scale
        else:
            values, factor, start = _products(problem, block), 1.0, torch.zeros_like(block.reference)
        highest, lowest = [], []
        for span, hidden in _spans_with_hidden(problem, block):
            seen = values[..., span[0] - block.cols[0] : span[1] - block.cols[0]]
            if hidden is None:
                highest.append(seen.amax(-1))
                lowest.append(seen.amin(-1))
            else:
                # A sum takes a tenth of the time of a masked fill.
                beyond = torch.zeros_like(hidden, dtype=seen.dtype).masked_fill_(hidden, torch.inf)
                highest.append((seen - beyond).amax(-1))
                lowest.append((seen + beyond).amin(-1))
        ends = torch.stack([torch.stack(highest).amax(0), torch.stack(lowest).amin(0)])
        largest = (ends * factor + start).abs().amax(0)
        self.result[block.row_index] = largest.masked_fill(ends[0] == -torch.inf, torch.nan)


def _products(problem: Problem, block: KeyBlock) -> Tensor:
    """Return q·k [batch, head, row, col] of a block of `problem`."""
    q = problem.q[:, :, slice(*block.rows)].to(problem.compute_dtype)
    k = problem.k[:, :, slice(*block.cols)].to(problem.compute_dtype)
    batch, n_heads, n_rows, d_head = q.shape
    products = q.reshape(batch, k.shape[1], -1, d_head) @ k.transpose(-1, -2)
    return products.view(batch, n_heads, n_rows, -1)


def _spans_with_hidden(problem: Problem, block: KeyBlock) -> Iterator[tuple[tuple[int, int], Tensor | None]]:
    """Yield consecutive spans of the block's columns, each with where they are hidden; None if nowhere."""
    first_key, key_end = block.cols
    for edge in [*problem.edges(block.rows, block.cols), (key_end, key_end)]:
        if first_key < edge[0]:
            yield (first_key, edge[0]), None
        if edge[0] < edge[1]:
            yield edge, problem.mask_block(block.rows, edge)[0]
        first_key = edge[1]


class RowEntropy:
    """Entropy [batch, head, query], −Σ p ln p. Overwrites the block's log2_p, so no later accumulator may read it."""

    def __init__(self, problem: Problem) -> None:
        self.result = problem.q.new_zeros(problem.q.shape[:3], dtype=problem.compute_dtype)

    def add(self, block: KeyBlock) -> None:
        surprise = block.log2_p.mul_(block.p).sum(-1) * LN_2
        self.result[block.row_index] = (block.real * block.norm.log() - surprise) / block.norm


class ReceivedMass:
    """Mass [batch, head, key] that each key receives from the queries that count."""

    def __init__(self, problem: Problem, real: Tensor | None) -> None:
        shape = (*problem.q.shape[:2], problem.n_keys)
        self.result = problem.q.new_zeros(shape, dtype=problem.compute_dtype)
        self.real = real

    def add(self, block: KeyBlock) -> None:
        p, weight = _zero_uncounted(block, block.p, self.real)
        columns = (weight[:, :, None, :] @ p).squeeze(-2)
        self.result[block.batch, block.heads, slice(*block.cols)] += columns


class DistanceMass:
    """Mass [batch, head, distance] on keys by distance, 0 … longest − 1, from the queries that count.

    `whole_rows` is False if the blocks contain only part of their rows: p is then relative to the row's log-sum-exp,
    and is not divided again.
    """

    def __init__(self, problem: Problem, real: Tensor | None, longest: int, whole_rows: bool) -> None:
        self.result = problem.q.new_zeros((*problem.q.shape[:2], longest), dtype=problem.compute_dtype)
        self.offset, self.real, self.whole_rows = problem.offset, real, whole_rows

    def add(self, block: KeyBlock) -> None:
        start, stop = block.rows[0] + self.offset, block.rows[1] + self.offset
        n = min(self.result.shape[-1], stop)  # key 0 is stop − 1 steps before the last query
        lowest = start - (n - 1)
        first_key, key_end = max(lowest, block.cols[0]), min(stop, block.cols[1])
        if first_key >= key_end:
            return
        p_in_range = block.p[..., first_key - block.cols[0] : key_end - block.cols[0]]
        p, weight = _zero_uncounted(block, p_in_range, self.real)
        if self.whole_rows:
            p = p * weight[..., None]
        # Padded after the product, so that missing columns stay 0 also in a row that is NaN.
        if (first_key, key_end) != (lowest, stop):
            p = pad(p, (first_key - lowest, stop - key_end))
        # Column m of row r is now the key n − 1 + r − m before it: one step to the right for each row down.
        *outer, step, _ = p.stride()
        band = p.as_strided((*p.shape[:3], n), (*outer, step + 1, 1))
        self.result[block.batch, block.heads, :n] += band.sum(-2).flip(-1)


class WindowMass:
    """Mass [batch, head, query] of each query on the `width` keys before it.

    `include_self` adds the query's own key, `exclude_first` leaves out key 0. `whole_rows` is False if the blocks
    contain only part of their rows: p is then relative to the row's log-sum-exp, and is not divided again.
    """

    def __init__(
        self,
        problem: Problem,
        width: int,
        include_self: bool,
        exclude_first: bool,
        whole_rows: bool,
    ) -> None:
        self.result = problem.q.new_zeros(problem.q.shape[:3], dtype=problem.compute_dtype)
        self.offset, self.width, self.whole_rows = problem.offset, width, whole_rows
        self.include_self, self.exclude_first = include_self, exclude_first

    def add(self, block: KeyBlock) -> None:
        device = block.p.device
        start, stop = block.rows[0] + self.offset, block.rows[1] + self.offset
        first_key = max(block.cols[0], start - self.width, int(self.exclude_first))
        key_end = min(block.cols[1], stop)
        if first_key >= key_end:
            return
        query = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(first_key, key_end, device=device)
        in_window = (key >= query - self.width) & (key < query + int(self.include_self))
        p_in_range = block.p[..., first_key - block.cols[0] : key_end - block.cols[0]]
        mass = p_in_range.masked_fill(~in_window, 0.0).sum(-1)
        self.result[block.row_index] = mass / block.norm if self.whole_rows else mass


def _zero_uncounted(block: KeyBlock, p: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (p, 1 / total), both 0 for queries that do not count, even if they were NaN; p: columns of `block.p`."""
    weight = block.norm.reciprocal()
    if real is None:
        return p, weight
    counts = real[block.batch, None, slice(*block.rows)]
    if p.device.type == "cpu" and counts.all():  # on a GPU, to ask takes longer than to fill
        return p, weight
    return p.masked_fill(~counts[..., None], 0.0), weight.masked_fill(~counts, 0.0)


def require_lengths(lengths: Tensor) -> None:
    """Raise InputError unless `lengths` is a tensor of whole numbers."""
    received = type_unless_whole(lengths)
    if received:
        raise InputError(f"expected lengths [batch] as a tensor of whole numbers, received {received}")


def real_queries(problem: Problem, lengths: Tensor | None) -> Tensor | None:
    """Return [batch, query], True where a query is not a pad; None if there are no pads."""
    if lengths is None:
        return None
    batch = problem.q.shape[0]
    require_lengths(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"expected lengths [batch] = ({batch},), received {tuple(lengths.shape)}")
    position = torch.arange(problem.n_queries, device=problem.q.device) + problem.offset
    return position[None, :] < lengths.to(problem.q.device)[:, None]
