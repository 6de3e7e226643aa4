"""Null values of activation statistics: Gaussian coordinates, rows in random directions.

Each null is computed from the shape or norms of the activations that it is compared with, in closed form where there is
one. numpy and scipy only; the nulls of attention are in `phaselens.attention`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from phaselens.errors import FloatArray, InputError, as_numbers, require_number, require_whole

_MEDIAN_ABS = 0.6744897501960817
"""Median of |z| for a standard normal z."""
_N_BINS = 64
"""Largest number of rows whose norms are used one by one; beyond it, neighbours are binned."""
_N_UNBINNED = 16
"""Number of largest norms that are never binned."""
_N_DRAWS = 256
"""Number of drawn directions of a few leading rows, whose largest eigenvalue has no closed form."""


def gaussian_max_ratio(n: int) -> float:
    """Return the expected largest |coordinate| of `n` independent Gaussian coordinates over their median |coordinate|.

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
        return math.nan
    x = np.linspace(1e-3, 12.0, 12_000)
    exceedance = -np.expm1(n * np.log1p(-erfc(x / np.sqrt(2))))
    return float(np.trapezoid(exceedance, x) + x[0]) / _MEDIAN_ABS


def gaussian_exceedance(n: int, median: float, threshold: float, ratio: float) -> float:
    """Return the expected number of `n` Gaussian coordinates above `threshold` and `ratio` · median.

    `median` is that of their absolute values; NaN if it is NaN.

    >>> gaussian_exceedance(10**6, 1.0, 100.0, 1000.0)
    0.0
    """
    from scipy.special import erfc

    require_whole("n", n, 0)
    require_number("median", median, or_nan=True)
    require_number("threshold", threshold, 0)
    require_number("ratio", ratio, 0)
    if not median > 0:
        return 0.0 if median == 0 else math.nan
    return float(n * erfc(max(threshold, ratio * median) * _MEDIAN_ABS / median / np.sqrt(2)))


class NullSpectrum(NamedTuple):
    """Entropy in nats, and anisotropy p₁, the share of the first direction."""

    entropy: float
    anisotropy: float


def random_rows(norms: ArrayLike, d: int) -> NullSpectrum:
    """Return the matrix entropy and p₁ of rows with these norms [pos] in random directions of `d` dimensions.

    From the self-consistent equation of the resolvent (Marchenko & Pastur 1967; Silverstein 1995). Entropy is exact up
    to terms of order 1/d. p₁ is the share of the leading row, or rows of nearly the same norm, above the spectrum of
    the others; where more than 16 rows belong to it, it is the upper edge of the spectrum, around which a simulation
    scatters by its distance from the norm, times the number of these rows to the power −2/3. NaN where all norms are 0.

    Raises:
        InputError: unless norms are [pos].

    >>> null = random_rows(np.ones(512), 512)
    >>> round(null.entropy, 2), round(null.anisotropy * 512, 2)
    (5.74, 4.0)
    """
    require_whole("d", d, 0)
    squares = as_numbers("norms", norms) ** 2
    if squares.ndim != 1:
        raise InputError(f"expected norms [pos], received shape {squares.shape}")
    total = float(squares.sum())
    if not 0 < total < math.inf or d < 1:
        return NullSpectrum(math.nan, math.nan)
    weight, count = _binned(squares * (d / total))
    if len(weight) == 1 or d == 1:
        return NullSpectrum(0.0, 1.0)
    # Terms of order 1/d can pass the limits that every spectrum keeps.
    return NullSpectrum(
        max(_entropy(weight, count, d), 0.0), float(min(_largest_share(weight, count, d), 1.0))
    )


