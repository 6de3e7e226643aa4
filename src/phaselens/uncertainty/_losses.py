"""Perplexity, and what a condition does to the loss of the same texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from phaselens.errors import as_numbers
from phaselens.uncertainty._bootstrap import N_RESAMPLES, Masked
from phaselens.uncertainty._paired import (
    Floats,
    Options,
    Paired,
    counts_of,
    paired,
    same_texts,
    table,
    weighted_mean,
    weights_of,
)

_LARGEST = math.log(np.finfo(np.float64).max)
_SMALLEST = math.log(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class LossComparison:
    """Baseline and condition on the same texts. What is None has its reason in `reasons`, under its own name."""

    n_texts: int
    """Texts with at least one predicted token."""
    n_predicted: int
    """Predicted tokens of all texts."""
    loss_baseline: float | None
    """Nats per predicted token, over the tokens of all texts; so is `loss`, under the condition."""
    loss: float | None
    ppl_baseline: float | None
    """exp(loss_baseline); `ppl` is exp(loss)."""
    ppl: float | None
    ratio: float | None
    """ppl / ppl_baseline = exp(delta_nats), not the mean of the texts' ratios; ci_low … ci_high is its interval."""
    ci_low: float | None
    ci_high: float | None
    delta_nats: float | None
    """loss − loss_baseline; delta_low … delta_high is its interval."""
    delta_low: float | None
    delta_high: float | None
    p_value: float | None
    """Two-sided, of delta_nats, under exchange of the two arms within each text."""
    p_exact: bool | None
    """Whether all exchanges were tried, rather than some drawn by chance."""
    d_z: float | None
    """delta_nats over the sd of the texts' differences, weighted as delta_nats is: the square root of
    n / (n − 1) Σ w (d − delta_nats)² / Σ w, w the predicted tokens of a text and d its difference."""
    rank_biserial: float | None
    """Matched pairs, −1 to 1: ranks of the texts that got worse less those that got better, over the ranks of both
    (Kerby 2014); texts that did not change are left out."""
    share_worse: float | None
    """Share of texts whose loss is higher under the condition."""
    ppl_baseline_length_weighted: float | None
    """The three with texts weighted by all their tokens, T, though a loss is a mean over T − 1 of them."""
    ppl_length_weighted: float | None
    ratio_length_weighted: float | None
    reasons: Mapping[str, str]

    @property
    def increase_percent(self) -> float | None:
        """100 (ratio − 1)."""
        return None if self.ratio is None else 100 * (self.ratio - 1)


def perplexity(loss: ArrayLike, weights: ArrayLike) -> Masked:
    """exp(Σ wᵢ lossᵢ / Σ wᵢ) of loss [text, *cells], in nats per predicted token: [*cells].

    weights [text] are the numbers of predicted tokens, which makes it the perplexity of all tokens together.
    Texts of weight 0 are left out, whatever their loss. Masked (None in `.tolist()`) without any text left,
    where a loss is NaN or infinite, and where exp overflows. ValueError for weights that are negative or not
    finite, and for shapes that do not fit.

    >>> perplexity([2.0, 1.0], weights=[10, 30]).round(4).tolist()
    3.4903
    >>> perplexity([[2.0, 800.0], [1.0, 800.0]], weights=[10, 30]).round(4).tolist()
    [3.4903, None]
    """
    values, share = as_numbers("loss", loss), weights_of(weights, "weights")
    if values.ndim < 1:
        raise ValueError("expected loss [text, *cells], received a single number")
    same_texts(loss=values, weights=share)
    values, share = values[share > 0], share[share > 0]
    if not len(share):
        return np.ma.MaskedArray(np.zeros(values.shape[1:]), mask=True)
    share = share / share.sum()
    known = np.isfinite(values).all(0)
    kept = np.where(known, values, 0.0)
    means = kept[0] + np.tensordot(share, kept - kept[0], axes=1)
    known = known & (means <= _LARGEST) & (means >= _SMALLEST)
    return np.ma.MaskedArray(np.exp(np.where(known, means, 0.0)), mask=~known)


