"""Scores of questions with options: what one comes to, and what many of them can be compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phaselens_plugins._questions import Question


@dataclass(frozen=True)
class Item:
    """Scores of one question under one condition. `chosen` is None where two options are equally probable."""

    chosen: int | None
    correct: float
    correct_per_token: float
    p: float
    p_per_token: float
    log_odds: float
    log_odds_per_token: float


def judge(sums: Sequence[float], lengths: Sequence[int], answer: int) -> Item:
    """Log-probabilities of all options in nats, and how many tokens each has → the item's scores.

    >>> found = judge([-1.0, -3.0], [1, 4], 0)
    >>> found.chosen, found.correct, found.correct_per_token, round(found.p, 3), found.log_odds
    (0, 1.0, 0.0, 0.881, 2.0)
    """
    means = [total / length for total, length in zip(sums, lengths, strict=True)]
    chosen, other = _best(sums), _best(means)
    log_odds, log_odds_per_token = _log_odds(sums, answer), _log_odds(means, answer)
    return Item(
        chosen,
        float(chosen == answer),
        float(other == answer),
        _logistic(log_odds),
        _logistic(log_odds_per_token),
        log_odds,
        log_odds_per_token,
    )


def _best(scores: Sequence[float]) -> int | None:
    """Where the largest score stands; None where it stands twice."""
    most = max(scores)
    return scores.index(most) if scores.count(most) == 1 else None


def _log_odds(scores: Sequence[float], answer: int) -> float:
    """ln of the right option's probability over that of all others together."""
    others = [score for place, score in enumerate(scores) if place != answer]
    most = max(others)
    return scores[answer] - most - math.log(math.fsum(math.exp(score - most) for score in others))


def _logistic(log_odds: float) -> float:
    if log_odds < 0:
        odds = math.exp(log_odds)
        return odds / (1 + odds)
    return 1 / (1 + math.exp(-log_odds))


def chance(items: Sequence[Question]) -> float:
    """Mean of 1 over the number of options."""
    return math.fsum(1 / len(item.options) for item in items) / len(items)


def same_answer(items: Sequence[Question]) -> float:
    """Accuracy of giving the commonest right answer to every question."""
    right = [item.options[item.answer] for item in items]
    return max(right.count(one) for one in set(right)) / len(right)


def difference(
    first: Sequence[float], second: Sequence[float], *, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Mean of `first` − mean of `second`, different items, with its percentile bootstrap interval; None where it is
    unknown. The interval is of draws always: two groups have too many resamples to take them all."""
    import numpy as np
    from scipy.stats import bootstrap

    from phaselens.uncertainty import N_RESAMPLES

    if not first or not second:
        return None, None, None
    centre = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return centre, None, None
    found = bootstrap(
        (first, second), lambda one, other, axis=-1: np.mean(one, axis=axis) - np.mean(other, axis=axis),
        method="percentile", n_resamples=N_RESAMPLES, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return centre, float(found.low), float(found.high)
