"""What is gathered from the strips of a softmax, one class a statistic, and the pass that feeds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from phaselens.attention._guard import beyond_single
from phaselens.attention._problem import Problem
from phaselens.attention._strips import LN_2, Strip, strips
from phaselens.errors import InputError, kind_unless_whole


class Gatherer(Protocol):
    """Adds up one statistic in `found` [batch, head, …], strip by strip."""

    found: Tensor

    def add(self, strip: Strip) -> None: ...


Make = Callable[[Problem, Tensor | None], Gatherer]
"""A new gatherer for a problem, of which queries [batch, query] count (None: all)."""


def gather(
    problem: Problem, lse: Tensor, large: Tensor, makes: Sequence[Make], real: Tensor | None = None
) -> list[Tensor]:
    """One pass over all strips for all statistics; the heads that are too `large` for float32, again in float64."""
    if real is not None and bool(real.all()):
        real = None
    gatherers = [make(problem, real) for make in makes]
    _pass(problem, lse, large, gatherers)
    _redo_large(problem, large, makes, gatherers, real)
    return [gatherer.found for gatherer in gatherers]


def gather_near(
    problem: Problem, lse: Tensor, n: int, make: Callable[[bool], Make], real: Tensor | None = None
) -> Tensor:
    """`gather` for one statistic of a query's own key and the n − 1 before it, in O(query · n).

    `make(whole)` makes the gatherer; the strips are whole rows in the float64 heads only.
    """
    large = beyond_single(problem, lse)
    window = n if problem.window is None else min(problem.window, n)
    band = replace(problem, window=window, sinks=None)
    near = make(False)(band, real)
    _pass(band, lse, large, [near])
    _redo_large(problem, large, [make(True)], [near], real)
    return near.found


def _pass(problem: Problem, lse: Tensor, large: Tensor, gatherers: Sequence[Gatherer]) -> None:
    if not large.all():
        for strip in strips(problem, lse):
            for gatherer in gatherers:
                gatherer.add(strip)


def _redo_large(
    problem: Problem, large: Tensor, makes: Sequence[Make], found: Sequence[Gatherer], real: Tensor | None
) -> None:
    for batch, head in large.nonzero().tolist():
        redone = redo(problem, batch, head, makes, real)
        for gatherer, exact in zip(found, redone, strict=True):
            gatherer.found[batch, head] = exact.to(gatherer.found.dtype)


def redo(problem: Problem, batch: int, head: int, makes: Sequence[Make], real: Tensor | None) -> list[Tensor]:
    """The statistics of one head, in float64."""
    precise = problem.head(batch, head)
    gatherers = [make(precise, None if real is None else real[batch : batch + 1]) for make in makes]
    for strip in strips(precise):
        for gatherer in gatherers:
            gatherer.add(strip)
    return [gatherer.found[0, 0] for gatherer in gatherers]


class Mass:
    """[batch, head, query]: the mass each query gives the key at `position`."""

    def __init__(self, problem: Problem, position: int) -> None:
        self.found = problem.q.new_zeros(problem.q.shape[:3], dtype=problem.accumulate)
        self.position = position

    def add(self, strip: Strip) -> None:
        first, last = strip.cols
        if first <= self.position < last:
            # Times the reciprocal, as what `Distance` adds up: a query's weight on its own key is the same in both.
            self.found[strip.where] = strip.p[..., self.position - first] * strip.norm.reciprocal()


class Entropy:
    """[batch, head, query]: −Σ p ln p. Uses the strip's log2_p up, so nothing that reads it may come later."""

    def __init__(self, problem: Problem) -> None:
        self.found = problem.q.new_zeros(problem.q.shape[:3], dtype=problem.accumulate)

    def add(self, strip: Strip) -> None:
        surprise = strip.log2_p.mul_(strip.p).sum(-1) * LN_2
        self.found[strip.where] = (strip.real * strip.norm.log() - surprise) / strip.norm


class Received:
    """[batch, head, key]: the mass each key receives from the queries that count."""

    def __init__(self, problem: Problem, real: Tensor | None) -> None:
        shape = (*problem.q.shape[:2], problem.n_keys)
        self.found = problem.q.new_zeros(shape, dtype=problem.accumulate)
        self.real = real

    def add(self, strip: Strip) -> None:
        p, weight = counted(strip, strip.p, self.real)
        columns = (weight[:, :, None, :] @ p).squeeze(-2)
        self.found[strip.batch, strip.heads, slice(*strip.cols)] += columns