def compare_losses(
    baseline: ArrayLike,
    condition: ArrayLike,
    n_predicted: ArrayLike,
    *,
    lengths: ArrayLike | None = None,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    n_permutations: int = 9999,
    seed: int = 0,
) -> LossComparison:
    """What a condition does to the loss of the same texts; see `compare_conditions`.

    baseline and condition [text], nats per predicted token; n_predicted and lengths [text], tokens.

    >>> found = compare_losses([2.0, 1.0, 3.0], [2.5, 1.5, 3.5], n_predicted=[10, 30, 20])
    >>> round(found.ratio, 4), found.delta_nats, found.delta_low, found.p_value
    (1.6487, 0.5, 0.5, 0.25)
    >>> found.d_z, found.reasons["d_z"]
    (None, 'all texts differ by the same amount, 0.5, up to rounding')
    """
    return compare_conditions(
        baseline,
        table(condition, "condition", "text")[:, None],
        n_predicted,
        lengths=lengths,
        confidence=confidence,
        n_resamples=n_resamples,
        n_permutations=n_permutations,
        seed=seed,
    )[0]


def compare_conditions(
    baseline: ArrayLike,
    conditions: ArrayLike,
    n_predicted: ArrayLike,
    *,
    lengths: ArrayLike | None = None,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    n_permutations: int = 9999,
    seed: int = 0,
) -> list[LossComparison]:
    """What each condition does to the loss of the same texts: one `LossComparison` a condition.

    baseline [text] and conditions [text, condition] are mean losses in nats per predicted token; n_predicted
    [text] weighs them, and texts without a predicted token are left out. lengths [text], all tokens, are
    needed for the length-weighted numbers only.

    Interval: percentile bootstrap over texts, drawn in both arms at once (Efron & Tibshirani 1993, chapter 13),
    as `scipy.stats.bootstrap(paired=True, method="percentile")`; of all resamples there are, where they are at most
    `n_resamples`. p: exchange of the arms within texts, as
    `scipy.stats.permutation_test(permutation_type="samples")`, exact while 2^texts ≤ n_permutations; with n
    texts it is at least 2 / 2^n. Below two texts both are None, as are numbers of losses that are NaN or
    infinite, and powers of e beyond float64; `reasons` says which it was.

    All conditions share their draws, and the numbers of one do not depend on the others. The draws belong to
    the places of texts: sort texts by what they say (`PerText.by_content`) to have the same interval whatever
    order they came in. The same seed gives the same numbers. ValueError for shapes that do not fit, counts that
    are no counts of tokens, and a confidence or numbers of draws out of range.

    >>> nothing, much = compare_conditions([2.0, 1.0, 3.0], [[2.0, 4.0], [1.0, 2.5], [3.0, 4.5]], [10, 30, 20])
    >>> nothing.ratio, nothing.ci_low, nothing.ci_high, nothing.p_value
    (1.0, 1.0, 1.0, 1.0)
    >>> round(much.delta_nats, 4), round(much.ratio, 4), round(much.ci_low, 4), much.share_worse
    (1.5833, 4.8712, 4.4817, 1.0)
    """
    options = Options(confidence, n_resamples, n_permutations, seed)
    before = table(baseline, "baseline", "text")
    after = table(conditions, "conditions", "text", "condition")
    tokens = counts_of(n_predicted, "n_predicted")
    whole = None if lengths is None else counts_of(lengths, "lengths")
    same_texts(
        baseline=before, conditions=after, n_predicted=tokens, **({} if whole is None else {"lengths": whole})
    )
    if whole is not None and (whole < tokens).any():
        raise ValueError("expected lengths of at least n_predicted, received fewer tokens than are predicted")
    kept = tokens > 0
    before, after, tokens = before[kept], after[kept], tokens[kept]
    whole = None if whole is None else whole[kept]

    known = len(before) > 0 and bool(np.isfinite(before).all())
    usable = np.asarray(np.isfinite(after).all(axis=0), dtype=bool).reshape(-1)
    usable &= known
    differences = after[:, usable] - before[:, None]
    scale = np.maximum(np.abs(before).max(initial=0.0), np.abs(after[:, usable]).max(0, initial=0.0))
    found = iter(paired(differences, tokens, scale, options) if usable.any() else ())
    return [
        _comparison(before, after[:, at], tokens, whole, next(found) if usable[at] else None, options)
        for at in range(after.shape[1])
    ]


