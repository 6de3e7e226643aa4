"""Compare a treated arm with a control that was drawn several times, text by text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from phaselens.errors import FloatArray
from phaselens.uncertainty._bootstrap import N_RESAMPLES
from phaselens.uncertainty._paired import (
    IntervalOptions,
    as_table,
    counts_of,
    paired,
    require_same_texts,
    weighted_mean,
)


@dataclass(frozen=True)
class ArmComparison:
    """Treated minus control, in the unit of both. `reasons` has the reason for each field that is None, by name."""

    n_texts: int
    n_seeds: int
    treated: float | None
    """Mean over texts; `control` is the mean over texts and seeds."""
    control: float | None
    difference: float | None
    """treated − control; ci_low … ci_high is its interval over texts."""
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    """Two-sided p, under exchange of the two arms within each text."""
    p_exact: bool | None
    """Whether all exchanges were tried, rather than a random sample of them."""
    d_z: float | None
    """difference divided by the sd of the texts' differences, weighted as difference is; see `LossComparison.d_z`."""
    rank_biserial: float | None
    """Matched pairs, −1 to 1 (Kerby 2014)."""
    share_above: float | None
    """Share of texts whose treated value is above their control's."""
    control_sd_over_seeds: float | None
    """sd (n − 1) over seeds of the control's mean over texts: the spread due to the draw of the control alone."""
    reasons: Mapping[str, str]


def compare_arms(
    treated: ArrayLike,
    control: ArrayLike,
    *,
    n_predicted: ArrayLike | None = None,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    n_permutations: int = 9999,
    seed: int = 0,
) -> ArmComparison:
    """Compare treated [text] with control [text, seed], paired over texts, such as "massive minus random".

    The control is first averaged over seeds within each text; the unit is the text, so more seeds add no evidence.
    For losses in nats the baseline cancels, so neither arm needs it. n_predicted [text] weighs the texts by their
    tokens in the means, interval, p and d_z; without it each text counts once. Texts without a predicted token are
    left out.

    Interval, p, order of texts, seed and errors as in `compare_conditions`. Both arms are None where a value is
    NaN or infinite.

    >>> arms = compare_arms([3.0, 2.0, 2.5], [[1.0, 1.2], [1.0, 0.8], [1.4, 1.6]])
    >>> round(arms.difference, 4), round(arms.ci_low, 4), round(arms.ci_high, 4), arms.n_texts, arms.n_seeds
    (1.3333, 1.0, 1.9, 3, 2)
    >>> arms.p_value, arms.rank_biserial
    (0.25, 1.0)
    """
    options = IntervalOptions(confidence, n_resamples, n_permutations, seed)
    values = as_table(treated, "treated", "text")
    draws_of_control = as_table(control, "control", "text", "seed")
    tokens = np.ones(len(values)) if n_predicted is None else counts_of(n_predicted, "n_predicted")
    require_same_texts(treated=values, control=draws_of_control, n_predicted=tokens)
    is_used = tokens > 0
    values, draws_of_control, tokens = values[is_used], draws_of_control[is_used], tokens[is_used]
    n_texts, n_seeds = draws_of_control.shape
    reason = _missing_reason(values, draws_of_control)
    if reason:
        names = [
            name
            for name in ArmComparison.__dataclass_fields__
            if name not in ("n_texts", "n_seeds", "reasons")
        ]
        missing = dict.fromkeys(names)
        return ArmComparison(n_texts, n_seeds, **missing, reasons=dict.fromkeys(names, reason))

    share = tokens / tokens.sum()
    # Relative to one of the seeds, so that seeds that agree give their value without rounding.
    reference = draws_of_control[:, :1]
    averaged = reference[:, 0] + (draws_of_control - reference).mean(1)
    scale = np.maximum(np.abs(values).max(), np.abs(draws_of_control).max())
    differences = paired((values - averaged)[:, None], tokens, np.array([scale]), options)[0]
    reasons = {
        {"low": "ci_low", "high": "ci_high"}.get(name, name): reason
        for name, reason in differences.reasons.items()
    }
    spread = None
    if n_seeds > 1:
        spread = float(np.std([weighted_mean(column, share) for column in draws_of_control.T], ddof=1))
    else:
        reasons["control_sd_over_seeds"] = "1 seed; spread over seeds needs at least 2"
    return ArmComparison(
        n_texts=n_texts,
        n_seeds=n_seeds,
        treated=weighted_mean(values, share),
        control=weighted_mean(averaged, share),
        difference=differences.mean,
        ci_low=differences.low,
        ci_high=differences.high,
        p_value=differences.p_value,
        p_exact=differences.p_exact,
        d_z=differences.d_z,
        rank_biserial=differences.rank_biserial,
        share_above=differences.share_above,
        control_sd_over_seeds=spread,
        reasons=reasons,
    )


def _missing_reason(treated: FloatArray, control: FloatArray) -> str:
    """Return the reason why the arms cannot be compared; empty if they can."""
    if not len(treated):
        return "there are no texts"
    if not control.shape[1]:
        return "the control has no seeds"
    n_invalid = np.count_nonzero(~np.isfinite(treated) | ~np.isfinite(control).all(1))
    return f"a value of {n_invalid} of {len(treated)} texts is NaN or infinite" if n_invalid else ""
