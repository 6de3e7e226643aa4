"""Where float32 is not enough: the heads whose scores are so large that their rounding shows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phaselens.attention._problem import Problem

TOLERANCE = 1e-5
"""Error of a weight or an entropy, in fractions of 1 and in nats, that float32 may make."""


def beyond_single(problem: Problem, lse: Tensor) -> Tensor:
    """bool [batch, head]: True where the accumulating dtype could miss by more than `TOLERANCE`.

    A dot product of n terms, each rounded to u = 2⁻²⁴ of itself, is wrong by a random walk: by a part of
    u·B where its terms cancel, with B = scale·max‖q‖·max‖k‖ the bound of every score (Cauchy–Schwarz), and
    by a part of u·√n·|s| on top where they pile up to a large score s. Scores that matter lie near the
    row's log-sum-exp, so max |lse| stands for s. The factors 0.8 and 0.25 cover the worst that was measured
    on scores of many shapes (tools/bench/precision.py).
    Heads with a query or key that is not finite are marked too.
    """
    unit = torch.finfo(problem.accumulate).eps / 2
    norm_q, norm_k = (
        torch.linalg.vector_norm(x.to(problem.accumulate), dim=-1).amax(-1) for x in (problem.q, problem.k)
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
