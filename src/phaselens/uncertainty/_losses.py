"""Compare the losses and perplexities of texts under conditions with those at baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from phaselens.errors import FloatArray
from phaselens.uncertainty._bootstrap import N_RESAMPLES
from phaselens.uncertainty._paired import (
    IntervalOptions,
    Paired,
    as_table,
    counts_of,
    paired,
    require_same_texts,
    weighted_mean,
)

_LARGEST = math.log(np.finfo(np.float64).max)
_SMALLEST = math.log(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class LossComparison:
    """Comparison of a condition with the baseline. `reasons` has the reason for each field that is None, by name."""

    n_texts: int
    """Number of texts with at least one predicted token."""
    n_predicted: int
    """Number of predicted tokens of all texts."""
    loss_baseline: float | None
    """Nats per predicted token at baseline, over the tokens of all texts; `loss` is the same under the condition."""
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
    """Two-sided p of delta_nats, under exchange of the two arms within each text."""
    p_exact: bool | None
    """Whether all exchanges were tried, rather than a random sample of them."""
    d_z: float | None
    """delta_nats divided by the sd of the texts' differences, weighted as delta_nats is: the square root of
    n / (n − 1) Σ w (d − delta_nats)² / Σ w, with w the predicted tokens of a text and d its difference."""
    rank_biserial: float | None
    """Matched pairs, −1 to 1: the ranks of texts that got worse minus those of texts that got better, divided by the
    sum of both (Kerby 2014); texts that did not change are left out."""
    share_worse: float | None
    """Share of texts whose loss is higher under the condition."""
    ppl_baseline_length_weighted: float | None
    """The fields …_length_weighted weigh texts by all T tokens, although a loss is a mean over T − 1 of them."""
    ppl_length_weighted: float | None
    ratio_length_weighted: float | None
    reasons: Mapping[str, str]


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
    """Compare the losses of the same texts under each condition with those at baseline: one `LossComparison` each.

    baseline [text] and conditions [text, condition] are mean losses in nats per predicted token; n_predicted
    [text] weighs them, and texts without a predicted token are left out. lengths [text], the numbers of all tokens,
    are only needed for the length-weighted fields.

    Interval: percentile bootstrap over texts, drawn in both arms at once (Efron & Tibshirani 1993, chapter 13),
    as `scipy.stats.bootstrap(paired=True, method="percentile")`; exact if there are at most `n_resamples` different
    resamples. p: exchange of the arms within texts, as
    `scipy.stats.permutation_test(permutation_type="samples")`, exact while 2^texts ≤ n_permutations; with n
    texts it is at least 2 / 2^n. Both are None with fewer than two texts. Fields that depend on losses that are NaN or
    infinite are None, and so are powers of e beyond float64; `reasons` has the reason.

    All conditions share their draws, and the results of one do not depend on the others. The draws depend on the
    order of the texts: sort texts by content (`PerText.by_content`) for intervals that do not depend on the input
    order. The same seed gives the same results. ValueError for shapes that do not fit, counts that are negative or not
    whole, and a confidence or numbers of draws out of range.

    >>> same, worse = compare_conditions([2.0, 1.0, 3.0], [[2.0, 4.0], [1.0, 2.5], [3.0, 4.5]], [10, 30, 20])
    >>> same.ratio, same.ci_low, same.ci_high, same.p_value
    (1.0, 1.0, 1.0, 1.0)
    >>> round(worse.delta_nats, 4), round(worse.ratio, 4), round(worse.ci_low, 4), worse.share_worse
    (1.5833, 4.8712, 4.4817, 1.0)
    """
    options = IntervalOptions(confidence, n_resamples, n_permutations, seed)
    baseline_losses = as_table(baseline, "baseline", "text")
    condition_losses = as_table(conditions, "conditions", "text", "condition")
    n_tokens = counts_of(n_predicted, "n_predicted")
    all_tokens = None if lengths is None else counts_of(lengths, "lengths")
    require_same_texts(
        baseline=baseline_losses,
        conditions=condition_losses,
        n_predicted=n_tokens,
        **({} if all_tokens is None else {"lengths": all_tokens}),
    )
    if all_tokens is not None and (all_tokens < n_tokens).any():
        raise ValueError("expected lengths of at least n_predicted, received fewer tokens than are predicted")
    is_used = n_tokens > 0
    baseline_losses, condition_losses = baseline_losses[is_used], condition_losses[is_used]
    n_tokens = n_tokens[is_used]
    all_tokens = None if all_tokens is None else all_tokens[is_used]

    has_baseline = len(baseline_losses) > 0 and bool(np.isfinite(baseline_losses).all())
    usable = np.atleast_1d(np.isfinite(condition_losses).all(axis=0) & has_baseline)
    differences = condition_losses[:, usable] - baseline_losses[:, None]
    scale = np.maximum(
        np.abs(baseline_losses).max(initial=0.0), np.abs(condition_losses[:, usable]).max(0, initial=0.0)
    )
    paired_columns = iter(paired(differences, n_tokens, scale, options) if usable.any() else ())
    return [
        _comparison(
            baseline_losses,
            condition_losses[:, column],
            n_tokens,
            all_tokens,
            next(paired_columns) if usable[column] else None,
            options,
        )
        for column in range(condition_losses.shape[1])
    ]


class _Fields:
    """Fields of a `LossComparison` by name: a value, or None with a reason."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def set_missing(self, reason: str, *names: str) -> None:
        self.values |= dict.fromkeys(names)
        self.reasons |= dict.fromkeys(names, reason)

    def set_exponential(self, name: str, exponent: float) -> None:
        if _overflows(exponent):
            self.set_missing(f"exp({exponent:.6g}) is beyond float64; the exponent, in nats, is known", name)
        else:
            self.values[name] = math.exp(exponent)


