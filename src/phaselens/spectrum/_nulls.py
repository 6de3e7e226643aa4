"""What chance alone would give activations: Gaussian coordinates, rows in random directions. Closed forms, no sampling.

Every number here stands beside a measured one and is made from the same shape or norms. numpy and scipy only; the
nulls of attention are in `phaselens.attention`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phaselens.errors import InputError, as_numbers, require_number, require_whole

Floats = NDArray[np.float64]

_MEDIAN_ABS = 0.6744897501960817
"""Median of |z| for a standard normal z."""
_BINS = 64
"""Row norms are taken one by one up to this many, then in bins of neighbours."""
_ALONE = 16
"""The largest norms, which are never put into a bin with others."""


def gaussian_max_ratio(n: int) -> float:
    """Expected largest |coordinate| of `n` independent Gaussian ones, over their median |coordinate|.

    ∫ 1 − F(x)ⁿ dx of the half-normal F, over its median. NaN for n = 0.

    >>> round(gaussian_max_ratio(1_000_000), 2)
    7.41
    """
    require_whole("n", n, 0)
    return _gaussian_max_ratio(n)


@lru_cache(maxsize=4096)
def _gaussian_max_ratio(n: int) -> float:
    from scipy.special import erfc

    if n < 1:
        return float("nan")
    x = np.linspace(1e-3, 12.0, 12_000)
    over = -np.expm1(n * np.log1p(-erfc(x / np.sqrt(2))))
    return float(np.trapezoid(over, x) + x[0]) / _MEDIAN_ABS


def gaussian_exceedance(n: int, median: float, threshold: float, ratio: float) -> float:
    """Expected number of `n` Gaussian coordinates of that median |coordinate| that exceed both `threshold` and
    `ratio` · median. NaN where the median is.

    >>> gaussian_exceedance(10**6, 1.0, 100.0, 1000.0)
    0.0
    """
    from scipy.special import erfc

    require_whole("n", n, 0)
    require_number("median", median, or_nan=True)
    require_number("threshold", threshold, 0)
    require_number("ratio", ratio, 0)
    if not median > 0:
        return 0.0 if median == 0 else float("nan")
    return float(n * erfc(max(threshold, ratio * median) * _MEDIAN_ABS / median / np.sqrt(2)))


class Chance(NamedTuple):
    """Entropy in nats and share of the first direction, p₁."""

    entropy: float
    first: float


def random_rows(norms: ArrayLike, d: int) -> Chance:
    """norms [pos] → the matrix entropy and p₁ that rows of these norms have if each points in a random direction
    of `d` dimensions.

    From the self-consistent equation of the resolvent (Marchenko & Pastur 1967; Silverstein 1995), so right up
    to terms of order 1/d; a simulation scatters by as much. NaN where there is no row with a norm.

    >>> found = random_rows(np.ones(512), 512)
    >>> round(found.entropy, 2), round(found.first * 512, 2)
    (5.74, 4.0)
    """
    require_whole("d", d, 0)
    squares = as_numbers("norms", norms) ** 2
    if squares.ndim != 1:
        raise InputError(f"expected norms [pos], received shape {squares.shape}")
    total = float(squares.sum())
    if not 0 < total < float("inf") or d < 1:
        return Chance(float("nan"), float("nan"))
    weight, count = _binned(squares * (d / total))
    if len(squares) == 1 or d == 1:
        return Chance(0.0, 1.0)
    return Chance(_entropy(weight, count, d), _first(weight, count, d))


def _binned(squares: Floats) -> tuple[Floats, Floats]:
    """Values, largest first, and how often each occurs: neighbours share their mean."""
    squares = np.sort(squares[squares > 0])[::-1]
    if len(squares) <= _BINS:
        return squares, np.ones(len(squares))
    parts = np.array_split(squares[_ALONE:], _BINS - _ALONE)
    weight = np.concatenate([squares[:_ALONE], [part.mean() for part in parts]])
    count = np.concatenate([np.ones(_ALONE), [float(len(part)) for part in parts]])
    return weight, count


def _entropy(weight: Floats, count: Floats, d: int) -> float:
    """ln d − (1/d) Σ λ ln λ for eigenvalues of mean 1, from λ ln λ = ∫ λ/(1+s) − λ/(λ+s) ds over s = exp(t)."""
    step = 0.5
    s = np.exp(np.arange(-34.0, np.log(weight[0] + 1.0) + 34.0, step))
    share = count[:, None] / d
    # m(−s), the mean of 1/(λ+s): Newton from below on an increasing concave function, so it never overshoots.
    m = np.maximum(1.0 / (1.0 + s), max(0.0, 1.0 - count.sum() / d) / s)
    for _ in range(200):
        pull = 1.0 + weight[:, None] * m
        value = s * m + (share * weight[:, None] * m / pull).sum(0) - 1.0
        slope = s + (share * weight[:, None] / pull**2).sum(0)
        change = -value / slope
        m = m + np.maximum(change, 0.0)
        if (change <= 1e-14 * m).all():
            break
    scaled = weight[:, None] * m
    mass = (share * scaled / (1.0 + scaled)).sum(0)  # the mean of λ/(λ+s)
    mean_log = float(((1.0 / (1.0 + s) - mass) * s).sum() * step)
    return float(np.log(d)) - mean_log


def _first(weight: Floats, count: Floats, d: int) -> float:
    """The largest eigenvalue's share: that of a row which stands out from the rest, or the edge of the bulk."""

    def place(x: float, rest: int) -> float:
        w, n = weight[rest:], count[rest:]
        return 1.0 / x + float((n * w / (1.0 - w * x)).sum()) / d

    def slope(x: float, rest: int) -> float:
        w, n = weight[rest:], count[rest:]
        return -1.0 / x**2 + float((n * (w / (1.0 - w * x)) ** 2).sum()) / d

    for alone in range(min(_ALONE, len(weight)), 0, -1):
        is_apart = alone == len(weight) or weight[alone] < weight[alone - 1]
        if is_apart and slope(1.0 / weight[alone - 1], alone) < 0:
            return float(min(place(1.0 / weight[0], alone) / d, 1.0))
    low, high = 0.0, 1.0 / weight[0]
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle, 0) < 0 else (low, middle)
    return float(min(place(low, 0) / d, 1.0))
