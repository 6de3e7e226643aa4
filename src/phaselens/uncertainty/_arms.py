"""A treated arm against a control that was drawn several times, text by text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from phaselens.uncertainty._bootstrap import N_RESAMPLES
from phaselens.uncertainty._paired import Floats, Options, counts_of, paired, same_texts, table, weighted_mean


@dataclass(frozen=True)
class ArmComparison:
    """Treated less control, in the unit of both. What is None has its reason in `reasons`, under its own name."""

    n_texts: int
    n_seeds: int
    treated: float | None
    """Mean over texts; so is `control`, over texts and seeds."""
    control: float | None
    difference: float | None
    """treated − control; ci_low … ci_high is its interval over texts."""
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    """Two-sided, under exchange of the two arms within each text."""
    p_exact: bool | None
    """Whether all exchanges were tried, rather than some drawn by chance."""
    d_z: float | None
    """difference over the sd of the texts' differences, weighted as difference is; see `LossComparison.d_z`."""
    rank_biserial: float | None
    """Matched pairs, −1 to 1 (Kerby 2014)."""
    share_above: float | None
    """Share of texts whose treated value is above their control's."""
    control_sd_over_seeds: float | None
    """sd (n − 1) over seeds of the control's mean over texts: how much the draw of the control matters, and no more."""
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
    """Treated [text] less control [text, seed], paired over texts: "massive less random" of one text, and its spread.

    The control is averaged over seeds first, in each text; the unit is the text. Repeating seeds, or a treated arm
    that is the same for all of them, adds no evidence. For losses in nats the baseline cancels, so that neither
    arm needs it. n_predicted [text] weighs the texts by their tokens, in the means, interval, p and d_z; without it
    each text counts once. Texts without a predicted token are left out.

    Interval, p, order of texts, seed and errors as in `compare_conditions`. Both arms are None where a value is
    NaN or infinite.

    >>> found = compare_arms([3.0, 2.0, 2.5], [[1.0, 1.2], [1.0, 0.8], [1.4, 1.6]])
    >>> round(found.difference, 4), round(found.ci_low, 4), round(found.ci_high, 4), found.n_texts, found.n_seeds
    (1.3333, 1.0, 1.9, 3, 2)
    >>> found.p_value, found.rank_biserial
    (0.25, 1.0)
    """
    options = Options(confidence, n_resamples, n_permutations, seed)
    values = table(treated, "treated", "text")
    draws_of_control = table(control, "control", "text", "seed")
    tokens = np.ones(len(values)) if n_predicted is None else counts_of(n_predicted, "n_predicted")
    same_texts(treated=values, control=draws_of_control, n_predicted=tokens)
    kept = tokens > 0
    values, draws_of_control, tokens = values[kept], draws_of_control[kept], tokens[kept]
    n_texts, n_seeds = draws_of_control.shape
    why = _unknown(values, draws_of_control)
    if why:
        names = [
            name
            for name in ArmComparison.__dataclass_fields__
            if name not in ("n_texts", "n_seeds", "reasons")
        ]
        nothing = dict.fromkeys(names)
        return ArmComparison(n_texts, n_seeds, **nothing, reasons=dict.fromkeys(names, why))

    share = tokens / tokens.sum()
    # Around one of the seeds: seeds that agree give their value and no rounding.
    first = draws_of_control[:, :1]
    averaged = first[:, 0] + (draws_of_control - first).mean(1)
    scale = np.maximum(np.abs(values).max(), np.abs(draws_of_control).max())
    found = paired((values - averaged)[:, None], tokens, np.array([scale]), options)[0]
    reasons = {
        {"low": "ci_low", "high": "ci_high"}.get(name, name): why for name, why in found.reasons.items()
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
        difference=found.mean,
        ci_low=found.low,
        ci_high=found.high,
        p_value=found.p_value,
        p_exact=found.p_exact,
        d_z=found.d_z,
        rank_biserial=found.rank_biserial,
        share_above=found.share_above,
        control_sd_over_seeds=spread,
        reasons=reasons,
    )


def _unknown(treated: Floats, control: Floats) -> str:
    """Why nothing is known, or nothing."""
    if not len(treated):
        return "there is no text"
    if not control.shape[1]:
        return "the control has no seed"
    bad = np.count_nonzero(~np.isfinite(treated) | ~np.isfinite(control).all(1))
    return f"a value of {bad} of {len(treated)} texts is NaN or infinite" if bad else ""
