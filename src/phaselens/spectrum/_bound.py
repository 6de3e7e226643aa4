"""What one large row guarantees of a spectrum, and the check that a spectrum keeps to it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.errors import require_kind, require_number
from phaselens.spectrum._entropy import CHUNK, Spectrum, chunks
from phaselens.spectrum._rows import require_matrix

_ROWS = 128
"""Rows widened to float64 at a time, so that they stay in a CPU's cache."""


class Bound(NamedTuple):
    """What row 0 alone guarantees: p₁ ≥ `anisotropy`, H ≤ `entropy` (NaN where the bound says nothing).

    `ratio` c is ‖x₀‖² over the others' energy R, `alignment` α the share of R along x₀.
    """

    anisotropy: float
    entropy: float
    ratio: float
    alignment: float


def compression_bound(x: Tensor) -> Bound:
    """x [pos, d_model] → the `Bound` that its row 0 sets; NaN where row 0 or all others are zero or missing.

    p = (c + α) / (c + 1) bounds p₁ from below, and −p ln p − (1−p) ln(1−p) + (1−p) ln(r−1) bounds the entropy from
    above where p ≥ 1/r, r = min(pos, d_model). Queipo-de-Llano et al. 2025 (arXiv:2510.06477), theorem 1.

    >>> found = compression_bound(torch.tensor([[10.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]]))
    >>> round(found.anisotropy, 6), round(found.entropy, 6)
    (0.962264, 0.186837)
    """
    require_matrix("x", x)
    missing = Bound(math.nan, math.nan, math.nan, math.nan)
    if len(x) < 2:
        return missing
    first = x[0].double()
    energy = float(first.square().sum())
    others, along = 0.0, 0.0
    for rows in chunks(x[1:], _ROWS if x.device.type == "cpu" else CHUNK):
        wide = rows.double()
        others += float(torch.linalg.vector_norm(wide).square())
        along += float((wide @ first).square().sum())
    if not (0 < energy < math.inf and 0 < others < math.inf):
        return missing
    ratio, alignment = energy / others, along / energy / others
    p, r = (ratio + alignment) / (ratio + 1), min(x.shape)
    if r < 2 or p < 1 / r:
        return Bound(p, math.nan, ratio, alignment)
    spread = (1 - p) * math.log(r - 1) - (1 - p) * math.log(1 - p) if p < 1 else 0.0
    return Bound(p, -p * math.log(p) + spread, ratio, alignment)


def require_bound(found: Spectrum, bound: Bound, *, tolerance: float = 1e-6) -> None:
    """Raise ArithmeticError if `found` breaks its own `bound` by more than `tolerance`: then a number is wrong."""
    require_kind("found", found, Spectrum, "from spectrum or spectra")
    require_kind("bound", bound, Bound, "from compression_bound")
    require_number("tolerance", tolerance, 0)
    if bound.anisotropy > found.anisotropy * (1 + tolerance):
        raise ArithmeticError(f"p1 = {found.anisotropy:.9g} is below its bound {bound.anisotropy:.9g}")
    if found.entropy > bound.entropy * (1 + tolerance) + tolerance * 1e-3 + found.error:
        raise ArithmeticError(f"entropy = {found.entropy:.9g} nats is above its bound {bound.entropy:.9g}")
