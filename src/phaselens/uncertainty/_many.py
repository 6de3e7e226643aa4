"""Paired comparison of many quantities at once, such as one per layer, each with its own missing texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from phaselens.uncertainty._bootstrap import N_RESAMPLES
from phaselens.uncertainty._paired import (
    IntervalOptions,
    Paired,
    as_table,
    paired,
    require_same_texts,
    weighted_mean,
)

_NO_TEXT = "no text has both values"


@dataclass(frozen=True)
class PairedComparison:
    """One quantity measured twice on the same texts. Fields that are None have their reason in `reasons`."""

    n_texts: int
    """The number of texts with both values; the others are left out of everything."""
    first: float | None
    second: float | None
    """Means over texts."""
    difference: float | None
    """second − first; ci_low … ci_high is its interval over texts."""
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    """Two-sided p, under exchange of the two values within each text."""
    p_exact: bool | None
    """Whether all exchanges were tried, rather than a random sample of them."""
    d_z: float | None
    """difference divided by the sd (n − 1) of the texts' differences."""
    rank_biserial: float | None
    """Matched pairs, −1 to 1 (Kerby 2014)."""
    reasons: Mapping[str, str]


def compare_paired(
    first: ArrayLike,
    second: ArrayLike,
    *,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    n_permutations: int = 9999,
    seed: int = 0,
) -> list[PairedComparison]:
    """Compare first and second [text, quantity] column by column; a NaN is a missing value.

    The unit is the text, and each text counts once. A column depends on its own texts alone: neither other columns nor
    texts in which it is missing change it. Interval and p as in `compare_arms`.

    Raises:
        InputError: for arrays of other shapes, or options out of range.

    >>> by_layer = compare_paired([[1.0, 5.0], [1.1, 5.0], [0.9, float("nan")]], [[2.0, 5.0], [2.2, 5.0], [1.9, 4.0]])
    >>> [comparison.n_texts for comparison in by_layer], round(by_layer[0].difference, 4), by_layer[1].difference
    ([3, 2], 1.0333, 0.0)
    """
    options = IntervalOptions(confidence, n_resamples, n_permutations, seed)
    values = [as_table(first, "first", "text", "quantity"), as_table(second, "second", "text", "quantity")]
    require_same_texts(first=values[0], second=values[1])
    if values[0].shape != values[1].shape:
        raise ValueError(f"first has {values[0].shape[1]} quantities, second {values[1].shape[1]}")
    is_present = np.isfinite(values[0]) & np.isfinite(values[1])
    comparisons: dict[int, PairedComparison] = {}
    # Columns with the same texts share their draws.
    patterns, pattern_of_column = np.unique(is_present, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        columns = np.flatnonzero(pattern_of_column.reshape(-1) == number)
        if not pattern.any():
            comparisons.update((int(column), _missing()) for column in columns)
            continue
        pair = [table[np.ix_(pattern, columns)] for table in values]
        scale = np.maximum(np.abs(pair[0]).max(0), np.abs(pair[1]).max(0))
        weights = np.ones(int(pattern.sum()))
        statistics = paired(pair[1] - pair[0], weights, scale, options)
        for index, column in enumerate(columns):
            first_mean, second_mean = (
                weighted_mean(table[:, index], weights / weights.sum()) for table in pair
            )
            comparisons[int(column)] = _comparison(len(weights), first_mean, second_mean, statistics[index])
    return [comparisons[column] for column in range(is_present.shape[1])]


def _comparison(n_texts: int, first: float, second: float, statistics: Paired) -> PairedComparison:
    names = {"low": "ci_low", "high": "ci_high"}
    return PairedComparison(
        n_texts,
        first,
        second,
        difference=statistics.mean,
        ci_low=statistics.low,
        ci_high=statistics.high,
        p_value=statistics.p_value,
        p_exact=statistics.p_exact,
        d_z=statistics.d_z,
        rank_biserial=statistics.rank_biserial,
        reasons={names.get(name, name): reason for name, reason in statistics.reasons.items()},
    )


def _missing() -> PairedComparison:
    names = [name for name in PairedComparison.__dataclass_fields__ if name not in ("n_texts", "reasons")]
    missing = dict.fromkeys(names)
    return PairedComparison(0, **missing, reasons=dict.fromkeys(names, _NO_TEXT))
