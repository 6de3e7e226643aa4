"""Rank correlation of items such as heads, with ties, along the last axis of arrays, and its permutation p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from phaselens.errors import FloatArray, as_numbers, require_whole


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of `n` items, −1 to 1, and its two-sided p if the items of one side were in random
    order; both None if a side is constant or has fewer than three items, for the reason `reason`."""

    n: int
    value: float | None
    p_value: float | None
    reason: str = ""


def spearman(first: ArrayLike, second: ArrayLike) -> FloatArray:
    """Return Spearman's rank correlations [...] of first and second [..., item], as `scipy.stats.spearmanr` does.

    Equal values share their mean rank. NaN where a side is constant.

    Raises:
        ValueError: for arrays of two lengths.

    >>> spearman([1.0, 2.0, 3.0, 4.0], [[10.0, 20.0, 40.0, 30.0], [5.0, 5.0, 5.0, 5.0]]).tolist()
    [0.8, nan]
    """
    from scipy.stats import rankdata

    a, b = as_numbers("first", first), as_numbers("second", second)
    if not a.ndim or a.shape[-1:] != b.shape[-1:]:
        raise ValueError(
            f"expected first and second [..., item] of one length, received {a.shape} and {b.shape}"
        )
    mean_rank = (a.shape[-1] + 1) / 2
    deviations = [rankdata(side, axis=-1) - mean_rank for side in (a, b)]
    covariance = (deviations[0] * deviations[1]).sum(-1)
    scale = np.sqrt(np.square(deviations[0]).sum(-1) * np.square(deviations[1]).sum(-1))
    return np.asarray(
        np.divide(covariance, scale, out=np.full(np.shape(covariance), np.nan), where=scale > 0), np.float64
    )


def rank_correlation(
    first: ArrayLike, second: ArrayLike, *, n_permutations: int = 9_999, seed: int = 0
) -> RankCorrelation:
    """Return Spearman's rank correlation of first and second [item], and its p under random orders of the items.

    p counts the observed order among the drawn ones, so it is at least 1 / (n_permutations + 1). ValueError for arrays
    of two lengths, and for NaN or infinite values.

    >>> correlation = rank_correlation([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 3.0, 5.0, 4.0])
    >>> round(correlation.value, 2), correlation.n, 0.05 < correlation.p_value < 0.2
    (0.8, 5, True)
    """
    a, b = as_numbers("first", first), as_numbers("second", second)
    require_whole("n_permutations", n_permutations, 1)
    require_whole("seed", seed, 0)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected first and second [item] of one length, received {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("first or second has values that are NaN or infinite; leave these items out")
    if len(a) < 3:
        return RankCorrelation(len(a), None, None, f"{len(a)} items; a rank correlation needs at least 3")
    value = float(spearman(a, b))
    if np.isnan(value):
        return RankCorrelation(len(a), None, None, "all items of one side are equal")
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(b, (n_permutations, 1)), axis=1)
    # Orders that tie with the observed one up to rounding count as extreme.
    n_extreme = int((np.abs(spearman(a, order)) >= abs(value) - 1e-12).sum())
    return RankCorrelation(len(a), value, (1 + n_extreme) / (1 + n_permutations))
