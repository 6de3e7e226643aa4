"""What is known of paired differences, one a text: interval, permutation p and effect sizes, for many columns.

Every column (a condition) is computed by itself, on the same draws of texts and signs: what is found for one
depends neither on how many others there are nor on their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phaselens.errors import as_numbers, require_whole
from phaselens.uncertainty._bootstrap import FEWEST_TEXTS, Resamples, require_draws, resamples

Floats: TypeAlias = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
_SIGNS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Options:
    """How intervals and p-values are drawn; ValueError where that cannot be done."""

    confidence: float
    n_resamples: int
    n_permutations: int
    seed: int

    def __post_init__(self) -> None:
        require_draws(self.confidence, self.n_resamples, self.seed)
        if isinstance(self.n_permutations, int) and self.n_permutations < 1:
            raise ValueError(f"expected at least 1 permutation, received {self.n_permutations}")
        require_whole("n_permutations", self.n_permutations, 1)

    @property
    def tails(self) -> tuple[float, float]:
        return (1 - self.confidence) / 2, (1 + self.confidence) / 2


@dataclass
class Paired:
    """Of one column of differences; None where unknown, with the reason under the field's name."""

    mean: float
    resamples: Resamples | None = None
    resampled: Floats | None = None
    """Weighted means of the resampled texts, [resample]."""
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_exact: bool | None = None
    d_z: float | None = None
    rank_biserial: float | None = None
    share_above: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def paired(differences: Floats, weights: Floats, scale: Floats, options: Options) -> list[Paired]:
    """differences [text, column], finite; weights [text], positive; scale [column], the size of what was subtracted.

    The mean, its interval, p and d_z weigh the texts; ranks and shares count each text once.
    """
    columns = np.ascontiguousarray(differences.T)
    share = weights / weights.sum()
    found = [Paired(weighted_mean(column, share)) for column in columns]
    n_texts = len(weights)
    if n_texts < FEWEST_TEXTS:
        unknown = too_few(n_texts)
        for each in found:
            for name in ("low", "high", "p_value", "p_exact", "d_z", "rank_biserial", "share_above"):
                each.reasons[name] = unknown
        return found
    drawn_texts = resamples(n_texts, options.n_resamples, options.seed)
    counts = drawn_texts.counts
    drawn = counts @ share
    p_values, exact = sign_flip(columns * share, options)
    for each, column, p_value, size in zip(found, columns, p_values, scale.tolist(), strict=True):
        each.resampled = column[0] + counts @ (share * (column - column[0])) / drawn
        each.resamples = drawn_texts
        each.low, each.high = (float(end) for end in drawn_texts.quantiles(each.resampled, options.tails))
        each.p_value, each.p_exact = p_value, exact
        each.share_above = float((column > 0).mean())
        _effect_sizes(each, column, share, size)
    return found


def too_few(n_texts: int) -> str:
    """Why so few texts have no interval."""
    texts = "1 text" if n_texts == 1 else f"{n_texts} texts"
    return f"{texts}; spread over texts needs at least {FEWEST_TEXTS}"


def weighted_mean(column: Floats, share: Floats) -> float:
    """Taken around one of the texts: texts that agree give their value and no rounding. share [text] sums to 1."""
    return float(column[0] + share @ (column - column[0]))


def sign_flip(contributions: Floats, options: Options) -> tuple[list[float], bool]:
    """Two-sided p of the sum of each row of contributions [column, text] under all signs of texts; and whether exact.

    Exact while 2^n patterns are no more than `n_permutations`, else drawn, with one added above and below
    (Phipson & Smyth 2010): the observed pattern is one of those that chance could have given.
    """
    n_texts = contributions.shape[1]
    exact = 2**n_texts <= options.n_permutations
    observed = np.abs(contributions.sum(1))
    # A sum of n numbers is known to n roundings; sums that differ by less are ties.
    tie = n_texts * EPS * np.abs(contributions).sum(1)
    least = (observed - tie).tolist()
    hits, tried = np.zeros(len(contributions), dtype=np.int64), 0
    for signs in _every_sign(n_texts) if exact else _drawn_signs(n_texts, options):
        tried += len(signs)
        for row, contribution in enumerate(contributions):
            hits[row] += np.count_nonzero(np.abs(signs @ contribution) >= least[row])
    extra = 0 if exact else 1
    return ((hits + extra) / (tried + extra)).tolist(), exact


def _every_sign(n_texts: int) -> Iterator[Floats]:
    """All patterns that keep the first text's sign: the others are their mirror images, of equal size."""
    bits = (np.arange(2 ** (n_texts - 1))[:, None] >> np.arange(n_texts)) & 1
    yield 1.0 - 2.0 * np.roll(bits, 1, axis=1)


def _drawn_signs(n_texts: int, options: Options) -> Iterator[Floats]:
    # A stream of its own: signs do not repeat the draws of the intervals.
    rng = np.random.default_rng([options.seed, 1])
    block = max(1, _SIGNS_AT_ONCE // n_texts)
    for start in range(0, options.n_permutations, block):
        rows = min(block, options.n_permutations - start)
        yield 1.0 - 2.0 * rng.integers(0, 2, (rows, n_texts)).astype(np.float64)


def _effect_sizes(found: Paired, column: Floats, share: Floats, scale: float) -> None:
    """d_z with the weights of the mean, share [text] of sum 1, and the rank correlation without any."""
    from scipy.stats import rankdata

    nonzero = column != 0
    if not nonzero.any():
        found.reasons["d_z"] = found.reasons["rank_biserial"] = "all differences are 0"
        return
    ranks = np.asarray(rankdata(np.abs(column[nonzero])), dtype=np.float64)
    found.rank_biserial = float(ranks @ np.sign(column[nonzero]) / ranks.sum())
    n_texts = len(column)
    sd = float(np.sqrt(share @ np.square(column - found.mean) * n_texts / (n_texts - 1)))
    if sd <= 4 * EPS * scale:
        found.reasons["d_z"] = f"all texts differ by the same amount, {found.mean:.6g}, up to rounding"
    else:
        found.d_z = found.mean / sd


def table(values: ArrayLike, what: str, *axes: str) -> Floats:
    """`values` as float64 of these axes; ValueError says what was expected."""
    array = as_numbers(what, values)
    if array.ndim != len(axes):
        raise ValueError(f"expected {what} [{', '.join(axes)}], received shape {array.shape}")
    return array


def same_texts(**arrays: Floats) -> None:
    """ValueError unless all have the same number of texts, their first axis."""
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        received = ", ".join(f"{name} of {size}" for name, size in sizes.items())
        raise ValueError(f"expected the same texts in all, received {received}")


def weights_of(values: ArrayLike, what: str) -> Floats:
    """Weights [text]; ValueError where one is negative, NaN or infinite."""
    weights = table(values, what, "text")
    bad = ~np.isfinite(weights) | (weights < 0)
    if bad.any():
        raise ValueError(
            f"expected {what} of at least 0, received {weights[bad][0]} for text {np.flatnonzero(bad)[0]}"
        )
    return weights


def counts_of(values: ArrayLike, what: str) -> Floats:
    """Whole numbers of tokens [text]; ValueError for any other."""
    counts = weights_of(values, what)
    broken = counts != np.floor(counts)
    if broken.any():
        raise ValueError(
            f"expected whole numbers for {what}, received {counts[broken][0]} for text {np.flatnonzero(broken)[0]}"
        )
    return counts