_PAIRED_FIELDS = {
    "delta_nats": "mean",
    "delta_low": "low",
    "delta_high": "high",
    "p_value": "p_value",
    "p_exact": "p_exact",
    "d_z": "d_z",
    "rank_biserial": "rank_biserial",
    "share_worse": "share_above",
}
"""Fields of `LossComparison` that come from `Paired`, and their names there."""


def _comparison(
    baseline: FloatArray,
    condition: FloatArray,
    n_tokens: FloatArray,
    all_tokens: FloatArray | None,
    differences: Paired | None,
    options: IntervalOptions,
) -> LossComparison:
    """Compare one condition, on texts with predicted tokens; `differences` is None if a loss is not finite."""
    fields = _Fields()
    reasons = _missing_reason(baseline, "at baseline"), _missing_reason(condition, "under the condition")
    for arm, losses, reason in zip(("_baseline", ""), (baseline, condition), reasons, strict=True):
        if reason:
            fields.set_missing(reason, f"loss{arm}", f"ppl{arm}", f"ppl{arm}_length_weighted")
            continue
        fields.values[f"loss{arm}"] = weighted_mean(losses, n_tokens / n_tokens.sum())
        fields.set_exponential(f"ppl{arm}", fields.values[f"loss{arm}"])
        if all_tokens is not None:
            mean = weighted_mean(losses, all_tokens / all_tokens.sum())
            fields.set_exponential(f"ppl{arm}_length_weighted", mean)
    if differences is None:
        fields.set_missing(
            reasons[0] or reasons[1], "ratio", "ci_low", "ci_high", "ratio_length_weighted", *_PAIRED_FIELDS
        )
    else:
        for name, paired_name in _PAIRED_FIELDS.items():
            fields.values[name] = getattr(differences, paired_name)
            if paired_name in differences.reasons:
                fields.reasons[name] = differences.reasons[paired_name]
        fields.set_exponential("ratio", differences.mean)
        _set_ratio_interval(fields, differences, options)
        if all_tokens is not None:
            mean = weighted_mean(condition - baseline, all_tokens / all_tokens.sum())
            fields.set_exponential("ratio_length_weighted", mean)
    if all_tokens is None:
        names = ("ppl_baseline_length_weighted", "ppl_length_weighted", "ratio_length_weighted")
        fields.set_missing("the lengths of the texts were not given", *names)
    return LossComparison(
        n_texts=len(n_tokens), n_predicted=int(n_tokens.sum()), **fields.values, reasons=fields.reasons
    )


def _set_ratio_interval(fields: _Fields, differences: Paired, options: IntervalOptions) -> None:
    means = differences.resampled
    if means is None or differences.resamples is None:
        fields.set_missing(differences.reasons["low"], "ci_low", "ci_high")
        return
    if _overflows(float(means.min())) or _overflows(float(means.max())):
        reason = "exp of a resample's nats is beyond float64; delta_low and delta_high are known"
        fields.set_missing(reason, "ci_low", "ci_high")
        return
    low, high = differences.resamples.quantiles(np.exp(means), options.tails)
    fields.values |= {"ci_low": float(low), "ci_high": float(high)}


def _missing_reason(losses: FloatArray, arm: str) -> str:
    """Return the reason why these losses have no mean; empty if they have one."""
    if not len(losses):
        return "no text has a predicted token"
    n_invalid = np.count_nonzero(~np.isfinite(losses))
    return f"the loss of {n_invalid} of {len(losses)} texts is NaN or infinite {arm}" if n_invalid else ""


def _overflows(exponent: float) -> bool:
    """Return whether exp(exponent) is beyond the normal numbers of float64, on either side."""
    return not _SMALLEST <= exponent <= _LARGEST
