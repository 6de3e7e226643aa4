"""Finds the heads whose scores are so large that float32 is not exact enough."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phaselens.attention._problem import Problem

TOLERANCE = 1e-5
"""Largest error from float32 in a weight (a fraction of 1) or an entropy (nats)."""


def large_heads(problem: Problem, lse: Tensor) -> list[tuple[int, int]]:
    """Return the batch row and head of each that `needs_float64`: all that a statistic reads on the host."""
    return [(batch, head) for batch, head in needs_float64(problem, lse).nonzero().tolist()]


def needs_float64(problem: Problem, lse: Tensor) -> Tensor:
    """Return bool [batch, head]: True where the error in `compute_dtype` could exceed `TOLERANCE`.

    The error of a dot product of n terms, each rounded to u = 2⁻²⁴ of itself, is a random walk: a fraction of u·B where
    the terms cancel, with B = scale·max‖q‖·max‖k‖ the bound of every score (Cauchy–Schwarz), plus a fraction of
    u·√n·|s| where they add up to a large score s. Scores that matter are near the row's log-sum-exp, so max |lse|
    replaces s. The factors 0.8 and 0.25 cover the largest errors measured on scores of many shapes
    (tools/bench/precision.py). Heads with a query or key that is not finite are marked too.
    """
    unit = torch.finfo(problem.compute_dtype).eps / 2
    norm_q, norm_k = (
        torch.linalg.vector_norm(x.to(problem.compute_dtype), dim=-1).amax(-1) for x in (problem.q, problem.k)
    )
    bound = norm_q * norm_k.repeat_interleave(problem.group, dim=1) * abs(problem.scale)
    row = lse.masked_fill(lse == -torch.inf, 0.0).abs().amax(-1)
    if problem.has_bias:
        large = torch.maximum(row, bound)
    elif problem.softcap is None:
        large = torch.minimum(row, bound)
    else:
        large = bound
    error: Tensor = unit * (0.8 * bound + 0.25 * math.sqrt(problem.q.shape[-1]) * large)
    return torch.logical_not(error <= TOLERANCE)