class _Fields:
    """Fields of a `LossComparison` by name: a value, or None with the reason for it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def unknown(self, why: str, *names: str) -> None:
        self.values |= dict.fromkeys(names)
        self.reasons |= dict.fromkeys(names, why)

    def exponential(self, name: str, exponent: float) -> None:
        if _beyond(exponent):
            self.unknown(f"exp({exponent:.6g}) is beyond float64; the exponent, in nats, is known", name)
        else:
            self.values[name] = math.exp(exponent)


_OF_DIFFERENCES = {
    "delta_nats": "mean",
    "delta_low": "low",
    "delta_high": "high",
    "p_value": "p_value",
    "p_exact": "p_exact",
    "d_z": "d_z",
    "rank_biserial": "rank_biserial",
    "share_worse": "share_above",
}
"""The fields that are taken from `Paired`, and their names there."""


def _comparison(
    before: Floats,
    after: Floats,
    tokens: Floats,
    whole: Floats | None,
    found: Paired | None,
    options: Options,
) -> LossComparison:
    """One column, of texts with predicted tokens; `found` is None where a loss has no value."""
    fields = _Fields()
    reasons = _unknown(before, "at baseline"), _unknown(after, "under the condition")
    for arm, losses, why in zip(("_baseline", ""), (before, after), reasons, strict=True):
        if why:
            fields.unknown(why, f"loss{arm}", f"ppl{arm}", f"ppl{arm}_length_weighted")
            continue
        fields.values[f"loss{arm}"] = weighted_mean(losses, tokens / tokens.sum())
        fields.exponential(f"ppl{arm}", fields.values[f"loss{arm}"])
        if whole is not None:
            fields.exponential(f"ppl{arm}_length_weighted", weighted_mean(losses, whole / whole.sum()))
    if found is None:
        fields.unknown(
            reasons[0] or reasons[1], "ratio", "ci_low", "ci_high", "ratio_length_weighted", *_OF_DIFFERENCES
        )
    else:
        for name, there in _OF_DIFFERENCES.items():
            fields.values[name] = getattr(found, there)
            if there in found.reasons:
                fields.reasons[name] = found.reasons[there]
        fields.exponential("ratio", found.mean)
        _ratio_interval(fields, found, options)
        if whole is not None:
            fields.exponential("ratio_length_weighted", weighted_mean(after - before, whole / whole.sum()))
    if whole is None:
        names = ("ppl_baseline_length_weighted", "ppl_length_weighted", "ratio_length_weighted")
        fields.unknown("the lengths of the texts were not given", *names)
    return LossComparison(
        n_texts=len(tokens), n_predicted=int(tokens.sum()), **fields.values, reasons=fields.reasons
    )


def _ratio_interval(fields: _Fields, found: Paired, options: Options) -> None:
    if found.resampled is None or found.resamples is None:
        fields.unknown(found.reasons["low"], "ci_low", "ci_high")
        return
    least, most = float(found.resampled.min()), float(found.resampled.max())
    if _beyond(least) or _beyond(most):
        why = "exp of a resample's nats is beyond float64; delta_low and delta_high are known"
        fields.unknown(why, "ci_low", "ci_high")
        return
    low, high = found.resamples.quantiles(np.exp(found.resampled), options.tails)
    fields.values |= {"ci_low": float(low), "ci_high": float(high)}


def _unknown(losses: Floats, where: str) -> str:
    """Why these losses have no mean, or nothing."""
    if not len(losses):
        return "no text has a predicted token"
    bad = np.count_nonzero(~np.isfinite(losses))
    return f"the loss of {bad} of {len(losses)} texts is NaN or infinite {where}" if bad else ""


def _beyond(exponent: float) -> bool:
    return not _SMALLEST <= exponent <= _LARGEST