class Distance:
    """[batch, head, distance]: the mass that queries which count give keys so many positions before them.

    `found` has room for distances 0 … longest − 1. Where the strips hold only part of their rows, `whole` is False:
    p is relative to the row's log-sum-exp, and not divided again.
    """

    def __init__(self, problem: Problem, real: Tensor | None, longest: int, whole: bool = True) -> None:
        self.found = problem.q.new_zeros((*problem.q.shape[:2], longest), dtype=problem.accumulate)
        self.offset, self.real, self.whole = problem.offset, real, whole

    def add(self, strip: Strip) -> None:
        start, stop = strip.rows[0] + self.offset, strip.rows[1] + self.offset
        n = min(self.found.shape[-1], stop)  # from the last query to key 0 are stop − 1 steps
        low = start - (n - 1)
        first, last = max(low, strip.cols[0]), min(stop, strip.cols[1])
        if first >= last:
            return
        near = strip.p[..., first - strip.cols[0] : last - strip.cols[0]]
        p, weight = counted(strip, near, self.real)
        if self.whole:
            p = p * weight[..., None]
        # Padded after the product: what is not there stays 0, also in a row that is NaN.
        if (first, last) != (low, stop):
            p = pad(p, (first - low, stop - last))
        # Column m of row r is now the key n − 1 + r − m before it: one step to the right for each row down.
        *outer, step, _ = p.stride()
        band = p.as_strided((*p.shape[:3], n), (*outer, step + 1, 1))
        self.found[strip.batch, strip.heads, :n] += band.sum(-2).flip(-1)


class Window:
    """[batch, head, query]: the mass each query gives the `width` keys before it.

    With `include_self` its own key as well, with `exclude_first` without key 0. Where the strip holds only
    part of the row, `whole` is False: p is relative to the row's log-sum-exp, and not divided again.
    """

    def __init__(
        self, problem: Problem, width: int, include_self: bool, exclude_first: bool, whole: bool = True
    ) -> None:
        self.found = problem.q.new_zeros(problem.q.shape[:3], dtype=problem.accumulate)
        self.offset, self.width, self.whole = problem.offset, width, whole
        self.include_self, self.exclude_first = include_self, exclude_first

    def add(self, strip: Strip) -> None:
        device = strip.p.device
        start, stop = strip.rows[0] + self.offset, strip.rows[1] + self.offset
        first = max(strip.cols[0], start - self.width, int(self.exclude_first))
        last = min(strip.cols[1], stop)
        if first >= last:
            return
        query = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(first, last, device=device)
        near = (key >= query - self.width) & (key < query + int(self.include_self))
        part = strip.p[..., first - strip.cols[0] : last - strip.cols[0]]
        mass = part.masked_fill(~near, 0.0).sum(-1)
        self.found[strip.where] = mass / strip.norm if self.whole else mass


def counted(strip: Strip, p: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """(p, 1 / total) with queries that do not count as zeros, whatever stood there; p are columns of `strip.p`."""
    weight = strip.norm.reciprocal()
    if real is None:
        return p, weight
    counts = real[strip.batch, None, slice(*strip.rows)]
    if counts.all():
        return p, weight
    return p.masked_fill(~counts[..., None], 0.0), weight.masked_fill(~counts, 0.0)


def require_lengths(lengths: Tensor) -> None:
    """InputError unless they are a tensor of whole numbers."""
    kind = kind_unless_whole(lengths)
    if kind:
        raise InputError(f"expected lengths [batch] as a tensor of whole numbers, received {kind}")


def real_queries(problem: Problem, lengths: Tensor | None) -> Tensor | None:
    """[batch, query], True where a query is no pad."""
    if lengths is None:
        return None
    batch = problem.q.shape[0]
    require_lengths(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"expected lengths [batch] = ({batch},), received {tuple(lengths.shape)}")
    position = torch.arange(problem.n_queries, device=problem.q.device) + problem.offset
    return position[None, :] < lengths.to(problem.q.device)[:, None]
