"""Bounds that one large row sets on a spectrum, and the check that a spectrum keeps to them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from phaselens.errors import require_kind, require_number
from phaselens.spectrum._entropy import CHUNK, Spectrum
from phaselens.spectrum._rows import CACHED_ROWS, chunks, require_matrix


class Bound(NamedTuple):
    """Bounds set by row 0 alone: p₁ ≥ `anisotropy`, H ≤ `entropy` (NaN where there is no bound).

    `ratio` c is ‖x₀‖² over the energy R of the other rows, `alignment` α the share of R along x₀.
    """

    anisotropy: float
    entropy: float
    ratio: float
    alignment: float


def compression_bound(x: Tensor) -> Bound:
    """Return the `Bound` that row 0 of x [pos, d_model] sets; NaN if row 0 or all other rows are zero or missing.

    p = (c + α) / (c + 1) bounds p₁ from below, and −p ln p − (1−p) ln(1−p) + (1−p) ln(r−1) bounds the entropy from
    above where p ≥ 1/r, r = min(pos, d_model). Queipo-de-Llano et al. 2025 (arXiv:2510.06477), theorem 1.

    >>> bound = compression_bound(torch.tensor([[10.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]]))
    >>> round(bound.anisotropy, 6), round(bound.entropy, 6)
    (0.962264, 0.186837)
    """
    require_matrix("x", x)
    missing = Bound(math.nan, math.nan, math.nan, math.nan)
    if len(x) < 2:
        return missing
    row_0 = x[0].double()
    energy = float(row_0.square().sum())
    other_energy, aligned_energy = 0.0, 0.0
    for rows in chunks(x[1:], CACHED_ROWS if x.device.type == "cpu" else CHUNK):
        wide = rows.double()
        other_energy += float(torch.linalg.vector_norm(wide).square())
        aligned_energy += float((wide @ row_0).square().sum())
    if not (0 < energy < math.inf and 0 < other_energy < math.inf):
        return missing
    ratio, alignment = energy / other_energy, aligned_energy / energy / other_energy
    p, r = (ratio + alignment) / (ratio + 1), min(x.shape)
    if r < 2 or p < 1 / r:
        return Bound(p, math.nan, ratio, alignment)
    spread = (1 - p) * math.log(r - 1) - (1 - p) * math.log(1 - p) if p < 1 else 0.0
    return Bound(p, -p * math.log(p) + spread, ratio, alignment)


def require_bound(spectrum: Spectrum, bound: Bound, *, tolerance: float = 1e-6) -> None:
    """Raise ArithmeticError if `spectrum` breaks its `bound` by more than `tolerance`: one of them must be wrong."""
    require_kind("spectrum", spectrum, Spectrum, "from spectrum or spectra")
    require_kind("bound", bound, Bound, "from compression_bound")
    require_number("tolerance", tolerance, 0)
    if bound.anisotropy > spectrum.anisotropy * (1 + tolerance):
        raise ArithmeticError(f"p1 = {spectrum.anisotropy:.9g} is below its bound {bound.anisotropy:.9g}")
    if spectrum.entropy > bound.entropy * (1 + tolerance) + tolerance * 1e-3 + spectrum.error:
        raise ArithmeticError(f"entropy = {spectrum.entropy:.9g} nats is above its bound {bound.entropy:.9g}")