def _binned(squares: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return (values, counts), largest values first; binned neighbours are replaced by their mean."""
    squares = np.sort(squares[squares > 0])[::-1]
    if len(squares) <= _N_BINS:
        return squares, np.ones(len(squares))
    smaller = squares[_N_UNBINNED:]
    # Equal numbers of neighbours in each bin, but none that differ by more than a factor of 2.
    part = np.arange(len(smaller)) * (_N_BINS - _N_UNBINNED) // len(smaller)
    starts = np.flatnonzero(np.diff(part) | np.diff(np.frexp(smaller)[1])) + 1
    bins = np.split(smaller, starts)
    weight = np.concatenate([squares[:_N_UNBINNED], [values.mean() for values in bins]])
    count = np.concatenate([np.ones(_N_UNBINNED), [float(len(values)) for values in bins]])
    return weight, count


def _entropy(weight: FloatArray, count: FloatArray, d: int) -> float:
    """Return ln d − (1/d) Σ λ ln λ for eigenvalues of mean 1, from λ ln λ = ∫ λ/(1+s) − λ/(λ+s) ds over s = exp(t)."""
    step = 0.5
    s = np.exp(np.arange(-34.0, np.log(weight[0] + 1.0) + 34.0, step))
    share = count[:, None] / d
    # m(−s), the mean of 1/(λ+s): Newton from below on an increasing concave function never overshoots.
    m = np.maximum(1.0 / (1.0 + s), max(0.0, 1.0 - count.sum() / d) / s)
    for _ in range(200):
        denominator = 1.0 + weight[:, None] * m
        value = s * m + (share * weight[:, None] * m / denominator).sum(0) - 1.0
        slope = s + (share * weight[:, None] / denominator**2).sum(0)
        change = -value / slope
        m = m + np.maximum(change, 0.0)
        if (change <= 1e-14 * m).all():
            break
    scaled = weight[:, None] * m
    mass = (share * scaled / (1.0 + scaled)).sum(0)  # the mean of λ/(λ+s)
    mean_log = float(((1.0 / (1.0 + s) - mass) * s).sum() * step)
    return float(np.log(d)) - mean_log


def _largest_share(weight: FloatArray, count: FloatArray, d: int) -> float:
    """Return the largest eigenvalue's share: a row's outside the bulk of the spectrum, or the edge of the bulk."""

    def eigenvalue(x: float, n_outliers: int) -> float:
        w, n = weight[n_outliers:], count[n_outliers:]
        return 1.0 / x + float((n * w / (1.0 - w * x)).sum()) / d

    def slope(x: float, n_outliers: int) -> float:
        w, n = weight[n_outliers:], count[n_outliers:]
        return -1.0 / x**2 + float((n * (w / (1.0 - w * x)) ** 2).sum()) / d

    # The smallest group of leading rows that lies outside the spectrum of the others.
    for n_outliers in range(1, min(_N_UNBINNED + 1, len(weight))):
        smallest = weight[n_outliers - 1]
        if weight[n_outliers] < smallest and slope(1.0 / smallest, n_outliers) < 0:
            largest = _largest_of_few(weight[:n_outliers], d)
            return eigenvalue(1.0 / largest, n_outliers) / d
    low, high = 0.0, 1.0 / weight[0]
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle, 0) < 0 else (low, middle)
    return eigenvalue(low, 0) / d


def _largest_of_few(squares: FloatArray, d: int) -> float:
    """Return the expected largest eigenvalue of the Gram matrix of a few rows with these squared norms.

    A mean over directions that are drawn from the same seed each time.
    """
    n = len(squares)
    if n == 1:
        return float(squares[0])
    rng = np.random.default_rng(0)
    # The triangular factor of n Gaussian rows, by its distribution (Bartlett 1933).
    factor = np.tril(rng.standard_normal((_N_DRAWS, n, n)), -1)[:, :, :d]
    diagonal = np.arange(min(n, d))
    factor[:, diagonal, diagonal] = np.sqrt(rng.chisquare(d - diagonal, (_N_DRAWS, len(diagonal))))
    rows = factor * (np.sqrt(squares) / np.linalg.norm(factor, axis=2))[:, :, None]
    return float(np.linalg.eigvalsh(rows @ rows.transpose(0, 2, 1))[:, -1].mean())
