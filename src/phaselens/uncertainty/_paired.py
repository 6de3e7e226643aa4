"""Statistics of paired differences, one per text: interval, permutation p and effect sizes, for many columns.

Every column (a condition) is computed separately, on the same draws of texts and signs, so the results of one do not
depend on the number or order of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from phaselens.errors import FloatArray, as_numbers, require_whole
from phaselens.uncertainty._bootstrap import FEWEST_TEXTS, Resamples, require_draws, resamples

EPS = float(np.finfo(np.float64).eps)
_MAX_SIGNS = 1 << 20


@dataclass(frozen=True)
class IntervalOptions:
    """Options of intervals and p-values; ValueError for invalid values."""

    confidence: float
    n_resamples: int
    n_permutations: int
    seed: int

    def __post_init__(self) -> None:
        require_draws(self.confidence, self.n_resamples, self.seed)
        require_whole("n_permutations", self.n_permutations, 1)

    @property
    def tails(self) -> tuple[float, float]:
        return (1 - self.confidence) / 2, (1 + self.confidence) / 2


@dataclass
class Paired:
    """Statistics of one column of differences. `reasons` has the reason for each field that is None, by field name."""

    mean: float
    resamples: Resamples | None = None
    resampled: FloatArray | None = None
    """Weighted means of the resampled texts, [resample]."""
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_exact: bool | None = None
    d_z: float | None = None
    rank_biserial: float | None = None
    share_above: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def paired(
    differences: FloatArray, weights: FloatArray, scale: FloatArray, options: IntervalOptions
) -> list[Paired]:
    """Compute the statistics of each column of finite differences [text, column], with positive weights [text].

    `scale` [column] is the size of what was subtracted. The mean, its interval, p and d_z weigh the texts; ranks and
    shares count each text once.
    """
    columns = np.ascontiguousarray(differences.T)
    share = weights / weights.sum()
    results = [Paired(weighted_mean(column, share)) for column in columns]
    n_texts = len(weights)
    if n_texts < FEWEST_TEXTS:
        reason = f"1 text; spread over texts needs at least {FEWEST_TEXTS}"
        for result in results:
            for name in ("low", "high", "p_value", "p_exact", "d_z", "rank_biserial", "share_above"):
                result.reasons[name] = reason
        return results
    drawn_texts = resamples(n_texts, options.n_resamples, options.seed)
    counts = drawn_texts.counts
    drawn = counts @ share
    p_values, exact = sign_flip(columns * share, options)
    for result, column, p_value, size in zip(results, columns, p_values, scale.tolist(), strict=True):
        result.resampled = column[0] + counts @ (share * (column - column[0])) / drawn
        result.resamples = drawn_texts
        result.low, result.high = (
            float(end) for end in drawn_texts.quantiles(result.resampled, options.tails)
        )
        result.p_value, result.p_exact = p_value, exact
        result.share_above = float((column > 0).mean())
        _set_effect_sizes(result, column, share, size)
    return results


def weighted_mean(column: FloatArray, share: FloatArray) -> float:
    """Return the mean of `column` with weights share [text] of sum 1; texts that agree have no rounding error."""
    return float(column[0] + share @ (column - column[0]))


def sign_flip(contributions: FloatArray, options: IntervalOptions) -> tuple[list[float], bool]:
    """Return the two-sided p of each row's sum in contributions [column, text], and whether it is exact.

    Exact if the number of sign patterns, 2^n, is at most `n_permutations`, else drawn, with one added to numerator and
    denominator (Phipson & Smyth 2010), because the observed pattern is one of the possible ones.
    """
    n_texts = contributions.shape[1]
    exact = 2**n_texts <= options.n_permutations
    observed = np.abs(contributions.sum(1))
    # A sum of n numbers is exact up to n roundings; sums that differ by less are ties.
    tie = n_texts * EPS * np.abs(contributions).sum(1)
    thresholds = (observed - tie).tolist()
    hits, n_patterns = np.zeros(len(contributions), dtype=np.int64), 0
    for signs in _every_sign(n_texts) if exact else _drawn_signs(n_texts, options):
        n_patterns += len(signs)
        for row, contribution in enumerate(contributions):
            hits[row] += np.count_nonzero(np.abs(signs @ contribution) >= thresholds[row])
    extra = 0 if exact else 1
    return ((hits + extra) / (n_patterns + extra)).tolist(), exact


def _every_sign(n_texts: int) -> Iterator[FloatArray]:
    """Yield all patterns that keep the first text's sign; the others are mirror images, with equal absolute sums."""
    bits = (np.arange(2 ** (n_texts - 1))[:, None] >> np.arange(n_texts)) & 1
    yield 1.0 - 2.0 * np.roll(bits, 1, axis=1)


def _drawn_signs(n_texts: int, options: IntervalOptions) -> Iterator[FloatArray]:
    # A separate random stream, so that signs do not repeat the draws of the intervals.
    rng = np.random.default_rng([options.seed, 1])
    block = max(1, _MAX_SIGNS // n_texts)
    for start in range(0, options.n_permutations, block):
        rows = min(block, options.n_permutations - start)
        yield 1.0 - 2.0 * rng.integers(0, 2, (rows, n_texts)).astype(np.float64)


def _set_effect_sizes(result: Paired, column: FloatArray, share: FloatArray, scale: float) -> None:
    """Set d_z, weighted by share [text] as the mean is, and the unweighted rank correlation."""
    from scipy.stats import rankdata

    nonzero = column != 0
    if not nonzero.any():
        result.reasons["d_z"] = result.reasons["rank_biserial"] = "all differences are 0"
        return
    ranks = np.asarray(rankdata(np.abs(column[nonzero])), dtype=np.float64)
    result.rank_biserial = float(ranks @ np.sign(column[nonzero]) / ranks.sum())
    n_texts = len(column)
    sd = float(np.sqrt(share @ np.square(column - result.mean) * n_texts / (n_texts - 1)))
    if sd <= 4 * EPS * scale:
        result.reasons["d_z"] = f"all texts differ by the same amount, {result.mean:.6g}, up to rounding"
    else:
        result.d_z = result.mean / sd


def as_table(values: ArrayLike, name: str, *axes: str) -> FloatArray:
    """Return `values` as a float64 array with these axes; ValueError for another number of axes."""
    array = as_numbers(name, values)
    if array.ndim != len(axes):
        raise ValueError(f"expected {name} [{', '.join(axes)}], received shape {array.shape}")
    return array


def require_same_texts(**arrays: FloatArray) -> None:
    """Raise ValueError unless all arrays have the same number of texts, their first axis."""
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        received = ", ".join(f"{name} of {size}" for name, size in sizes.items())
        raise ValueError(f"expected the same texts in all, received {received}")


def weights_of(values: ArrayLike, name: str) -> FloatArray:
    """Return the weights [text]; ValueError if one is negative, NaN or infinite."""
    weights = as_table(values, name, "text")
    is_invalid = ~np.isfinite(weights) | (weights < 0)
    if is_invalid.any():
        raise ValueError(
            f"expected {name} of at least 0, received {weights[is_invalid][0]} "
            f"for text {np.flatnonzero(is_invalid)[0]}"
        )
    return weights


def counts_of(values: ArrayLike, name: str) -> FloatArray:
    """Return the numbers of tokens [text]; ValueError for one that is not whole."""
    counts = weights_of(values, name)
    is_fractional = counts != np.floor(counts)
    if is_fractional.any():
        raise ValueError(
            f"expected whole numbers for {name}, received {counts[is_fractional][0]} "
            f"for text {np.flatnonzero(is_fractional)[0]}"
        )
    return counts
