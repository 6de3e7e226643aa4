"""Shares of items, such as accuracies, with Wilson's interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phaselens.errors import require_whole
from phaselens.uncertainty._bootstrap import FEWEST_TEXTS, require_confidence


@dataclass(frozen=True)
class Proportion:
    """A share, successes / n, with its interval. `reasons` has the reason for each field that is None, by name."""

    successes: int
    n: int
    value: float | None
    ci_low: float | None
    ci_high: float | None
    reasons: Mapping[str, str]


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Proportion:
    """Return the share of successes among n independent items, with Wilson's score interval (Wilson 1927).

    The share is None without items, and the interval with fewer than two. ValueError unless 0 ≤ successes ≤ n and
    0 < confidence < 1.

    >>> share = wilson_interval(3, 10)
    >>> share.value, round(share.ci_low, 4), round(share.ci_high, 4)
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
