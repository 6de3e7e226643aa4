"""Scores of questions with options, and the chance levels to compare them with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phaselens_plugins._questions import Question


@dataclass(frozen=True)
class QuestionScore:
    """Scores of one question under one condition. `chosen` is None where two options are equally probable."""

    chosen: int | None
    correct: float
    correct_per_token: float
    p: float
    p_per_token: float
    log_odds: float
    log_odds_per_token: float


def score_options(sums: Sequence[float], lengths: Sequence[int], answer: int) -> QuestionScore:
    """Score one question by its options.

    Args:
        sums: log-probability of each option, in nats.
        lengths: number of tokens of each option.
        answer: index of the right option.

    >>> score = score_options([-1.0, -3.0], [1, 4], 0)
    >>> score.chosen, score.correct, score.correct_per_token, round(score.p, 3), score.log_odds
    (0, 1.0, 0.0, 0.881, 2.0)
    """
    means = [total / length for total, length in zip(sums, lengths, strict=True)]
    chosen, chosen_per_token = _unique_argmax(sums), _unique_argmax(means)
    log_odds, log_odds_per_token = _log_odds(sums, answer), _log_odds(means, answer)
    return QuestionScore(
        chosen,
        float(chosen == answer),
        float(chosen_per_token == answer),
        _logistic(log_odds),
        _logistic(log_odds_per_token),
        log_odds,
        log_odds_per_token,
    )


def _unique_argmax(scores: Sequence[float]) -> int | None:
    """Return the index of the largest score; None for a tie."""
    largest = max(scores)
    return scores.index(largest) if scores.count(largest) == 1 else None


def _log_odds(scores: Sequence[float], answer: int) -> float:
    """Return ln of the right option's probability over the summed probability of all others."""
    others = [score for option, score in enumerate(scores) if option != answer]
    largest = max(others)
    return scores[answer] - largest - math.log(math.fsum(math.exp(score - largest) for score in others))


def _logistic(log_odds: float) -> float:
    if log_odds < 0:
        odds = math.exp(log_odds)
        return odds / (1 + odds)
    return 1 / (1 + math.exp(-log_odds))


def chance_accuracy(questions: Sequence[Question]) -> float:
    """Return the mean over questions of 1 / number of options."""
    return math.fsum(1 / len(question.options) for question in questions) / len(questions)


def same_answer_accuracy(questions: Sequence[Question]) -> float:
    """Return the accuracy of giving the most frequent right answer to every question."""
    answers = [question.options[question.answer] for question in questions]
    return max(answers.count(answer) for answer in set(answers)) / len(answers)


def difference_of_means(
    first: Sequence[float], second: Sequence[float], *, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Return mean of `first` − mean of `second`, of different items, with its percentile bootstrap interval.

    None where undefined. The resamples are always drawn: two groups have too many to enumerate.
    """
    import numpy as np
    from scipy.stats import bootstrap

    from phaselens.uncertainty import N_RESAMPLES

    if not first or not second:
        return None, None, None
    centre = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return centre, None, None
    interval = bootstrap(
        (first, second), lambda a, b, axis=-1: np.mean(a, axis=axis) - np.mean(b, axis=axis),
        method="percentile", n_resamples=N_RESAMPLES, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return centre, float(interval.low), float(interval.high)
