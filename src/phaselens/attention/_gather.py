"""What is gathered from the strips of a softmax, one class a statistic, and the pass that feeds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from phaselens.attention._guard import beyond_single
from phaselens.attention._problem import Problem
from phaselens.attention._strips import LN_2, Strip, strips


class Gatherer(Protocol):
    """Adds up one statistic in `found` [batch, head, …], strip by strip."""

    found: Tensor

    def add(self, strip: Strip) -> None: ...


Make = Callable[[Problem, Tensor | None], Gatherer]
"""A new gatherer for a problem, of which queries [batch, query] count (None: all)."""


def gather(problem: Problem, lse: Tensor, makes: Sequence[Make], real: Tensor | None = None) -> list[Tensor]:
    """One pass over all strips for all statistics; the heads that float32 cannot serve, again in float64."""
    if real is not None and bool(real.all()):
        real = None
    gatherers = [make(problem, real) for make in makes]
    large = beyond_single(problem, lse)
    if not large.all():
        for strip in strips(problem, lse):
            for gatherer in gatherers:
                gatherer.add(strip)
    for batch, head in large.nonzero().tolist():
        redone = redo(problem, batch, head, makes, real)
        for gatherer, exact in zip(gatherers, redone, strict=True):
            gatherer.found[batch, head] = exact.to(gatherer.found.dtype)
    return [gatherer.found for gatherer in gatherers]


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
            self.found[strip.where] = strip.p[..., self.position - first] / strip.norm


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
        p, weight = counted(strip, self.real)
        columns = (weight[:, :, None, :] @ p).squeeze(-2)
        self.found[strip.batch, strip.heads, slice(*strip.cols)] += columns


class Distance:
    """[batch, head, distance]: the mass that queries which count give keys so many positions before them.

    Up to distance `longest` − 1, or all of them.
    """

    def __init__(self, problem: Problem, real: Tensor | None, longest: int | None = None) -> None:
        shape = (*problem.q.shape[:2], longest or problem.n_keys)
        self.found = problem.q.new_zeros(shape, dtype=problem.accumulate)
        self.offset, self.real = problem.offset, real

    def add(self, strip: Strip) -> None:
        p, weight = counted(strip, self.real)
        batch, heads, n_rows, n_cols = p.shape
        # Rows last to first, each padded by one cell a row: cut one cell shorter, diagonals stand as columns.
        skew = p.new_zeros((batch, heads, n_rows, n_cols + n_rows))
        skew[..., :n_cols] = (p * weight[..., None]).flip(-2)
        skew = skew.view(batch, heads, -1)[..., : n_rows * (n_cols + n_rows - 1)]
        mass = skew.view(batch, heads, n_rows, -1).sum(-2).flip(-1)
        # mass[m] now belongs to distance m + lowest; negative ones lie in the future.
        lowest = strip.rows[0] + self.offset - (strip.cols[1] - 1)
        start = max(0, -lowest)
        stop = min(mass.shape[-1], self.found.shape[-1] - lowest)
        if start < stop:
            self.found[strip.batch, strip.heads, start + lowest : stop + lowest] += mass[..., start:stop]


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


def counted(strip: Strip, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """(p, 1 / total) with queries that do not count as zeros, whatever stood there."""
    weight = strip.norm.reciprocal()
    if real is None:
        return strip.p, weight
    counts = real[strip.batch, None, slice(*strip.rows)]
    if counts.all():
        return strip.p, weight
    return strip.p.masked_fill(~counts[..., None], 0.0), weight.masked_fill(~counts, 0.0)


def real_queries(problem: Problem, lengths: Tensor | None) -> Tensor | None:
    """[batch, query], True where a query is no pad."""
    if lengths is None:
        return None
    batch = problem.q.shape[0]
    if lengths.shape != (batch,):
        raise ValueError(f"expected lengths [batch] = ({batch},), received {tuple(lengths.shape)}")
    position = torch.arange(problem.n_queries, device=problem.q.device) + problem.offset
    return position[None, :] < lengths.to(problem.q.device)[:, None]
