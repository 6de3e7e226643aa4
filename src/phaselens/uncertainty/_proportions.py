"""Accuracies: shares of items, with Wilson's interval, and how many items were answered at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phaselens.errors import require_whole
from phaselens.uncertainty._bootstrap import FEWEST_TEXTS, require_confidence


@dataclass(frozen=True)
class Proportion:
    """successes / n with its interval. What is None has its reason in `reasons`, under its own name."""

    successes: int
    n: int
    value: float | None
    ci_low: float | None
    ci_high: float | None
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Accuracy:
    """Three shares that must not stand for each other."""

    of_asked: Proportion
    """Right answers of all items asked: what was not answered is not right."""
    of_answered: Proportion
    """Right answers of the items that were answered."""
    coverage: Proportion
    """Answered of all items asked."""


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Proportion:
    """Share of successes among n independent items, with Wilson's score interval (Wilson 1927).

    Without an item the share is unknown, and below two the interval. ValueError unless 0 ≤ successes ≤ n and
    0 < confidence < 1.

    >>> found = wilson_interval(3, 10)
    >>> found.value, round(found.ci_low, 4), round(found.ci_high, 4)
    (0.3, 0.1078, 0.6032)
    >>> wilson_interval(0, 0).reasons["value"]
    'no item'
    """
    from scipy.stats import binomtest

    require_whole("successes", successes)
    require_whole("n", n)
    successes, n = int(successes), int(n)
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 to n = {n} successes, received {successes}")
    require_confidence(confidence)
    if n == 0:
        return Proportion(
            successes, n, None, None, None, dict.fromkeys(("value", "ci_low", "ci_high"), "no item")
        )
    if n < FEWEST_TEXTS:
        return Proportion(
            successes,
            n,
            successes / n,
            None,
            None,
            dict.fromkeys(("ci_low", "ci_high"), f"{n} item; an interval needs at least {FEWEST_TEXTS}"),
        )
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Proportion(successes, n, successes / n, float(interval.low), float(interval.high), {})


def accuracy(correct: int, n_answered: int, n_asked: int, *, confidence: float = 0.95) -> Accuracy:
    """Accuracy of n_asked items of which n_answered gave an answer that could be read and `correct` the right one.

    ValueError unless 0 ≤ correct ≤ n_answered ≤ n_asked.

    >>> found = accuracy(correct=4, n_answered=5, n_asked=20)
    >>> found.of_asked.value, found.of_answered.value, found.coverage.value
    (0.2, 0.8, 0.25)
    """
    for name, count in (("correct", correct), ("n_answered", n_answered), ("n_asked", n_asked)):
        require_whole(name, count)
    if not 0 <= correct <= n_answered <= n_asked:
        raise ValueError(
            "expected 0 ≤ correct ≤ n_answered ≤ n_asked, "
            f"received correct {correct}, n_answered {n_answered}, n_asked {n_asked}"
        )
    return Accuracy(
        of_asked=wilson_interval(correct, n_asked, confidence=confidence),
        of_answered=wilson_interval(correct, n_answered, confidence=confidence),
        coverage=wilson_interval(n_answered, n_asked, confidence=confidence),
    )
