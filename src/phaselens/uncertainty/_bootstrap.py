"""How sure a mean over texts is: bootstrap intervals whose unit is the text.

Texts are the independent units; heads, layers and tokens of one text are not. One draw of texts is therefore
shared by all cells (layers × heads, models), so that cells can be compared with each other, and differences
between models are taken text by text. Pure numpy: `scipy.stats.bootstrap(method="percentile")` gives the same
numbers for the same draws, but would hold n_resamples × texts × cells values at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phaselens.errors import InputError, require_number, require_whole

Masked: TypeAlias = "np.ma.MaskedArray[Any, np.dtype[np.float64]]"
"""An array whose missing entries are masked; `.tolist()` gives None for them."""

Interval: TypeAlias = tuple[Masked, Masked, Masked]
"""(mean, low, high)."""

FEWEST_TEXTS = 2
"""An interval needs at least this many texts; with fewer, `low` and `high` are missing."""

_CELLS_AT_ONCE = 4096


def require_draws(confidence: float, n_resamples: int, seed: int) -> None:
    """InputError for what says how to draw and cannot be used."""
    require_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise InputError(f"expected a confidence between 0 and 1, received {confidence}")
    if isinstance(n_resamples, int) and n_resamples < 1:
        raise InputError(f"expected at least 1 resample, received {n_resamples}")
    require_whole("n_resamples", n_resamples, 1)
    require_whole("seed", seed, 0)


def mean_interval(
    values: ArrayLike,
    *,
    present: ArrayLike | None = None,
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over texts of many cells at once, with its percentile bootstrap interval: (mean, low, high).

    `values` [text, *cells] are in any unit, which the answers share; `present` (same shape) is False where
    a value is missing, whatever `values` holds there. The answers [*cells] are masked where unknown: the mean
    without any text, low and high with fewer than two. A cell's answers depend on its own present texts only.

    `transform` maps means [..., *cells] to what is reported, [..., *reported] (a threshold, a share of
    heads): the interval is then that of the transformed mean. Texts without any value are left out; texts
    with some values missing cannot be transformed and raise ValueError, as do NaN or infinite values.

    Efron 1979; Efron & Tibshirani 1993, chapter 13 (percentile interval).

    >>> mean, low, high = mean_interval([[0.1, 3.0], [0.3, 3.0], [0.2, 3.0]])
    >>> mean.round(3).tolist(), low.tolist()[1], high.tolist()[1]
    ([0.2, 3.0], 3.0, 3.0)
    >>> mean, low, high = mean_interval([[0.5]])
    >>> mean.tolist(), low.tolist()
    ([0.5], [None])
    """
    table, there = _checked(values, present)
    require_draws(confidence, n_resamples, seed)
    if transform is not None and not callable(transform):
        raise InputError(f"expected transform as a function of means, received {transform!r}")
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    if transform is not None:
        return _transformed(table, there, transform, tails, n_resamples, seed)

    cells = table.shape[1:]
    if not len(table):
        return _missing(*cells), _missing(*cells), _missing(*cells)
    flat, seen = table.reshape(len(table), -1), there.reshape(len(table), -1)
    answers = _missing(3, flat.shape[1])
    patterns, which = np.unique(seen, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if not pattern.any():
            continue
        columns = np.flatnonzero(which.reshape(-1) == number)
        counts = draws(int(pattern.sum()), n_resamples, seed) if pattern.sum() >= FEWEST_TEXTS else None
        for start in range(0, len(columns), _CELLS_AT_ONCE):
            some = columns[start : start + _CELLS_AT_ONCE]
            sample = flat[np.ix_(pattern, some)]
            answers[0, some] = _mean(sample)
            if counts is not None:
                answers[1:, some] = _quantiles(_resampled(sample, counts), tails)
    return answers[0].reshape(cells), answers[1].reshape(cells), answers[2].reshape(cells)


def paired_interval(
    first: ArrayLike,
    second: ArrayLike,
    *,
    present: ArrayLike | None = None,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over texts of first − second, both [text, *cells] on the same texts: (mean, low, high).

    `present` is True where both have a value. Masking, units and errors as in `mean_interval`.

    >>> mean, low, high = paired_interval([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    >>> round(float(mean), 3), round(float(low), 3), round(float(high), 3)
    (0.1, 0.1, 0.1)
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"expected two arrays of one shape [text, *cells], received {a.shape} and {b.shape}")
    there = np.ones(a.shape, bool) if present is None else np.asarray(present, dtype=bool)
    if there.shape == a.shape:
        a, b = np.where(there, a, 0.0), np.where(there, b, 0.0)
    return mean_interval(a - b, present=there, confidence=confidence, n_resamples=n_resamples, seed=seed)


def _checked(values: ArrayLike, present: ArrayLike | None) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim < 1:
        raise ValueError("expected values [text, *cells], received a single number")
    there = np.ones(table.shape, bool) if present is None else np.asarray(present, dtype=bool)
    if there.shape != table.shape:
        raise ValueError(f"expected present of the values' shape {table.shape}, received {there.shape}")
    bad = ~np.isfinite(table) & there
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {int(there.sum())} values are NaN or infinite; mark them as not present, "
            "with a reason beside them"
        )
    return np.where(there, table, 0.0), there


def _missing(*shape: int) -> Masked:
    return np.ma.MaskedArray(np.zeros(shape), mask=True)


def draws(n_texts: int, n_resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each text is drawn, [resample, text]."""
    drawn = np.random.default_rng(seed).integers(0, n_texts, (n_resamples, n_texts))
    cell = drawn + n_texts * np.arange(n_resamples)[:, None]
    return (
        np.bincount(cell.reshape(-1), minlength=n_resamples * n_texts)
        .reshape(n_resamples, n_texts)
        .astype(np.float64)
    )


def _mean(sample: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over texts, taken around one of them: texts that agree give their value and no rounding."""
    return np.asarray(sample[0] + (sample - sample[0]).mean(0), dtype=np.float64)


def _resampled(sample: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means [resample, *cells] of the drawn texts."""
    centre = sample[0]
    means = centre + np.tensordot(counts, sample - centre, axes=1) / len(sample)
    return np.asarray(means, dtype=np.float64)


def _quantiles(means: NDArray[np.float64], tails: tuple[float, float]) -> NDArray[np.float64]:
    return np.asarray(np.quantile(means, tails, axis=0), dtype=np.float64)


def _transformed(
    table: NDArray[np.float64],
    there: NDArray[np.bool_],
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    tails: tuple[float, float],
    n_resamples: int,
    seed: int,
) -> Interval:
    whole, some = (there.reshape(len(there), -1).all(1), there.reshape(len(there), -1).any(1))
    if (whole != some).any():
        raise ValueError(
            f"{int((whole != some).sum())} of {len(there)} texts have some values missing; "
            "a transformed mean needs all values of a text or none"
        )
    sample = table[whole]
    reported = np.asarray(transform(table[:1]), dtype=np.float64).shape[1:] if len(table) else ()
    answers = _missing(3, *reported)
    if len(sample):
        answers[0] = np.asarray(transform(_mean(sample)), dtype=np.float64)
    if len(sample) >= FEWEST_TEXTS:
        means = _resampled(sample, draws(len(sample), n_resamples, seed))
        answers[1:] = _quantiles(np.asarray(transform(means), dtype=np.float64), tails)
    return answers[0], answers[1], answers[2]
