"""Bootstrap intervals of means over texts, with the text as the unit.

Texts are the independent units; heads, layers and tokens of one text are not. All cells (layers × heads, models)
therefore share one draw of texts, so that cells can be compared with each other, and differences between models are
computed text by text. Pure numpy: `scipy.stats.bootstrap(method="percentile")` computes the same numbers for the
same draws, but would store n_resamples × texts × cells values at once.

Few texts have few resamples: where there are at most `n_resamples` different ones, all of them are used, each with
its probability, and the interval is exact and independent of the seed. For more texts, `n_resamples` are drawn. With
10,000 draws an end of a 95 % interval of a roughly normal mean has a standard error of 0.027 standard errors of the
mean, 1.4 % of half the interval's width (0.060 and 3 % with 2,000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phaselens.errors import (
    FloatArray,
    InputError,
    as_numbers,
    require_function,
    require_number,
    require_whole,
    short_form,
)

Masked: TypeAlias = "np.ma.MaskedArray[Any, np.dtype[np.float64]]"
"""An array whose missing entries are masked; `.tolist()` returns None for them."""

Interval: TypeAlias = tuple[Masked, Masked, Masked]
"""(mean, low, high)."""

FEWEST_TEXTS = 2
"""Fewest texts that have an interval; with fewer, `low` and `high` are missing."""

N_RESAMPLES = 10_000
"""Default number of resamples: all resamples of up to 8 texts, and draws for more."""

_MAX_MEANS = 1 << 22
"""Largest number of resampled means held at a time."""
_MAX_DRAWN = 1 << 22
"""Largest number of draws of texts held at a time."""
_MAX_COUNTS = 1 << 24
"""Largest number of counts of draws held, by resample and text."""
_MANY_TEXTS = 100
"""Up to so many texts, all draws are held, whatever their number."""
_ROUNDING = 1e-12
"""Relative rounding that is allowed where a sum of probabilities is compared with a tail."""


def require_confidence(confidence: float) -> None:
    """Raise InputError unless `confidence` is strictly between 0 and 1."""
    require_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise InputError(f"expected a confidence between 0 and 1, received {confidence}")


def require_draws(confidence: float, n_resamples: int, seed: int) -> None:
    """Raise InputError for a confidence, number of resamples or seed that cannot be used."""
    require_confidence(confidence)
    require_whole("n_resamples", n_resamples, 1)
    require_whole("seed", seed, 0)


def mean_interval(
    values: ArrayLike,
    *,
    present: ArrayLike | None = None,
    transform: Callable[[FloatArray], FloatArray] | None = None,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the means over texts of many cells at once, with percentile bootstrap intervals: (mean, low, high).

    `values` [text, *cells] can have any unit, which the results share; `present` (same shape) is False where
    a value is missing, and `values` is then ignored. The results [*cells] are masked where they are undefined: the mean
    without any text, low and high with fewer than two. The results of a cell depend on its own present texts only.

    `transform` maps means [..., *cells] to the reported values [..., *reported] (a threshold, a share of heads);
    the interval is then that of the transformed mean. Texts without any value are left out. Texts with some values
    missing cannot be transformed and raise ValueError, and so do NaN or infinite values.

    Where there are at most `n_resamples` resamples of the texts (by default for up to 8 texts), all are used, and
    neither their order nor `seed` matters; otherwise `n_resamples` are drawn. Efron 1979; Efron & Tibshirani 1993,
    chapter 13 (percentile interval).

    >>> mean, low, high = mean_interval([[0.1, 3.0], [0.3, 3.0], [0.2, 3.0]])
    >>> mean.round(3).tolist(), low.tolist()[1], high.tolist()[1]
    ([0.2, 3.0], 3.0, 3.0)
    >>> mean, low, high = mean_interval([[0.5]])
    >>> mean.tolist(), low.tolist()
    ([0.5], [None])
    """
    table, is_present = _checked(values, present)
    require_draws(confidence, n_resamples, seed)
    if transform is not None:
        require_function("transform", transform)
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    if transform is not None:
        return _transformed(table, is_present, transform, tails, n_resamples, seed)

    cells = table.shape[1:]
    if not len(table):
        return _missing(*cells), _missing(*cells), _missing(*cells)
    flat, flat_present = table.reshape(len(table), -1), is_present.reshape(len(table), -1)
    intervals = _missing(3, flat.shape[1])
    # Cells with the same present texts share their resamples.
    patterns, pattern_numbers = np.unique(flat_present, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if not pattern.any():
            continue
        columns = np.flatnonzero(pattern_numbers.reshape(-1) == number)
        resampled = (
            resamples(int(pattern.sum()), n_resamples, seed, redraw=True)
            if pattern.sum() >= FEWEST_TEXTS
            else None
        )
        step = len(columns) if resampled is None else max(1, _MAX_MEANS // resampled.n)
        for start in range(0, len(columns), step):
            batch = columns[start : start + step]
            sample = flat[np.ix_(pattern, batch)]
            intervals[0, batch] = _mean(sample)
            if resampled is not None:
                means = _resampled(sample, resampled)
                intervals[1:, batch] = resampled.quantiles(means, tails)
    mean, low, high = (interval.reshape(cells) for interval in intervals)
    return mean, low, high


def paired_interval(
    first: ArrayLike,
    second: ArrayLike,
    *,
    present: ArrayLike | None = None,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean over texts of first − second, both [text, *cells] on the same texts: (mean, low, high).

    `present` is True where both have a value. Masking, units and errors as in `mean_interval`.

    >>> mean, low, high = paired_interval([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    >>> round(float(mean), 3), round(float(low), 3), round(float(high), 3)
    (0.1, 0.1, 0.1)
    """
    a, b = as_numbers("first", first), as_numbers("second", second)
    if a.shape != b.shape:
        raise ValueError(f"expected two arrays of one shape [text, *cells], received {a.shape} and {b.shape}")
    is_present = _as_mask(present, a.shape)
    if is_present.shape == a.shape:
        a, b = np.where(is_present, a, 0.0), np.where(is_present, b, 0.0)
    return mean_interval(a - b, present=is_present, confidence=confidence, n_resamples=n_resamples, seed=seed)


def _checked(values: ArrayLike, present: ArrayLike | None) -> tuple[FloatArray, NDArray[np.bool_]]:
    table = as_numbers("values", values)
    if table.ndim < 1:
        raise ValueError("expected values [text, *cells], received a single number")
    is_present = _as_mask(present, table.shape)
    if is_present.shape != table.shape:
        raise ValueError(f"expected present of the values' shape {table.shape}, received {is_present.shape}")
    is_invalid = ~np.isfinite(table) & is_present
    if is_invalid.any():
        raise ValueError(
            f"{int(is_invalid.sum())} of {int(is_present.sum())} values are NaN or infinite; mark them as not present, "
            "and report the reason"
        )
    return np.where(is_present, table, 0.0), is_present


def _as_mask(present: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if present is None:
        return np.ones(shape, bool)
    mask = np.asarray(present)
    if mask.dtype.kind not in "biuf":
        raise InputError(f"expected present as an array of True and False, received {short_form(present)}")
    return mask.astype(bool)


def _missing(*shape: int) -> Masked:
    return np.ma.MaskedArray(np.zeros(shape), mask=True)


@dataclass(frozen=True)
class Resamples:
    """Resamples of texts: `counts` [resample, text] has the number of times each text is in each resample.

    `probabilities` [resample] are those of all possible resamples, and None for draws. Of very many texts, `counts` is
    empty, and `redrawn` has the number and the seed of the draws, which are drawn again for each use.
    """

    counts: FloatArray
    probabilities: FloatArray | None
    redrawn: tuple[int, int] | None = None

    @property
    def n(self) -> int:
        """The number of resamples."""
        return len(self.counts) if self.redrawn is None else self.redrawn[0]

    def quantiles(self, values: FloatArray, tails: tuple[float, float]) -> tuple[FloatArray, FloatArray]:
        """Return the (lower, upper) quantiles [...] of values [..., resample]; for draws as in `numpy.quantile`."""
        if self.probabilities is None:
            return _quantile(values, tails[0]), _quantile(values, tails[1])
        order = np.argsort(values, axis=-1)
        ascending = np.take_along_axis(values, order, -1)
        cumulative = np.cumsum(self.probabilities[order], axis=-1)
        low, high = tails[0] * (1 - _ROUNDING), 1 - (1 - tails[1]) * (1 - _ROUNDING)
        lower_index = (cumulative < low).sum(-1, keepdims=True)
        upper_index = (cumulative <= high).sum(-1, keepdims=True)
        lower = np.take_along_axis(ascending, lower_index, -1)[..., 0]
        upper = np.take_along_axis(ascending, upper_index, -1)[..., 0]
        return lower, upper


def _quantile(values: FloatArray, share: float) -> FloatArray:
    """Compute `numpy.quantile` along the last axis, at a fraction of its cost."""
    position = share * (values.shape[-1] - 1)
    lower_index = math.floor(position)
    upper_index = min(lower_index + 1, values.shape[-1] - 1)
    partitioned = np.partition(values, (lower_index, upper_index), axis=-1)
    low, high = partitioned[..., lower_index], partitioned[..., upper_index]
    quantile: FloatArray = low + (high - low) * (position - lower_index)
    return quantile


def resamples(n_texts: int, n_resamples: int, seed: int, *, redraw: bool = False) -> Resamples:
    """Return all resamples of `n_texts` texts if there are at most `n_resamples`, else `n_resamples` draws.

    With `redraw`, draws that would take much memory are drawn again for each use.
    """
    if redraw and n_texts * n_resamples > _MAX_COUNTS and n_texts > _MANY_TEXTS:
        return Resamples(np.empty((0, n_texts)), None, (n_resamples, seed))
    if math.comb(2 * n_texts - 1, n_texts) <= n_resamples:
        return _every_resample(n_texts)
    return Resamples(draws(n_texts, n_resamples, seed), None)


@lru_cache(maxsize=16)
def _every_resample(n_texts: int) -> Resamples:
    """Return each way to distribute `n_texts` draws among the texts, with its multinomial probability."""
    # Stars and bars: the gaps between the bars are the counts.
    n_places = 2 * n_texts - 1
    bars = np.array(list(combinations(range(n_places), n_texts - 1)), dtype=np.int64)
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, n_places)))
    counts = np.diff(edges, axis=1) - 1
    factorials = np.array([math.factorial(count) for count in range(n_texts + 1)], dtype=np.float64)
    probabilities = factorials[n_texts] / factorials[counts].prod(1) / float(n_texts) ** n_texts
    return Resamples(counts.astype(np.float64), probabilities)


def draws(n_texts: int, n_resamples: int, seed: int) -> FloatArray:
    """Return the number of times each text is drawn, [resample, text]."""
    counts = np.empty((n_resamples, n_texts))
    start = 0
    for block in _blocks_of_draws(n_texts, n_resamples, seed):
        counts[start : start + len(block)] = block
        start += len(block)
    return counts


def _blocks_of_draws(n_texts: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of `draws`, a few at a time: all of them take gigabytes for 100,000 texts."""
    rng = np.random.default_rng(seed)
    step = max(1, _MAX_DRAWN // n_texts)
    for start in range(0, n_resamples, step):
        n_rows = min(step, n_resamples - start)
        drawn = rng.integers(0, n_texts, (n_rows, n_texts)) + n_texts * np.arange(n_rows)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=n_rows * n_texts).reshape(n_rows, n_texts)


def _mean(sample: FloatArray) -> FloatArray:
    """Return the mean over texts, taken relative to one of them, so that texts that agree have no rounding error."""
    return np.asarray(sample[0] + (sample - sample[0]).mean(0), dtype=np.float64)


def _resampled(sample: FloatArray, resampled: Resamples) -> FloatArray:
    """Return the means [cell, resample] of the resampled texts of sample [text, cell]."""
    centre = sample[0]
    deviations = (sample - centre).T
    if resampled.redrawn is None:
        products = deviations @ resampled.counts.T
    else:
        blocks = _blocks_of_draws(len(sample), *resampled.redrawn)
        products = np.concatenate([deviations @ block.T.astype(np.float64) for block in blocks], axis=1)
    means = centre[:, None] + products / len(sample)
    return np.asarray(means, dtype=np.float64)


def _transformed(
    table: FloatArray,
    is_present: NDArray[np.bool_],
    transform: Callable[[FloatArray], FloatArray],
    tails: tuple[float, float],
    n_resamples: int,
    seed: int,
) -> Interval:
    cells = tuple(range(1, is_present.ndim))
    has_all, has_any = is_present.all(cells), is_present.any(cells)
    if (has_all != has_any).any():
        raise ValueError(
            f"{int((has_all != has_any).sum())} of {len(is_present)} texts have some values missing; "
            "a transformed mean needs all values of a text or none"
        )
    sample = table[has_all]
    reported = np.asarray(transform(table[:1]), dtype=np.float64).shape[1:] if len(table) else ()
    intervals = _missing(3, *reported)
    if len(sample):
        intervals[0] = np.asarray(transform(_mean(sample)), dtype=np.float64)
    if len(sample) >= FEWEST_TEXTS:
        resampled = resamples(len(sample), n_resamples, seed, redraw=True)
        flat = _resampled(sample.reshape(len(sample), -1), resampled)
        means = np.asarray(transform(flat.T.reshape(-1, *table.shape[1:])), dtype=np.float64)
        intervals[1:] = resampled.quantiles(np.ascontiguousarray(np.moveaxis(means, 0, -1)), tails)
    return intervals[0], intervals[1], intervals[2]
